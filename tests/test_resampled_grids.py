"""A checkpoint's position embedding is resampled from the grid that its own settings name, whatever its number says."""

import pytest
import safetensors.torch
import timm
import torch

import vim_timm  # noqa: F401  registers the models
from vim_timm.engine.saved import open_saved
from vim_timm.errors import UserError
from vim_timm.layers.pos_embed import resample_pos_embed
from vim_timm.models.load import load_content

SMALL = dict(embed_dim=32, depth=1, num_classes=10)
VIM2 = dict(headdim=16, d_state=16)
MODELS = {
    'vim': ('vim_nano_patch4_32', {}),
    'class tokens at both ends': ('vim_nano_patch4_32', dict(class_token='double')),
    'vim2': ('vim2_nano_patch4_32', VIM2),
    'vim2 with a stem of convolutions': ('vim2_nano_patch4_32', dict(VIM2, stem='conv')),
    'vim2_mnist': ('vim2_mnist', dict(VIM2, in_chans=3, patch_size=4)),
    'hybrid': ('vim_hybrid_tiny_patch4_32', {}),
}
# 64 patches each, which are also 8 x 8
LONG, LONG_GRID = (16, 64), (4, 16)


def save(path, name, recorded, **kwargs):
    """A checkpoint of a model, as train.py writes it; returns its position embedding."""
    torch.manual_seed(1)
    model = timm.create_model(name, **SMALL, **kwargs)
    torch.save({'state_dict': model.state_dict(), 'args': {'model': name, **recorded}}, path)
    return model.pos_embed.detach(), model.num_prefix_tokens


def loaded(path, name, **kwargs):
    """The position embedding that a model gets from the file, by timm and by the commands."""
    overlay = dict(file=str(path), num_classes=10)
    by_timm = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **SMALL, **kwargs)
    ours = timm.create_model(name, **SMALL, **kwargs)
    load_content(ours, torch.load(path, weights_only=True))
    assert torch.equal(ours.pos_embed, by_timm.pos_embed)
    return ours.pos_embed.detach()


@pytest.mark.parametrize('recorded', [
    dict(img_size=LONG), dict(model_kwargs=dict(img_size=list(LONG))), dict(input_size=(3, *LONG), img_size=32),
], ids=str)  # fmt: skip
@pytest.mark.parametrize('kind', MODELS)
def test_a_long_grid_with_a_square_number_of_patches(kind, recorded, tmp_path):
    name, kwargs = MODELS[kind]
    recorded = dict(recorded, model_kwargs={**kwargs, **recorded.get('model_kwargs', {})})
    positions, prefix = save(tmp_path / 'a.pth', name, recorded, **kwargs, img_size=LONG)
    found = loaded(tmp_path / 'a.pth', name, **kwargs, img_size=32)
    assert torch.equal(found, resample_pos_embed(positions, [8, 8], list(LONG_GRID), prefix))
    assert not torch.equal(found, positions)


@pytest.mark.parametrize('kind', MODELS)
def test_the_default_size_of_the_model_that_the_settings_name(kind, tmp_path):
    name, kwargs = MODELS[kind]
    size = timm.get_pretrained_cfg(name).input_size[1]
    side = size // 4
    positions, prefix = save(tmp_path / 'a.pth', name, dict(model_kwargs=kwargs), **kwargs, img_size=size)
    found = loaded(tmp_path / 'a.pth', name, **kwargs, img_size=(4, 4 * side * side))
    assert torch.equal(found, resample_pos_embed(positions, [1, side * side], [side, side], prefix))


@pytest.mark.parametrize('kind', ['vim', 'vim2', 'hybrid'])
def test_another_patch_size(kind, tmp_path):
    name, kwargs = MODELS[kind]
    size, recorded = (32, 128), dict(img_size=(32, 128), model_kwargs=dict(kwargs, patch_size=8))
    positions, prefix = save(tmp_path / 'a.pth', name, recorded, **kwargs, img_size=size, patch_size=8)
    found = loaded(tmp_path / 'a.pth', name, **kwargs, img_size=32, patch_size=4)
    assert torch.equal(found, resample_pos_embed(positions, [8, 8], list(LONG_GRID), prefix))
    found = loaded(tmp_path / 'a.pth', name, **kwargs, img_size=32, patch_size=16)
    assert torch.equal(found, resample_pos_embed(positions, [2, 2], list(LONG_GRID), prefix))


@pytest.mark.parametrize('recorded', [dict(), dict(model_kwargs=dict(stride=8))], ids=['by name', 'by argument'])
@pytest.mark.parametrize('target', ['vim_tiny_patch16_224', 'vim_tiny_patch16_stride8_224'])
def test_patches_that_overlap(target, recorded, tmp_path):
    size = (40, 136)  # 4 x 16 patches of 16 in steps of 8
    source = 'vim_tiny_patch16_224' if recorded else 'vim_tiny_patch16_stride8_224'
    recorded = dict(recorded, img_size=size)
    positions, prefix = save(tmp_path / 'a.pth', source, recorded, img_size=size, stride=8)
    found = loaded(tmp_path / 'a.pth', target, img_size=128)
    side = 15 if 'stride8' in target else 8
    assert torch.equal(found, resample_pos_embed(positions, [side, side], list(LONG_GRID), prefix))


@pytest.mark.parametrize('kind', MODELS)
def test_a_file_without_settings_is_taken_for_the_models_own_grid(kind, tmp_path):
    name, kwargs = MODELS[kind]
    torch.manual_seed(1)
    model = timm.create_model(name, **SMALL, **kwargs, img_size=LONG)
    safetensors.torch.save_file(model.state_dict(), tmp_path / 'a.safetensors')
    overlay = dict(file=str(tmp_path / 'a.safetensors'), num_classes=10)
    again = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, **SMALL, **kwargs, img_size=LONG
    )  # fmt: skip
    assert torch.equal(again.pos_embed, model.pos_embed)


@pytest.mark.parametrize('size, grid', [(LONG, LONG_GRID), ((16, 40), (4, 10))])
def test_learned_positions_of_a_decoder(size, grid, tmp_path):
    small = dict(embed_dim=32, depth=1, decoder_depth=1, decoder_dim=32, decoder_heads=2, decoder_pos_embed='learned')
    torch.manual_seed(1)
    model = timm.create_model('mae_vim_tiny_patch4_32', **small, img_size=size)
    content = {
        'state_dict': model.encoder.state_dict(),
        'task_state': {'decoder': model.decoder.state_dict()},
        'args': dict(model='mae_vim_tiny_patch4_32', img_size=size),
    }
    found = timm.create_model('mae_vim_tiny_patch4_32', **small)
    load_content(found, content)
    for positions, target, prefix in (
        (model.decoder.pos_embed, found.decoder.pos_embed, 0),
        (model.encoder.pos_embed, found.encoder.pos_embed, 1),
    ):
        assert torch.equal(target, resample_pos_embed(positions, [8, 8], list(grid), prefix))


def test_weights_that_tell_their_size_are_opened_at_it(tmp_path):
    path, model = str(tmp_path / 'w.safetensors'), timm.create_model('vim_nano_patch4_32', img_size=LONG)
    safetensors.torch.save_file(model.state_dict(), path, {'input_size': '[3, 16, 64]'})
    saved = open_saved(path, 'vim_nano_patch4_32')
    assert saved.model.patch_embed.img_size == LONG and saved.data_config['input_size'] == (3, *LONG)
    assert torch.equal(saved.model.pos_embed, model.pos_embed)


@pytest.mark.parametrize('size', ['[3, 16', '[3, 16, 1e9]', '{}', '[' * 100_000, '"x"'])
def test_metadata_that_are_no_size_are_refused(size, tmp_path):
    path, model = str(tmp_path / 'w.safetensors'), timm.create_model('vim_nano_patch4_32')
    safetensors.torch.save_file(model.state_dict(), path, {'input_size': size})
    with pytest.raises(UserError, match='input_size'):
        open_saved(path, 'vim_nano_patch4_32')
