"""Original checkpoint files become our models and files: whole, safely, or not at all."""

import argparse
import math
import os
import pickle
from inspect import signature

import golden_data
import pytest
import timm
import torch
from processes import Python, finish
from safetensors import safe_open

import vim_timm  # noqa: F401  registers the models
from vim_timm.hub import from_original, load_original_file
from vim_timm.hub.convert import _image_and_stride, convert, find_architecture, infer_arguments, main
from vim_timm.models.checkpoint import CheckpointError

MIDCLS = 'bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2'
TINY = f'vim_tiny_patch16_224_{MIDCLS}'
SMALL = dict(img_size=32, patch_size=8, stride=8, embed_dim=24, depth=2, num_classes=10)


def original_weights(**kwargs) -> dict[str, torch.Tensor]:
    """Random weights under the original's names for the published tiny model, cut down to `depth` blocks."""
    shapes = golden_data.load_json(f'state_dicts/head/{TINY}.json')['state_dict']
    depth = kwargs.get('depth', 24)
    generator = torch.Generator().manual_seed(kwargs.get('seed', 0))
    return {
        name: torch.randn(shape, generator=generator) * 0.02
        for name, shape in shapes.items()
        if not name.startswith('layers.') or int(name.split('.')[1]) < depth
    }


def golden(name: str) -> tuple[dict[str, torch.Tensor], dict]:
    arrays, meta = golden_data.load(golden_data.root() / 'models' / f'{name}.npz')
    state_dict = {key: torch.from_numpy(value) for key, value in golden_data.split(arrays, 'state').items()}
    return state_dict, golden_data.original_kwargs(meta)


@pytest.fixture(scope='module')
def deit_file(tmp_path_factory):
    """A training checkpoint as the original writes it, with other weights in `model_ema`."""
    path = tmp_path_factory.mktemp('original') / 'checkpoint.pth'
    content = {
        'model': original_weights(seed=1),
        'model_ema': original_weights(seed=2),
        'optimizer': {'state': {}, 'param_groups': [{'lr': 1e-3}]},
        'lr_scheduler': {},
        'epoch': 299,
        'scaler': 'none',
        'args': argparse.Namespace(model=TINY, input_size=224, lr=5e-4),
    }
    torch.save(content, path)
    return path


class TestFromOriginal:
    @pytest.mark.parametrize('kwargs, word', [
        (dict(flip_img_sequences_ratio=0.5), 'flip_img_sequences_ratio'),
        (dict(if_bidirectional=True), 'if_bidirectional'),
        (dict(final_pool_type='max'), 'final_pool_type'),
        (dict(final_pool_type='all', if_cls_token=False), 'final_pool_type'),
        (dict(final_pool_type='median', if_cls_token=False), 'final_pool_type'),
        (dict(bimamba_type='v3'), 'bimamba_type'),
        (dict(ssm_cfg=dict(use_fast_path=False)), 'use_fast_path'),
    ])  # fmt: skip
    def test_modes_that_are_not_carried_along_are_refused_by_name(self, kwargs, word):
        with pytest.raises(ValueError, match=word):
            from_original({}, **SMALL, **kwargs)

    def test_unknown_arguments_are_type_errors(self):
        with pytest.raises(TypeError, match='no_such_argument'):
            from_original({}, **SMALL, no_such_argument=1)
        with pytest.raises(TypeError, match='no_such_key'):
            from_original({}, **SMALL, ssm_cfg=dict(no_such_key=1))

    def test_the_misspelt_flag_of_the_base_model_passes_only_where_it_changes_nothing(self):
        state_dict, kwargs = golden('midcls_odd_patches')
        assert kwargs['if_divide_out']
        from_original(state_dict, **kwargs, if_devide_out=True)
        with pytest.raises(TypeError, match='pass if_divide_out'):
            from_original(state_dict, **kwargs, if_devide_out=False)

    def test_stride_is_16_unless_told_otherwise(self):
        state_dict = original_weights(depth=1)
        assert from_original(state_dict, depth=1).patch_embed.stride == (16, 16)
        state_dict['patch_embed.proj.weight'] = torch.zeros(192, 3, 4, 4)
        state_dict['pos_embed'] = torch.zeros(1, 5, 192)
        model = from_original(state_dict, depth=1, patch_size=4, img_size=32)
        assert model.patch_embed.grid_size == (2, 2)
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)

    @pytest.mark.parametrize('change, word', [
        (lambda s: s.pop('norm_f.weight'), 'norm.weight'),
        (lambda s: s.update(extra=torch.zeros(1)), 'extra'),
        (lambda s: s.update({'head.weight': torch.zeros(7, 24), 'head.bias': torch.zeros(7)}), 'head'),
        (lambda s: s.update(pos_embed=torch.zeros(1, 26, 24)), 'pos_embed'),
        (lambda s: s.update({'rope.freqs_cos': torch.zeros(9, 24)}), 'if_rope=True'),
        (lambda s: s.update({'layers.1.mixer.x_proj.weight': torch.zeros(3, 3)}), 'x_proj'),
    ])  # fmt: skip
    def test_loading_is_strict(self, change, word):
        state_dict, kwargs = golden('midcls_odd_patches')
        change(state_dict)
        with pytest.raises(ValueError, match=word):
            from_original(state_dict, **kwargs)

    def test_rope_checkpoints_need_rope(self):
        state_dict, kwargs = golden('rope_midcls')
        del state_dict['rope.freqs_sin']
        with pytest.raises(ValueError, match='rope.freqs_sin'):
            from_original(state_dict, **kwargs)

    def test_of_another_family(self):
        with pytest.raises(ValueError):
            from_original(timm.create_model('vit_tiny_patch16_224').state_dict())


class TestFiles:
    def test_model_is_preferred_to_its_ema(self, deit_file):
        assert torch.equal(load_original_file(deit_file)['head.weight'], original_weights(seed=1)['head.weight'])
        ema = load_original_file(deit_file, use_ema=True)
        assert torch.equal(ema['head.weight'], original_weights(seed=2)['head.weight'])

    def test_ema_that_is_not_there_is_an_error(self, tmp_path):
        torch.save({'model': original_weights(depth=1)}, tmp_path / 'a.pth')
        with pytest.raises(ValueError, match='model_ema'):
            load_original_file(tmp_path / 'a.pth', use_ema=True)

    def test_bare_state_dicts_load(self, tmp_path):
        weights = original_weights(depth=1)
        torch.save(weights, tmp_path / 'a.pth')
        assert load_original_file(tmp_path / 'a.pth').keys() == weights.keys()

    def test_files_without_weights_are_errors(self, tmp_path):
        torch.save({'epoch': 3}, tmp_path / 'a.pth')
        with pytest.raises(ValueError, match='a.pth'):
            load_original_file(tmp_path / 'a.pth')


class TestConvert:
    @pytest.mark.parametrize('use_ema', [False, True])
    def test_training_file_becomes_safetensors_that_timm_loads(self, deit_file, tmp_path, use_ema):
        path = tmp_path / 'out.safetensors'
        convert(deit_file, path, use_ema=use_ema)
        with safe_open(path, 'pt') as file:
            metadata = file.metadata()
        assert metadata['architecture'] == 'vim_tiny_patch16_224'
        assert metadata['weights'] == ('model_ema' if use_ema else 'model')
        model = timm.create_model('vim_tiny_patch16_224', pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))
        original = original_weights(seed=2 if use_ema else 1)
        assert torch.equal(model.head.weight, original['head.weight'])
        assert torch.equal(model.pos_embed[:, 0], original['pos_embed'][:, 98])  # the class token's row
        assert torch.equal(model.pos_embed[:, 1:99], original['pos_embed'][:, :98])
        assert torch.equal(model.blocks[23].mixer.A_b_log, original['layers.23.mixer.A_b_log'])

    @pytest.mark.parametrize('name', [path.stem for path in golden_data.cases('models')])
    def test_arguments_are_inferred_from_shapes(self, name):
        state_dict, kwargs = golden(name)
        if isinstance(kwargs['img_size'], list) or not kwargs['if_abs_pos_embed']:
            with pytest.raises(ValueError, match='name the model'):
                infer_arguments(state_dict)  # shapes do not tell the size of the image
            return
        inferred = infer_arguments(state_dict)
        for key in ('patch_size', 'depth', 'embed_dim', 'd_state', 'channels', 'num_classes', 'rms_norm',
                    'if_abs_pos_embed', 'if_rope', 'if_cls_token', 'use_double_cls_token'):  # fmt: skip
            assert inferred[key] == kwargs.get(key, signature(from_original).parameters[key].default), key
        inferred |= {'img_size': kwargs['img_size'], 'stride': kwargs['stride']}  # these goldens are no published size
        assert from_original(state_dict, **inferred) is not None

    @pytest.mark.parametrize('name', [
        'vim_tiny_patch16_224', 'vim_tiny_patch16_stride8_224', 'vim_tiny_patch16_384',
        'vim_tiny_patch16_rope_ape_gap_224', 'vim_tiny_patch16_rope_ape_224', 'vim_tiny_patch8_rope_ape_gap_224',
    ])  # fmt: skip
    def test_published_architectures_are_recognised(self, name):
        kwargs = dict(
            vim_tiny_patch16_224={},
            vim_tiny_patch16_stride8_224=dict(stride=8),
            vim_tiny_patch16_384=dict(img_size=384),
        ).get(name)
        if kwargs is None:
            head = 'gap' not in name
            kwargs = dict(if_rope=True, if_rope_residual=True, if_divide_out=False, use_middle_cls_token=False,
                          if_cls_token=head, final_pool_type='mean')  # fmt: skip
            kwargs |= dict(patch_size=8, stride=8) if 'patch8' in name else {}
        state_dict = meta_weights(**kwargs)
        assert infer_arguments(state_dict)['img_size'] == kwargs.get('img_size', 224)
        model = from_original(state_dict, **infer_arguments(state_dict), device='meta')
        assert find_architecture(model) == name

    def test_named_architecture_wins(self, tmp_path):
        torch.save(original_weights(), tmp_path / 'in.pth')
        convert(tmp_path / 'in.pth', tmp_path / 'out.safetensors', name=TINY)
        with safe_open(tmp_path / 'out.safetensors', 'pt') as file:
            assert file.metadata()['architecture'] == 'vim_tiny_patch16_224'

    def test_a_checkpoint_is_not_written_over(self, tmp_path):
        torch.save(original_weights(), tmp_path / 'in.pth')
        before = (tmp_path / 'in.pth').read_bytes()
        (tmp_path / 'link.pth').symlink_to('in.pth')
        for destination in ('in.pth', 'link.pth'):
            with pytest.raises(CheckpointError, match=f'{destination} is the checkpoint itself'):
                convert(tmp_path / 'in.pth', tmp_path / destination, name=TINY)
        assert (tmp_path / 'in.pth').read_bytes() == before and (tmp_path / 'link.pth').is_symlink()

    def test_converting_never_resamples(self, tmp_path):
        torch.save(original_weights(), tmp_path / 'in.pth')
        with pytest.raises(ValueError, match='pos_embed'):
            convert(tmp_path / 'in.pth', tmp_path / 'out.safetensors', name='vim_tiny_patch16_384')


def meta_weights(**kwargs) -> dict[str, torch.Tensor]:
    """Shapes of the original's tiny model under other arguments."""
    shapes = {name: list(value.shape) for name, value in original_weights().items()}
    patch, stride, size = kwargs.get('patch_size', 16), kwargs.get('stride', 16), kwargs.get('img_size', 224)
    num_patches = ((size - patch) // stride + 1) ** 2
    shapes['patch_embed.proj.weight'][2:] = [patch, patch]
    shapes['pos_embed'][1] = num_patches + kwargs.get('if_cls_token', True)
    if not kwargs.get('if_cls_token', True):
        del shapes['cls_token']
    if kwargs.get('if_rope'):
        shapes |= {'rope.freqs_cos': [num_patches, 192], 'rope.freqs_sin': [num_patches, 192]}
    return {name: torch.empty(shape, device='meta') for name, shape in shapes.items()}


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ('executed',)


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
class TestBadInput:
    """One sentence, exit status not 0, nothing written, nothing executed."""

    def check(self, argv, word, tmp_path, capsys, monkeypatch):
        monkeypatch.chdir(tmp_path)
        before = sorted(os.listdir(tmp_path))
        assert main([str(word_) for word_ in argv]) != 0
        error = capsys.readouterr().err.strip()
        assert word in error and len(error.splitlines()) == 1, error
        assert sorted(os.listdir(tmp_path)) == before

    @pytest.fixture(autouse=True)
    def _here(self, tmp_path, capsys, monkeypatch):
        self.refused = lambda argv, word: self.check(argv, word, tmp_path, capsys, monkeypatch)
        self.folder = tmp_path

    def test_missing_file(self):
        self.refused(['no.pth', 'out.safetensors'], 'no.pth')

    def test_truncated_file(self, deit_file):
        (self.folder / 'in.pth').write_bytes(deit_file.read_bytes()[:100_000])
        self.refused(['in.pth', 'out.safetensors'], 'in.pth')

    def test_not_a_checkpoint(self):
        (self.folder / 'in.pth').write_text('hello')
        self.refused(['in.pth', 'out.safetensors'], 'in.pth')

    @pytest.mark.parametrize('protocol', [2, 4])
    def test_pickle_that_runs_code(self, protocol):
        (self.folder / 'in.pth').write_bytes(pickle.dumps({'model': RunsCode()}, protocol))
        self.refused(['in.pth', 'out.safetensors'], 'in.pth')

    def test_torch_file_that_runs_code(self):
        torch.save({'model': RunsCode()}, self.folder / 'in.pth')
        self.refused(['in.pth', 'out.safetensors'], 'run code')

    def test_another_family(self):
        torch.save({'model': timm.create_model('vit_tiny_patch16_224', num_classes=2).state_dict()},
                   self.folder / 'in.pth')  # fmt: skip
        self.refused(['in.pth', 'out.safetensors'], 'Vim')
        self.refused(['in.pth', 'out.safetensors', '--model', 'vim_tiny'], 'does not fit')

    def test_names_of_this_package(self):
        model = timm.create_model('vim_nano_patch4_32')
        torch.save(model.state_dict(), self.folder / 'in.pth')
        self.refused(['in.pth', 'out.safetensors'], 'already: name its model')
        convert(self.folder / 'in.pth', self.folder / 'out.safetensors', 'vim_nano_patch4_32')

    def test_unknown_model(self, deit_file):
        self.refused([deit_file, 'out.safetensors', '--model', 'vim_huge'], 'vim_huge')
        self.refused([deit_file, 'out.safetensors', '--model', 'vit_tiny_patch16_224'], 'not a Vim')

    def test_other_model(self, deit_file):
        self.refused([deit_file, 'out.safetensors', '--model', 'vim_small'], 'model')

    def test_no_folder_to_write_into(self, deit_file):
        self.refused([deit_file, 'no/out.safetensors'], 'no')

    def test_output_that_is_no_safetensors(self, deit_file):
        self.refused([deit_file, 'out.pth'], 'safetensors')


def test_command_line(deit_file, tmp_path):
    path = tmp_path / 'out.safetensors'
    code = "import runpy; runpy.run_module('vim_timm.hub.convert', run_name='__main__')"
    said = finish([Python(code, str(deit_file), str(path), output=tmp_path / 'said')])
    assert '7,148,008 parameters' in said
    assert sorted(os.listdir(tmp_path)) == ['out.safetensors', 'said']


@pytest.mark.parametrize('patches', [16, 28 * 28])
def test_patches_of_one_pixel_have_a_stride(patches):
    assert _image_and_stride(patches, 1) == (math.isqrt(patches), 1)
