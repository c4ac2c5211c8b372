"""The table operator x backend: what is chosen, forced, refused, announced and counted; empty and extreme operands.

A run without TRITON_INTERPRET=1 leaves Triton's kernels out; `test_triton_kernels.py` starts one with it.
"""

import logging
import math
import os

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import vim_timm  # noqa: F401  registers the models
from vim_timm import ops
from vim_timm.layers import BiMamba
from vim_timm.ops import Direction, Mixer, Taps, Weights, backends, cuda, triton_kernels
from vim_timm.ops.operands import Conv, Scan, schema

INTERPRETER = os.environ.get('TRITON_INTERPRET') == '1'
AVAILABLE = [status.name for status in ops.explain() if status.available]
ON_CPU = [name for name in ('reference', 'torch', 'export', 'cpu') if name in AVAILABLE] + ['triton'] * INTERPRETER
every_backend = pytest.mark.parametrize('backend', ON_CPU)


def direction(length, channels=6, state=4, skip=True, bias=True):
    sizes = [(2, length, channels)] * 2 + [(channels, state)] + [(2, length, state)] * 2 + [(channels,)] * 2
    u, delta, A_log, B, C, D, delta_bias = (torch.randn(size).requires_grad_() for size in sizes)
    return Direction(u, delta, A_log, B, C, D if skip else None, delta_bias if bias else None)


def taps(channels=6, width=4, bias=True):
    weight, offset = torch.randn(channels, width).requires_grad_(), torch.randn(channels).requires_grad_()
    return Taps(weight, offset if bias else None)


def tokens(length, channels=6):
    return torch.randn(2, length, channels).requires_grad_()


def results(operator, backend, operands):
    """Outputs and all gradients."""
    out = backends.TABLE[operator][backend].run(operands)
    outputs = [y for y in (out if isinstance(out, tuple) else (out,)) if y is not None]
    weights = [torch.cos(torch.arange(y.numel()).float()).view_as(y) for y in outputs]
    leaves = [x for x in operands.flat() if isinstance(x, torch.Tensor)]
    return [*outputs, *torch.autograd.grad(outputs, leaves, weights)]


def assert_equals_the_law(operator, backend, operands):
    """The backend's outputs and all gradients, which are those of the reference."""
    found, wanted = (results(operator, name, operands) for name in (backend, 'reference'))
    for f, w in zip(found, wanted, strict=True):
        scale = w.abs().max().item() if w.numel() else 0.0
        torch.testing.assert_close(f, w, rtol=1e-4, atol=1e-5 * scale)
    return found


# --- operands


@pytest.mark.parametrize(
    'operands',
    [
        Scan(direction(3), None, tokens(3), 0.5),
        Scan(direction(3), direction(3, bias=False)),
        Conv(tokens(3), taps()),
        Conv(tokens(3), taps(bias=False), taps(), False),
        Mixer(tokens(3), Weights(*'abcdefg'), Weights(*'hijklmn')),
    ],
    ids=lambda operands: type(operands).__name__,
)
def test_flat_operands_are_those_of_the_schema_and_lead_back(operands):
    flat = operands.flat()
    assert len(flat) == len(schema(type(operands)).split(', '))
    assert all(x is y for x, y in zip(flat, type(operands).of(*flat).flat(), strict=True))


def test_a_schema_is_made_of_the_fields():
    assert schema(Conv) == 'Tensor x, Tensor weight, Tensor? bias, Tensor? weight_b, Tensor? bias_b, bool silu'
    assert 'out_bias' not in schema(Mixer, 'out_bias') and schema(Mixer).endswith(', Tensor? out_bias')


# --- the table


@pytest.mark.parametrize('operator', ops.OPERATORS)
def test_cells_belong_to_backends_and_auto_prefers_cells(operator):
    assert set(backends.TABLE[operator]) <= set(ops.BACKENDS)
    assert set(backends.KERNELS[operator].values()) <= set(backends.TABLE[operator])


def test_every_backend_is_listed_with_its_operators():
    listed = {status.name: status.operators for status in ops.explain()}
    assert list(listed) == list(ops.BACKENDS)
    assert listed['cuda'] == ('mixer',) and all(listed.values())


def test_a_limit_speaks_of_its_own_operator():
    wide = Conv(torch.ones(1, 300, 2, device='meta'), Taps(torch.ones(2, 290, device='meta'), None))
    for name, cell in backends.TABLE['conv'].items():
        assert 'd_state' not in cell.limit(wide), name
    if INTERPRETER:
        assert triton_kernels.conv_limit(wide) == ''


@pytest.mark.skipif(bool(cuda.unavailable()), reason='needs an NVIDIA GPU')
@pytest.mark.gpu
def test_the_fused_cuda_block_is_forced_announced_and_refused_by_name(caplog, monkeypatch):
    monkeypatch.setattr(backends, '_announced', set())
    block, x = BiMamba(64).cuda(), torch.randn(2, 9, 64, device='cuda')
    with ops.use_scan_backend('cuda'), caplog.at_level(logging.INFO, logger='vim_timm'):
        with torch.autocast('cuda', torch.bfloat16):
            block(x)
        assert 'mixer runs on the `cuda` backend' in caplog.text
        with pytest.raises(RuntimeError, match="'cuda' cannot run this call: .*bfloat16"):
            block(x)


def test_a_backend_that_has_only_whole_blocks_says_so(monkeypatch):
    monkeypatch.setitem(backends._why_unavailable, 'cuda', '')
    with ops.use_scan_backend('cuda'):
        with pytest.raises(
            RuntimeError, match="'cuda' cannot run this call: The fused CUDA kernels run on CUDA tensors"
        ):
            BiMamba(32)(torch.randn(1, 3, 32))
        with pytest.raises(RuntimeError, match="'cuda' has no conv of its own: it computes whole blocks"):
            BiMamba(32, scan='forward')(torch.randn(1, 3, 32))
        x = torch.randn(2, 3)
        assert torch.equal(ops.rms_norm(x, torch.ones(3), 1e-5), torch.nn.functional.rms_norm(x, (3,), eps=1e-5))


def test_what_a_block_is_not_fused_for_is_announced(caplog, monkeypatch):
    monkeypatch.setattr(backends, '_announced', set())
    monkeypatch.setitem(backends._why_unavailable, 'cpu', 'no compiler at install')
    with caplog.at_level(logging.INFO, logger='vim_timm'):
        for _ in range(2):
            BiMamba(32)(torch.randn(1, 3, 32))
    assert [record.levelname for record in caplog.records] == ['INFO', 'INFO', 'WARNING']
    assert caplog.text.count('no compiler at install') == 3


# --- FLOPs


SMALL = dict(depth=2, embed_dim=32, img_size=16)
GRID = dict(SMALL, headdim=16, d_state=16)
MODELS = [
    ('vim_nano_patch4_32', SMALL),
    ('vim_nano_patch4_32', dict(SMALL, scan='shared', class_token='head')),
    ('vim_nano_patch4_32', dict(SMALL, scan='forward')),
    ('vim_nano_patch4_32', dict(SMALL, d_conv=5)),
    ('vim2_nano_patch4_32', GRID),
    ('vim2_nano_patch4_32', dict(GRID, class_token='head', orders='row')),
    ('vim2_nano_patch4_32', dict(GRID, class_token='double', orders='alternate', conv='1d')),
    ('vim2_nano_patch4_32', dict(GRID, depth=1, img_size=92, orders='both')),  # in chunks
    ('vim_hybrid_tiny_patch4_32', dict(SMALL, num_heads=2)),
]


def flops(backend, name, kwargs, train=False):
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).train(train)
    images = torch.randn(2, 3, *model.patch_embed.img_size)
    with ops.use_scan_backend(backend), FlopCounterMode(display=False) as counter:
        with torch.set_grad_enabled(train):
            logits = model(images)
        if train:
            logits.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('name, kwargs', MODELS, ids=str)
def test_flops_of_a_model_do_not_depend_on_the_backend(name, kwargs, train):
    counts = {backend: flops(backend, name, kwargs, train) for backend in ON_CPU}
    assert len(set(counts.values())) == 1, counts


@pytest.mark.filterwarnings('ignore')  # what torch.jit.trace says of itself and of sizes
def test_the_first_trace_of_a_process_is_like_the_second(monkeypatch):
    monkeypatch.setattr(backends, '_announced', set())
    model, images = timm.create_model('vim_nano_patch4_32', depth=1, embed_dim=32).eval(), torch.rand(1, 3, 32, 32)
    traced = torch.jit.trace(model, images)  # it compares with a second one
    assert torch.allclose(traced(images), model(images), atol=1e-6)


def test_flops_of_a_training_step_are_about_thrice_those_of_inference():
    inference, step = (flops('auto', 'vim2_nano_patch4_32', GRID, train) for train in (False, True))
    assert 2.5 < step / inference < 3.01


def test_flops_of_a_scan_and_a_convolution_follow_the_convention():
    """9 for a state, one each for skip weight and gate, 2 for a tap, in each direction; a backward pass twice that."""
    batch_length_channels = 2 * 5 * 6
    for backend in ON_CPU:
        with FlopCounterMode(display=False) as counter:
            ops_scan = backends.TABLE['scan'][backend].run(Scan(direction(5), direction(5), tokens(5)))
            assert counter.get_total_flops() == batch_length_channels * (2 * 9 * 4 + 2), backend
            ops_scan.sum().backward()
        assert counter.get_total_flops() == 3 * batch_length_channels * (2 * 9 * 4 + 2), backend
        with FlopCounterMode(display=False) as counter:
            backends.TABLE['conv'][backend].run(Conv(tokens(5), taps(), taps()))
        assert counter.get_total_flops() == batch_length_channels * 2 * 2 * 4, backend


# --- operands that kernels meet rarely


@every_backend
@pytest.mark.parametrize('length', [0, 1])
def test_sequences_without_tokens_and_with_one(backend, length):
    assert_equals_the_law('scan', backend, Scan(direction(length), direction(length), tokens(length), 0.5))
    assert_equals_the_law('scan', backend, Scan(direction(length, skip=False, bias=False)))
    assert_equals_the_law('conv', backend, Conv(tokens(length), taps(), taps()))


@every_backend
def test_a_model_of_no_images(backend):
    model = timm.create_model('vim_nano_patch4_32', depth=1, embed_dim=32, img_size=8)
    with ops.use_scan_backend(backend):
        logits = model(torch.randn(0, 3, 8, 8))
        logits.sum().backward()
    assert logits.shape == (0, 10)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@every_backend
@pytest.mark.parametrize('is_log', [True, False])
def test_a_state_that_decays_at_once_is_exact_and_has_finite_gradients(backend, is_log):
    """A of minus infinity: the state is what the last token put in, and its decay does not change with anything."""
    length = 9 if backend == 'triton' else 70  # Triton's interpreter is slow
    forward, backward = direction(length), direction(length)
    with torch.no_grad():
        for A in (forward.A_log, backward.A_log):
            A.copy_(A if is_log else -A.exp())
            A[1, 2] = A[3] = math.inf if is_log else -math.inf
        forward.delta[0, 5] = -200.0  # a step of zero length
        forward.C.mul_(100.0)  # gradients whose product with a rate of 1e38 overflows
    operands = Scan(forward, backward, tokens(length), 1.0, True, is_log)
    assert all(x.isfinite().all() for x in assert_equals_the_law('scan', backend, operands))


@every_backend
def test_the_fastest_decay_is_the_same_on_every_backend(backend):
    """A step of e^-60 leaves 1 / e of a state that decays at once, as far as float32 can say."""
    u, delta, A, B, C, *_ = (x.detach().abs() for x in direction(9))
    given = Direction(u, torch.full_like(delta, -60.0), torch.full_like(A, math.inf), B, C, None, None)
    kept, wanted = (backends.TABLE['scan'][name].run(Scan(given)) for name in (backend, 'reference'))
    assert wanted.min() > 0
    torch.testing.assert_close(kept, wanted, rtol=1e-4, atol=0.0)


def test_the_law_at_minus_infinity_is_a_product_of_each_token_alone():
    u, delta, A, B, C, D, bias = direction(9)
    found = ops.bidirectional_scan(Direction(u, delta, torch.full_like(A, math.inf), B, C, D, bias), None, None)
    steps = torch.nn.functional.softplus(delta + bias)
    torch.testing.assert_close(found, steps * u * (B * C).sum(-1, keepdim=True) + D * u)


@every_backend
def test_a_scan_of_one_channel_takes_matrices_stored_by_states(backend):
    given = direction(9, channels=1)
    B, C = (x.detach().mT.contiguous().mT.requires_grad_() for x in (given.B, given.C))
    assert_equals_the_law('scan', backend, Scan(given._replace(B=B, C=C), given._replace(B=B, C=C)))


@every_backend
def test_directions_may_differ_in_what_they_have(backend):
    operands = Scan(direction(9), direction(9, skip=False, bias=False), tokens(9))
    assert_equals_the_law('scan', backend, operands)
    assert_equals_the_law('scan', backend, Scan(operands.backward, operands.forward))
    assert_equals_the_law('conv', backend, Conv(tokens(9), taps(bias=False), taps()))


def test_directions_of_different_widths_run_where_they_can():
    x, forward, backward = tokens(9), taps(width=4), taps(width=3)
    found = ops.bidirectional_conv(x, forward, backward)
    for f, w in zip(found, backends.TABLE['conv']['reference'].run(Conv(x, forward, backward))):
        torch.testing.assert_close(f, w)
