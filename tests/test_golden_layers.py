"""Mixers, norms and rotary tables compute the original's numbers."""

import golden_data
import numpy as np
import pytest
import torch
from torch import nn

from vim_timm import use_scan_backend
from vim_timm.layers import BiMamba, get_norm_layer, rope_tables, rotate
from vim_timm.models.vision_mamba import VisionMamba, checkpoint_filter_fn

SCANS = {'v2': 'bidirectional', 'v1': 'shared', 'none': 'forward'}
NORMS = {'rms': 'rmsnorm', 'ln': 'layernorm'}


def close(actual: torch.Tensor, expected: np.ndarray, tolerance: float = 0.0) -> None:
    scale = max(np.abs(expected).max(), 1e-12)
    error = np.abs(actual.detach().double().numpy() - expected).max() / scale
    assert error <= (tolerance or golden_data.tolerance(expected)), error


def double(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).double().requires_grad_()


@pytest.mark.parametrize('backend', ['reference', 'torch'])
@pytest.mark.parametrize('path', golden_data.cases('mixer'), ids=lambda path: path.stem)
def test_mixer(path, backend):
    arrays, meta = golden_data.load(path)
    kwargs = meta['kwargs']
    mixer = BiMamba(
        kwargs['d_model'],
        d_state=kwargs['d_state'],
        scan=SCANS[kwargs['bimamba_type']],
        halve=kwargs['if_divide_out'],
        dtype=torch.float64,
    )
    state = golden_data.split(arrays, 'state')
    mixer.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()}, strict=True)
    x = double(arrays['input'])
    with use_scan_backend(backend):
        output = mixer(x)
        (output * torch.from_numpy(arrays['loss_weights'])).sum().backward()
    close(output, arrays['output'])
    close(x.grad, arrays['grad_input'])
    for name, parameter in mixer.named_parameters():
        close(parameter.grad, arrays[f'grad/{name}'])


ADD_NORM = golden_data.groups('norm/add_norm.npz')


def make_norm(arrays: golden_data.Arrays, meta: dict, dtype: torch.dtype = torch.float64) -> nn.Module:
    norm = get_norm_layer(NORMS[meta['kind']])(len(arrays['weight']), eps=meta['eps'], dtype=dtype)
    names = [name for name in ('weight', 'bias') if name in arrays]
    norm.load_state_dict({name: torch.from_numpy(arrays[name]) for name in names})
    return norm


@pytest.mark.parametrize('case', ADD_NORM)
def test_sum_and_norm(case):
    arrays, meta = ADD_NORM[case]
    norm = make_norm(arrays, meta)
    x = double(arrays['x'])
    residual = double(arrays['residual']) if meta['has_residual'] else None
    stream = x if residual is None else x + residual
    out = norm(stream)
    loss = (out * torch.from_numpy(arrays['grad_out'])).sum()
    close(out, arrays['out'])
    if 'residual_out' in arrays:
        close(stream, arrays['residual_out'])
        loss = loss + (stream * torch.from_numpy(arrays['grad_residual_out'])).sum()
    loss.backward()
    close(x.grad, arrays['grad_x'])
    if residual is not None:
        close(residual.grad, arrays['grad_residual'])
    for name, parameter in norm.named_parameters():
        close(parameter.grad, arrays[f'grad_{name}'])


def test_chain_of_blocks_is_the_originals_pair_of_hidden_and_residual():
    arrays, meta = golden_data.load(golden_data.root() / 'norm' / 'residual_chain.npz')
    x = double(arrays['embedding'])
    for i in range(meta['n_blocks']):
        norm = make_norm({'weight': arrays[f'norm_weight/{i}']}, meta)
        close(x, arrays[f'residual/{i}'])
        close(norm(x), arrays[f'mixer_input/{i}'])
        x = x + torch.from_numpy(arrays[f'mixer_output/{i}'])
    close(make_norm({'weight': arrays['norm_f_weight']}, meta)(x), arrays['final'])


ROPE = golden_data.groups('rope.npz')


@pytest.mark.parametrize('case', ROPE)
def test_rotary_tables_and_rotation(case):
    arrays, meta = ROPE[case]
    grid = (meta['ft_seq_len'], meta['ft_seq_len'])
    for name, num_before in (('plain', 0), ('with_first', 1)):
        tokens = meta['tokens'] + num_before
        cos, sin = rope_tables(grid, meta['width'], meta['pt_seq_len'], num_before, tokens, torch.device('cpu'))
        close(cos[num_before:], arrays['freqs_cos'], 1e-6)
        close(sin[num_before:], arrays['freqs_sin'], 1e-6)
        if f'{name}_x' in arrays:
            close(rotate(double(arrays[f'{name}_x']), cos, sin), arrays[f'{name}_out'], 1e-6)


POS_EMBED = golden_data.groups('pos_embed_interpolation.npz')


@pytest.mark.parametrize('case', POS_EMBED)
def test_position_embedding_of_another_grid(case):
    arrays, meta = POS_EMBED[case]
    model = VisionMamba(
        img_size=meta['new_grid'] * 4,
        patch_size=4,
        embed_dim=meta['dim'],
        depth=1,
        num_classes=0,
        class_token='head' if meta['num_extra_tokens'] else 'none',
        global_pool='',
        dtype=torch.float64,
    )
    state_dict = model.state_dict() | {'pos_embed': torch.from_numpy(arrays['pos_embed']).double()}
    close(checkpoint_filter_fn(state_dict, model)['pos_embed'], arrays['out'])
