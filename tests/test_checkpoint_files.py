"""Files that a user hands to the models: the right weights are loaded, anything else is refused in one sentence."""

import argparse
import itertools
import os
import re
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from safetensors import SafetensorError, safe_open

from vim_timm import VisionMamba
from vim_timm.models.checkpoint import CheckpointError, load_weights, read_checkpoint, write_safetensors
from vim_timm.models.load import load_content
from vim_timm.models.vision_mamba import checkpoint_filter_fn

SIZES = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_classes=10)


def build(**kwargs) -> VisionMamba:
    return timm.create_model('test_vim', **{**SIZES, **kwargs})


def from_file(path: Path, **kwargs) -> VisionMamba:
    """The model with a file's weights, as timm's scripts build it."""
    return build(pretrained=True, pretrained_cfg_overlay=dict(file=str(path), num_classes=10), **kwargs)


def weights(seed: int, **kwargs) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return build(**kwargs).state_dict()


def original_names(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our names -> the original's; the position embedding's rows are then taken to be in the original's order."""
    return {re.sub(r'^norm\.', 'norm_f.', re.sub(r'^blocks\.', 'layers.', k)): v for k, v in state_dict.items()}


@pytest.fixture
def deit_file(tmp_path) -> Path:
    """A training checkpoint as the original writes it."""
    path = tmp_path / 'checkpoint.pth'
    torch.save({
        'model': original_names(weights(1)),
        'model_ema': original_names(weights(2)),
        'optimizer': {'state': {0: {'step': 1.0, 'exp_avg': torch.zeros(2)}}, 'param_groups': [{'lr': 1e-3}]},
        'epoch': 299,
        'args': argparse.Namespace(model='vim', lr=5e-4),
    }, path)  # fmt: skip
    return path


def test_a_training_checkpoint_gives_model_by_every_route(deit_file):
    expected = weights(1)
    name = 'blocks.1.mixer.in_proj.weight'
    assert torch.equal(load_weights(deit_file)['layers.1.mixer.in_proj.weight'], expected[name])
    assert torch.equal(load_weights(deit_file, use_ema=True)['layers.1.mixer.in_proj.weight'], weights(2)[name])
    model = from_file(deit_file)
    assert torch.equal(model.state_dict()[name], expected[name])
    # the middle row is the class token's
    assert torch.equal(model.pos_embed[:, 0], expected['pos_embed'][:, 8])


def test_a_native_file_loads_unchanged(tmp_path):
    expected = weights(3)
    torch.save({'state_dict': expected}, tmp_path / 'last.pth.tar')
    safetensors.torch.save_file(expected, tmp_path / 'model.safetensors')
    for name in ('last.pth.tar', 'model.safetensors'):
        for key, value in from_file(tmp_path / name).state_dict().items():
            assert torch.equal(value, expected[key]), (name, key)


def test_a_file_of_weights_is_pytorchs_and_the_same_bytes_every_time(tmp_path):
    """safetensors itself writes several entries of metadata in an order that changes."""
    path, metadata, written = tmp_path / 'w.safetensors', {'input_size': '[3, 8, 8]', 'naïve': 'é', 'a': ''}, set()
    for _ in range(10):
        write_safetensors(weights(0), path, metadata)
        written.add(path.read_bytes())
    assert len(written) == 1
    with safe_open(path, 'pt') as file:
        assert file.metadata() == {'format': 'pt', **metadata}
    found = safetensors.torch.load_file(path)
    assert found.keys() == weights(0).keys() and all(torch.equal(found[name], x) for name, x in weights(0).items())


def test_weights_that_a_disk_cannot_hold_leave_the_file_as_it_was(monkeypatch, tmp_path):
    def save_file(*arguments):
        raise SafetensorError('Error while serializing: I/O error: No space left on device (os error 28)')

    (tmp_path / 'w.safetensors').write_text('before')
    monkeypatch.setattr(safetensors.torch, 'save_file', save_file)
    with pytest.raises(OSError, match='No space left .*w.safetensors'):
        write_safetensors(weights(0), tmp_path / 'w.safetensors', {})
    assert [path.read_text() for path in tmp_path.iterdir()] == ['before']


@pytest.mark.parametrize('name', ['vim_nano_patch4_32', 'vim2_mnist', 'test_vit', 'deit_tiny_distilled_patch16_224'])
def test_an_encoder_in_a_model_with_a_classifier_says_how_to_start_from_it(name):
    encoder, model = (timm.create_model(name, num_classes=classes) for classes in (0, 4))
    assert 'an encoder without a classifier' in refusal(load_content, model, encoder.state_dict())
    load_content(encoder, encoder.state_dict())


def test_a_headless_encoder_and_another_class_count_load(tmp_path, deit_file):
    expected = {name: value for name, value in weights(4).items() if not name.startswith('head.')}
    model = build()
    assert checkpoint_filter_fn(expected, model).keys() == expected.keys()
    torch.save(expected, tmp_path / 'encoder.pth')
    encoder = from_file(tmp_path / 'encoder.pth', num_classes=0)
    assert all(torch.equal(value, expected[name]) for name, value in encoder.state_dict().items())
    finetuned = from_file(deit_file, num_classes=3)
    assert finetuned.head.weight.shape == (3, 32)
    assert torch.equal(finetuned.norm.weight, weights(1)['norm.weight'])


def test_other_image_patch_and_channel_counts_are_adapted(deit_file):
    assert from_file(deit_file, img_size=(48, 64)).pos_embed.shape == (1, 6 * 8 + 1, 32)
    assert from_file(deit_file, patch_size=4).patch_embed.proj.weight.shape == (32, 3, 4, 4)
    gray = from_file(deit_file, in_chans=1)
    torch.testing.assert_close(gray.patch_embed.proj.weight, weights(1)['patch_embed.proj.weight'].sum(1, keepdim=True))


def refusal(function, *args, **kwargs) -> str:
    """The message of the CheckpointError that the call raises, checked to be a single sentence."""
    with pytest.raises(CheckpointError) as error:
        function(*args, **kwargs)
    text = str(error.value)
    assert '\n' not in text and not re.search(r'\. [A-Z]', text)
    return text


class RunsCode:
    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path):
    path, trace = tmp_path / 'evil.pth', tmp_path / 'executed'
    for legacy in (False, True):
        content = {'model': weights(0), 'args': RunsCode(trace)}
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        for read in (read_checkpoint, load_weights, from_file):
            assert 'run code' in refusal(read, path)
            assert not trace.exists()


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('share', [0.0, 0.3, 0.99])
def test_a_truncated_file_is_said_to_be_truncated(tmp_path, suffix, share):
    path = tmp_path / f'model{suffix}'
    if suffix == '.pth':
        torch.save(weights(0), path)
    else:
        safetensors.torch.save_file(weights(0), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    for read in (read_checkpoint, from_file):
        text = refusal(read, path)
        assert str(path) in text and 'truncated' in text


def test_what_is_no_checkpoint_is_refused(tmp_path):
    assert 'no checkpoint at' in refusal(read_checkpoint, tmp_path / 'missing.pth')
    (tmp_path / 'text.pth').write_text('accuracy: 99\n')
    assert 'text.pth' in refusal(read_checkpoint, tmp_path / 'text.pth')
    torch.save([torch.zeros(1)], tmp_path / 'list.pth')
    assert 'list' in refusal(read_checkpoint, tmp_path / 'list.pth')
    torch.save({'model': weights(0)}, tmp_path / 'plain.pth')
    assert 'moving average' in refusal(load_weights, tmp_path / 'plain.pth', use_ema=True)


def shared_scan_weights() -> dict[str, torch.Tensor]:
    return weights(0, scan='shared')


def names_of(*names: str):
    return lambda: {name: torch.zeros(1) for name in names}


FOREIGN = {
    'vision transformer': lambda: timm.create_model('test_vit').state_dict(),
    'ResNet': lambda: timm.create_model('test_resnet').state_dict(),
    'ConvNeXt': lambda: timm.create_model('test_convnext').state_dict(),
    'MambaVision': names_of('levels.2.blocks.0.mixer.in_proj.weight', 'patch_embed.proj.weight'),
    'VMamba': names_of('layers.0.blocks.0.op.x_proj_weight'),
    'Mamba language model': names_of('backbone.layers.0.mixer.A_log', 'backbone.embedding.weight'),
    'Mamba-2': names_of('layers.0.mixer.dt_bias', 'layers.0.mixer.A_log'),
    'shared projections': shared_scan_weights,
    'unidirectional': lambda: weights(0, scan='forward'),
}


@pytest.mark.parametrize('family', FOREIGN)
def test_another_family_is_named(family, tmp_path):
    state_dict = FOREIGN[family]()
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert family in refusal(checkpoint_filter_fn, state_dict, model)
    torch.save({'model': state_dict}, tmp_path / 'foreign.pth')
    # also with another number of classes, where timm itself would load without looking
    for num_classes in (10, 3):
        assert family in refusal(from_file, tmp_path / 'foreign.pth', num_classes=num_classes)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# words for each family of ours, and models of it
OURS = {
    'a Vision Mamba with bidirectional scans (v2)': [('vim_nano_patch4_32', {})],
    'a Vision Mamba with shared projections (v1)': [('vim_nano_patch4_32', dict(scan='shared'))],
    'a unidirectional Mamba': [('vim_nano_patch4_32', dict(scan='forward'))],
    'a Vision Mamba 2 (vim2)': [
        ('vim2_nano_patch4_32', {}),
        ('vim2_mnist', dict(in_chans=3, conv='none', class_token='middle')),
    ],
    'a hybrid of a state space and attention (vim_hybrid)': [
        ('vim_hybrid_tiny_patch4_32', {}),
        ('vim_hybrid_tiny_patch4_32', dict(ssm='mamba', attn_blocks=(1,))),
    ],
    'a factorized vision transformer (favit)': [('favit_small_patch16_224', dict(img_size=32))],
    'a masked autoencoder with its decoder (mae)': [
        ('mae_vim_tiny_patch4_32', {}),
        ('mae_vim_hybrid_small_patch16_224', dict(img_size=32, decoder='vim')),
    ],
}


@pytest.mark.parametrize('theirs, ours', list(itertools.permutations(OURS, 2)))
def test_each_family_of_ours_is_named_to_each_other(theirs, ours):
    sources, models = (
        [timm.create_model(name, depth=2, device='meta', **kwargs) for name, kwargs in OURS[words]]
        for words in (theirs, ours)
    )
    for source, model in itertools.product(sources, models):
        text = refusal(load_content, model, {'state_dict': source.state_dict()})
        assert theirs in text and (ours in text or 'encoder without its decoder' in text)


def test_another_size_of_the_family_is_refused(tmp_path):
    torch.save(weights(0, embed_dim=64), tmp_path / 'wide.pth')
    assert 'another size' in refusal(from_file, tmp_path / 'wide.pth')
    torch.save(weights(0, depth=3), tmp_path / 'deep.pth')
    assert 'blocks.2' in refusal(from_file, tmp_path / 'deep.pth')
    torch.save(weights(0, depth=1), tmp_path / 'flat.pth')
    assert 'blocks.1' in refusal(from_file, tmp_path / 'flat.pth')
