"""Hybrid blocks mix their branches as they say, on any kernel of attention."""

import pytest
import timm
import torch
import torch.nn as nn
from timm.layers import set_fused_attn

import vim_timm  # noqa: F401  registers the models
from vim_timm.layers import attention
from vim_timm.layers.attention import Attention, attention_kernels, use_attention_kernel
from vim_timm.layers.hybrid import Hybrid
from vim_timm.layers.token_order import Layout

SMALL = dict(img_size=16, embed_dim=32, depth=4, num_heads=2, num_classes=5)


def small(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('vim_hybrid_tiny_patch4_32', **{**SMALL, **kwargs})


def test_attention_is_timms():
    ours, theirs = (cls(32, num_heads=2, qkv_bias=True) for cls in (Attention, timm.layers.Attention))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 7, 32)
    torch.testing.assert_close(ours(x), theirs(x))


def test_unfused_attention_is_the_same():
    x = torch.randn(2, 7, 32)
    module = Attention(32, num_heads=2)
    set_fused_attn(False)
    try:
        plain = Attention(32, num_heads=2)
    finally:
        set_fused_attn(True)
    plain.load_state_dict(module.state_dict())
    assert not plain.fused_attn
    torch.testing.assert_close(plain(x), module(x))


@pytest.mark.parametrize('name', [name for name, reason in attention_kernels('cpu') if not reason])
def test_kernels_agree(name):
    x = torch.randn(2, 9, 32, requires_grad=True)
    module = Attention(32, num_heads=2)
    expected = module(x)
    gradient = torch.autograd.grad(expected.square().sum(), x)[0]
    with use_attention_kernel(name):
        found = module(x)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found.square().sum(), x)[0], gradient, rtol=1e-4, atol=1e-5)


def test_a_kernel_that_cannot_run_says_so():
    reasons = dict(attention_kernels('cpu'))
    assert reasons['efficient'].startswith("attention kernel 'efficient' cannot run on")
    assert 'flash-attn' in reasons['flash_attn'] or 'CUDA' in reasons['flash_attn']


def test_an_unknown_kernel_is_refused_where_it_is_used(monkeypatch):
    monkeypatch.setattr(attention, '_forced', 'flsh')
    with pytest.raises(ValueError, match='flsh.*choose auto, flash'):
        Attention(32, num_heads=2)(torch.randn(1, 4, 32))


@pytest.mark.parametrize('mix', ['scalar', 'channel'])
@pytest.mark.parametrize('share', [-30.0, 0.7, 30.0])
def test_mix_weighs_the_branches(mix, share):
    ssm, other = nn.Linear(8, 8), nn.Linear(8, 8)
    hybrid = Hybrid(8, ssm, other, mix)
    assert hybrid.mix.shape == ((1,) if mix == 'scalar' else (8,))
    with torch.no_grad():
        hybrid.mix.fill_(share)
    x = torch.randn(2, 3, 8)
    weight = torch.tensor(share).sigmoid()
    torch.testing.assert_close(hybrid(x, None), weight * ssm(x) + (1 - weight) * other(x))


class InFloat32(nn.Linear):
    def forward(self, x):
        with torch.autocast('cpu', enabled=False):
            return super().forward(x.float())


@pytest.mark.parametrize('path', ['ssm.out_proj', 'attention.proj'])
def test_a_branch_that_stays_in_float32_under_autocast_is_mixed(path):
    mixer, (parent, name) = small(depth=1).blocks[0].mixer, path.split('.')
    layer = getattr(getattr(mixer, parent), name)
    own = InFloat32(layer.in_features, layer.out_features, layer.bias is not None)
    own.load_state_dict(layer.state_dict())
    x, layout = torch.randn(2, 16, 32, requires_grad=True), Layout((4, 4), [], None)
    with torch.autocast('cpu', torch.bfloat16):
        expected = mixer(x, layout)
        setattr(getattr(mixer, parent), name, own)
        found = mixer(x, layout)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.float(), rtol=0.05, atol=0.05)
    found.square().sum().backward()
    assert own.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    'attn_blocks, expected',
    [('all', [0, 1, 2, 3]), ('every_fourth', [3]), ((1, 2), [1, 2]), ([], []), (iter([1, 2]), [1, 2])],
)
def test_blocks_with_attention(attn_blocks, expected):
    model = small(attn_blocks=attn_blocks)
    assert [i for i, block in enumerate(model.blocks) if isinstance(block.mixer, Hybrid)] == expected
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 5)


@pytest.mark.parametrize('ssm', ['ssd', 'mamba'])
def test_every_parameter_of_both_branches_learns(ssm):
    model = small(ssm=ssm)
    model(torch.randn(2, 3, 16, 16)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize(
    'arguments, sentence',
    [
        (dict(ssm='s4'), 'ssm must be one of ssd, mamba'),
        (dict(mix='vector'), "mix must be 'scalar' or 'channel'"),
        (dict(attn_blocks='some'), "attn_blocks must be 'all', 'every_fourth' or numbers from 0 to 3"),
        (dict(attn_blocks=[4]), 'numbers from 0 to 3'),
        (dict(attn_blocks=2), 'numbers from 0 to 3'),
        (dict(num_heads=5), 'num_heads must divide embed_dim 32'),
        (dict(mlp_ratio=-1), 'mlp_ratio must be 0 for none, or more'),
        (dict(expand=-1), 'expand must be a number above 0, not -1'),
        (dict(expand=0), 'expand must be a number above 0, not 0'),
        (dict(ssm='mamba', headdim=32), "headdim 32 needs ssm 'ssd'"),
        (dict(weight_init='jax'), "weight_init must be ''"),
    ],
)
def test_wrong_arguments_end_in_a_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        small(**arguments)


def test_a_width_that_the_usual_heads_do_not_divide_takes_those_of_the_sentence():
    with pytest.raises(ValueError, match=r'headdim 64 does not divide the 96 channels .* use one of \[8, 16, 32, 48'):
        small(embed_dim=48)
    assert small(embed_dim=48, headdim=48).blocks[0].mixer.ssm.num_heads == 2


def test_blocks_without_an_mlp():
    model = small(mlp_ratio=0)
    assert all(block.mlp is None for block in model.blocks)
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 5)


def test_every_norm_has_the_epsilon_that_is_asked_for():
    norms = [module for module in small(norm_eps=1e-3).modules() if isinstance(module, nn.RMSNorm)]
    assert len(norms) == 4 * 3 + 1 and {norm.eps for norm in norms} == {1e-3}


def test_what_weight_decay_leaves_alone():
    names = small(ssm='mamba').no_weight_decay()
    assert {'pos_embed', 'blocks.0.mixer.mix', 'blocks.0.mixer.ssm.A_log', 'blocks.0.mixer.ssm.D'} <= names
