"""The Triton kernels that choose visible patches and take their pixels give the bits of aten's composition.

A run without a GPU has them in the interpreter that `test_masked_kernels` starts.
"""

import pytest
import timm
import torch
import torch.nn.functional as F

import vim_timm  # noqa: F401  registers the models
from tests.kernels import error
from tests.test_masked_kernels import Calls, kept_of
from tests.test_ssd import DEVICE, GPU, kernels
from vim_timm.layers import BiSSD, Layout
from vim_timm.layers.masking import random_masking
from vim_timm.layers.patch_embed import embed_patches
from vim_timm.ops import Pixels, use_scan_backend, visible_pixels

SMALL = dict(depth=2, embed_dim=32, headdim=16, d_state=16)
CUT = 0 if GPU else 2**-7  # the interpreter cuts numbers to bfloat16 where GPUs round


@kernels
@pytest.mark.parametrize('batch, patches, ratio', [(3, 196, 0.75), (2, 300, 0.5), (2, 2, 0.5), (1, 600, 0.1)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16, torch.int64], ids=str)
def test_kernels_choose_the_patches_that_sorting_does(batch, patches, ratio, dtype, triton):
    noise = torch.randint(0, 50, (batch, patches), device=DEVICE).to(dtype)  # much of it is equal
    if dtype.is_floating_point:
        noise[0, patches // 2] = noise[0, 0] = float('nan')
        noise[-1, 0], noise[-1, -1] = float('inf'), -float('inf')
    for same in (noise, noise.t().contiguous().t(), noise.repeat(1, 2)[:, :patches]):
        keep, mask = random_masking(same, ratio)
        with use_scan_backend('torch'):
            expected = random_masking(noise, ratio)
        assert keep.dtype == torch.int64 and mask.dtype == torch.float32
        assert torch.equal(keep, expected[0]) and torch.equal(mask, expected[1])


@kernels
def test_kernels_do_not_ask_noise_for_gradients(triton):
    keep, mask = random_masking(torch.rand(2, 16, device=DEVICE, requires_grad=True), 0.5)
    assert not keep.requires_grad and not mask.requires_grad


@kernels
@pytest.mark.parametrize(
    'shape, patch', [((3, 32, 48), (16, 16)), ((13, 20, 21), (5, 3)), ((1, 4, 4), (4, 4)), ((5, 14, 29), (14, 14))]
)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_kernels_take_the_pixels_that_indexing_does(shape, patch, dtype, triton):
    (chans, height, width), grid = shape, (shape[1] // patch[0], shape[2] // patch[1])
    images = torch.randn(2, *shape, device=DEVICE, dtype=dtype)
    keep = kept_of(grid, max(1, grid[0] * grid[1] // 2), 2, DEVICE)
    every = F.unfold(images.double(), patch, stride=patch).transpose(1, 2).to(dtype)
    expected = every.gather(1, keep.unsqueeze(-1).expand(-1, -1, every.shape[2]))
    wide = images.new_zeros(2, chans + 1, height, 2 * width)
    wide[:, 1:, :, ::2] = images
    views = images, images.to(memory_format=torch.channels_last), wide[:, 1:, :, ::2]
    for view, places in zip(views, (keep, keep.t().contiguous().t(), keep)):
        for wanted in {dtype, torch.bfloat16 if dtype == torch.float32 else dtype}:
            found = visible_pixels(Pixels(view, places, *patch, wanted))
            torch.testing.assert_close(found, expected.to(wanted), rtol=CUT if wanted != dtype else 0, atol=0)


@kernels
@pytest.mark.parametrize('autocast', [False, True])
def test_kernels_embed_visible_patches_with_gradients(autocast, triton):
    """Of the weights; pixels that learn are left to aten."""
    images, keep = torch.randn(2, 3, 8, 12, device=DEVICE), kept_of((2, 3), 4, 2, DEVICE)
    weights = [torch.randn(size, device=DEVICE, requires_grad=True) for size in ((7, 3, 4, 4), (7,))]
    results = []
    for backend in ('triton', 'torch'):
        for learn in (False, True):
            images.requires_grad_(learn)
            with use_scan_backend(backend), torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
                with Calls('visible_pixels') as calls:
                    y = embed_patches(images, *weights, keep)
            assert calls.count == (backend == 'triton' and not learn)
            results.append([y, *torch.autograd.grad(y.float().square().sum(), weights)])
    for result in results[1:]:
        for found, expected in zip(result, results[0], strict=True):
            assert error(found, expected) <= (CUT if autocast else 0)


@kernels
def test_kernels_read_no_pixel_outside_the_grid(triton):
    keep = torch.tensor([[-1, 0], [6, 5]], device=DEVICE)
    pixels = visible_pixels(Pixels(torch.randn(2, 3, 8, 13, device=DEVICE), keep, 4, 4, torch.float32))
    assert pixels.isnan().all(-1).tolist() == [[True, False], [True, False]]
    assert pixels[:, 1].isfinite().all()
    for wrong in (keep[:1], keep[0], keep.int()):  # past whose ends it would read, or whose numbers are cut
        with pytest.raises(ValueError, match='places of patches of 2 images are not'):
            visible_pixels(Pixels(torch.randn(2, 3, 8, 13, device=DEVICE), wrong, 4, 4, torch.float32))


@kernels
def test_kernels_mask_an_autoencoder_as_torch_does(triton):
    model = timm.create_model('mae_vim2_tiny_patch4_32', **SMALL, decoder_dim=32, decoder_depth=1, decoder_heads=1)
    model.to(DEVICE).eval()
    images = torch.randn(3, 3, 32, 32, device=DEVICE)
    with torch.no_grad(), Calls('triton_random_mask') as masks, Calls('triton_visible_pixels') as pixels:
        prediction, mask = model(images)
    assert (masks.count, pixels.count) == (1, 1)
    with torch.no_grad(), use_scan_backend('torch'):
        expected, same = model(images)
    assert torch.equal(mask, same) and torch.allclose(prediction, expected, atol=1e-4)


@pytest.mark.skipif(not GPU, reason='needs an NVIDIA GPU')
def test_one_graph_holds_the_masks_and_pixels():
    noise, images = torch.rand(2, 6, device=DEVICE), torch.randn(2, 3, 8, 12, device=DEVICE)
    weight, bias = torch.randn(7, 3, 4, 4, device=DEVICE), torch.randn(7, device=DEVICE)

    def run(noise, images):
        keep, mask = random_masking(noise, 0.5)
        return embed_patches(images, weight, bias, keep), keep, mask

    torch._dynamo.reset()
    found, expected = torch.compile(run, fullgraph=True)(noise, images), run(noise, images)
    assert torch.allclose(found[0], expected[0], atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(found[1:], expected[1:]))


@kernels
@pytest.mark.parametrize('masked', [False, True])
def test_kernels_do_not_read_what_pads_rows_in_inference(masked, triton, monkeypatch):
    """It is NaN here, where no memory is used that nothing has written."""
    monkeypatch.setattr('vim_timm.layers.bissd._pads_rows', lambda x: True)
    mixer = BiSSD(32, d_state=16, headdim=16, orders='column').to(DEVICE)
    x, keep = torch.randn(2, 6, 32, device=DEVICE), kept_of((3, 4), 6, 2, DEVICE) if masked else None
    layout = Layout((3, 4) if masked else (2, 3), [], keep)
    with torch.no_grad():
        assert mixer._project(x)[..., mixer.in_proj.out_features :].isnan().all()
        found = mixer(x, layout)
    with use_scan_backend('torch'):
        assert error(found, mixer(x, layout)) < 1e-4


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_rows_padded_for_inference_give_the_bits_of_those_for_training(bias, dtype, monkeypatch):
    monkeypatch.setattr('vim_timm.layers.bissd._pads_rows', lambda x: True)
    mixer = BiSSD(24, d_state=8, headdim=8, expand=1)
    if bias:
        mixer.in_proj.bias = torch.nn.Parameter(torch.randn(mixer.in_proj.out_features))
    x = torch.randn(2, 6, 24)
    with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
        expected = mixer._project(x)
        with torch.no_grad():
            found = mixer._project(x)
        assert found.dtype == dtype and found.shape == expected.shape and found.shape[-1] % 8 == 0
        rows = mixer.in_proj.out_features  # what follows holds anything
        assert torch.equal(found[..., :rows], expected[..., :rows])
        with torch.inference_mode():
            mixer(x, Layout((2, 3), [], None))
