"""Masks, patches, positions and noise of masked autoencoders; the original's numbers where it has them."""

import golden_data
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vim_timm.layers.masking import num_kept, random_masking, sample_noise, take_tokens
from vim_timm.layers.patches import normalize_patches, patchify, unpatchify
from vim_timm.layers.pos_embed import sincos_pos_embed

MASKING = golden_data.groups('mae/random_masking.npz')
PATCHES = golden_data.groups('mae/patchify.npz')
SINCOS, SINCOS_META = golden_data.load(golden_data.root() / 'mae' / 'sincos_pos_embed.npz')


def tensors(arrays):
    return {name: torch.from_numpy(value) for name, value in arrays.items()}


@pytest.mark.parametrize('case', MASKING)
def test_the_originals_masks_in_scan_order(case):
    arrays, meta = MASKING[case]
    golden = tensors(arrays)
    keep, mask = random_masking(golden['noise'], meta['mask_ratio'])
    order = golden['ids_keep'].argsort(dim=1)
    assert keep.shape[1] == meta['len_keep']
    assert torch.equal(keep, golden['ids_keep'].gather(1, order))
    assert torch.equal(mask, golden['mask'])
    x_masked = golden['x_masked'].gather(1, order[..., None].expand(-1, -1, golden['x'].shape[-1]))
    assert torch.equal(take_tokens(golden['x'], keep), x_masked)


@pytest.mark.parametrize('case', PATCHES)
def test_the_originals_patches(case):
    arrays, meta = PATCHES[case]
    golden = tensors(arrays)
    patch = (meta['patch_size'],) * 2
    side = meta['img_size'] // meta['patch_size']
    assert torch.equal(patchify(golden['imgs'], patch), golden['patches'])
    assert torch.equal(unpatchify(golden['tokens'], patch, (side, side)), golden['unpatchified'])


@pytest.mark.parametrize('case', SINCOS)
def test_the_originals_positions(case):
    meta, expected = SINCOS_META[case], SINCOS[case]
    table = sincos_pos_embed(meta['embed_dim'], (meta['grid_size'],) * 2, int(meta['cls_token']))
    assert table.dtype == torch.float64
    assert np.abs(table.numpy() - expected).max() < 1e-12


def test_positions_of_a_grid_that_is_not_square():
    table = sincos_pos_embed(16, (2, 3))
    square = sincos_pos_embed(16, (3, 3)).unflatten(0, (3, 3))
    assert torch.equal(table.unflatten(0, (2, 3)), square[:2])
    with pytest.raises(ValueError, match='divisible by 4'):
        sincos_pos_embed(18, (2, 2))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3), st.integers(1, 4), st.tuples(st.integers(1, 5), st.integers(1, 5)), st.integers(1, 24))
def test_patches_and_back(batch, channels, patch, side):
    images = torch.rand(batch, channels, side, side + 1)
    grid = -(-side // patch[0]), -(-(side + 1) // patch[1])
    patches = patchify(images, patch)
    assert patches.shape == (batch, grid[0] * grid[1], patch[0] * patch[1] * channels)
    back = unpatchify(patches, patch, grid)
    assert torch.equal(back[:, :, :side, : side + 1], images)
    assert back[:, :, side:].abs().sum() == 0 and back[..., side + 1 :].abs().sum() == 0


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 300), st.floats(0.01, 0.99))
def test_masks_are_ascending_and_complete(patches, ratio):
    if int(patches * (1 - ratio)) < 1:
        with pytest.raises(ValueError, match='none of'):
            num_kept(patches, ratio)
        return
    keep, mask = random_masking(sample_noise(0, torch.arange(3)[:, None], patches), ratio)
    assert (keep.diff(dim=1) > 0).all()
    assert (mask.sum(dim=1) == patches - keep.shape[1]).all() and keep.shape[1] < patches
    assert mask.gather(1, keep).sum() == 0


def test_constant_patches_normalize_to_zero():
    normalized, mean, std = normalize_patches(torch.full((1, 2, 4), 3.0))
    assert normalized.abs().max() == 0 and (mean == 3).all() and torch.allclose(std, torch.tensor(1e-3))


def keys(samples, epoch=0):
    samples = torch.as_tensor(samples)
    return torch.stack([torch.full_like(samples, epoch), samples], dim=1)


class TestSampleNoise:
    def test_is_uniform_and_uncorrelated(self):
        samples = torch.arange(2000)
        noise = sample_noise(0, keys(samples), 256).double()
        assert noise.min() >= 0 and noise.max() < 1
        assert abs(noise.mean() - 0.5) < 2e-3 and abs(noise.var() - 1 / 12) < 1e-3
        others = [sample_noise(0, keys(samples, 1), 256), sample_noise(1, keys(samples), 256), noise.roll(1, 1)]
        columns = torch.stack([x.double().flatten() for x in (noise, noise.roll(1, 0), *others)])
        assert (torch.corrcoef(columns) - torch.eye(5)).abs().max() < 5 / columns.shape[1] ** 0.5

    def test_depends_on_the_sample_alone(self):
        noise = sample_noise(42, keys([5, 0, 70_000], 3), 64)
        assert torch.equal(noise[1:2], sample_noise(42, keys([0], 3), 64))
        assert torch.equal(noise[:, :10], sample_noise(42, keys([5, 0, 70_000], 3), 10))
        assert noise.unique(dim=0).shape[0] == 3

    def test_is_splitmix64(self):
        bits, mask = [], (1 << 64) - 1

        def mix(x):
            x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
            x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
            return x ^ (x >> 31)

        state = 42
        for number in (3, 7):
            state = (mix(state + 0x9E3779B97F4A7C15 & mask) + number) & mask
        state = mix(state + 0x9E3779B97F4A7C15 & mask)
        for _ in range(5):
            state = state + 0x9E3779B97F4A7C15 & mask
            bits.append(mix(state) >> 40)
        assert (sample_noise(42, keys([7], 3), 5)[0] * (1 << 24)).tolist() == bits
