"""The CPU kernel's inside of a block agrees with the composition of the operators it replaces, on every build."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import kernels
from vim_timm.layers import BiMamba
from vim_timm.ops import Mixer, cpu, use_scan_backend
from vim_timm.ops.cpu import library
from vim_timm.ops.plain import reference

pytestmark = pytest.mark.skipif(bool(cpu.unavailable()), reason=cpu.unavailable())

BUILDS = library.instruction_sets()
RELATIVE = 1e-5
cpu_mixer = kernels.mixer(cpu)


@pytest.fixture(autouse=True)
def best_build():
    yield
    library.select(BUILDS[0])


def operands(batch, length, channels, state=16, rank=3, width=4, bias=True, dtype=torch.float32):
    """xz and two directions' parameters, leaves that need gradients."""
    generator = torch.Generator().manual_seed(batch + length + channels)

    def draw(*shape, scale=1.0, shift=0.0):
        return (torch.randn(*shape, generator=generator) * scale + shift).to(dtype).requires_grad_()

    def direction():
        return [
            draw(channels, width, scale=0.5),
            draw(channels) if bias else None,
            draw(rank + 2 * state, channels, scale=channels**-0.5),
            draw(channels, rank, scale=rank**-0.5),
            draw(channels, shift=-2.0) if bias else None,
            draw(channels, state, scale=0.5),
            draw(channels),
        ]

    return [draw(batch, length, 2 * channels), *direction(), *direction()]


def exact(*flat):
    return reference.mixer(Mixer.of(*flat))


def composed(*flat):
    """The same on the kernel's convolution and scan, with aten's products."""
    return reference.mixer(Mixer.of(*flat), cpu.scan, cpu.conv)


def results(function, tensors, scale=0.5):
    """Output and the gradients of everything there is."""
    used = [x for x in tensors if x is not None]
    out = function(*tensors, scale)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out, *torch.autograd.grad(out, used, weights)]


def in_double(tensors):
    return [None if x is None else x.detach().double().requires_grad_() for x in tensors]


def excess(got, expected):
    """How many times the allowed error each tensor is off."""
    return [
        (x.double() - y).abs().max().item() / (RELATIVE * max(y.abs().max().item(), 1e-6))
        for x, y in zip(got, expected, strict=True)
    ]


def agrees(tensors):
    """Within 1e-5 of float64, or where a sum cancels, within four times the composition's own error."""
    expected = results(exact, in_double(tensors))
    off = excess(results(cpu_mixer, tensors), expected)
    rounding = excess(results(composed, tensors), expected)
    assert all(x <= max(1, 4 * y) for x, y in zip(off, rounding)), (off, rounding)


@pytest.mark.parametrize('name', BUILDS)
@pytest.mark.parametrize('shape', [(2, 197, 48), (1, 1, 1), (3, 1, 20), (5, 65, 33), (1, 600, 20)])
def test_output_and_every_gradient(name, shape):
    library.select(name)
    agrees(operands(*shape))
    agrees(operands(*shape, bias=False))


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(BUILDS),
    batch=st.integers(1, 6),
    length=st.one_of(st.integers(1, 70), st.integers(1, 300)),
    channels=st.integers(1, 70),
    state=st.integers(1, 20),
    rank=st.integers(1, 20),
    width=st.integers(1, 6),
    bias=st.booleans(),
)
def test_any_size(name, batch, length, channels, state, rank, width, bias):
    library.select(name)
    agrees(operands(batch, length, channels, state, rank, width, bias))


def test_strided_and_transposed_inputs():
    tensors = operands(4, 30, 24)
    expected = cpu_mixer(*tensors, 0.5)
    xz = tensors[0].detach()
    wide = torch.zeros(4, 60, 100)[:, ::2, 7:55].copy_(xz)
    channels_first = xz.transpose(1, 2).contiguous().transpose(1, 2)
    parameters = [None if x is None else x.detach().t().contiguous().t() for x in tensors[1:]]
    for other in (wide, channels_first):
        assert torch.equal(cpu_mixer(other, *parameters, 0.5), expected)
    out = cpu_mixer(*tensors, 0.5)
    (dense,) = torch.autograd.grad(out, tensors[0], torch.ones(()).expand(4, 30, 24).contiguous(), retain_graph=True)
    (expanded,) = torch.autograd.grad(out, tensors[0], torch.ones(()).expand(4, 30, 24))
    assert torch.equal(dense, expanded)


def test_inference_gives_the_same_bits_as_training():
    tensors = operands(3, 300, 37)
    out = cpu_mixer(*tensors, 0.5)
    with torch.inference_mode():
        assert torch.equal(out, cpu_mixer(*tensors, 0.5))


@pytest.mark.parametrize('shape', [(1, 197, 96), (8, 65, 48), (3, 300, 40)])
def test_the_number_of_threads_changes_no_bit(shape):
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(results(cpu_mixer, operands(*shape)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other))


def test_every_element_is_written(monkeypatch):
    """Fresh memory is full of NaN here, and none of it shows."""
    empty = torch.empty
    tensors = operands(3, 150, 37)
    monkeypatch.setattr(torch, 'empty', lambda *a, **k: empty(*a, **k).fill_(float('nan')))
    assert all(x.isfinite().all() for x in results(cpu_mixer, tensors))


@pytest.mark.parametrize('shape', [(0, 5, 4), (2, 0, 4)])
def test_empty_tensors(shape):
    out, *gradients = results(cpu_mixer, operands(*shape))
    assert out.shape == shape
    assert all(not g.any() for g in gradients)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    tensors = operands(2, 40, 20, dtype=dtype)
    got = results(cpu_mixer, tensors)
    single = [None if x is None else x.detach().float().requires_grad_() for x in tensors]
    assert [x.dtype for x in got] == [dtype] * len(got)
    assert torch.equal(got[0], cpu_mixer(*single, 0.5).to(dtype))


def test_wrong_tensors_are_refused_in_one_sentence():
    tensors = operands(2, 10, 20)

    def call(position, x):
        return cpu_mixer(*tensors[:position], x, *tensors[position + 1 :], 0.5)

    with pytest.raises(ValueError, match=r'x_proj has the shape \(5, 20\), not \(35, 20\)'):
        call(3, torch.zeros(5, 20))
    for shape in ((20,), (20, 2, 4)):
        with pytest.raises(ValueError, match='conv has the shape'):
            call(1, torch.zeros(shape))
    with pytest.raises(ValueError, match=r'conv_b has the shape \(20, 3\), not \(20, 4\)'):
        call(8, torch.zeros(20, 3))
    with pytest.raises(TypeError, match='D_b is torch.float64'):
        call(14, torch.zeros(20, dtype=torch.float64))
    with pytest.raises(ValueError, match=r'xz must be \(B, L, 2 D\), not \(2, 10, 39\)'):
        call(0, torch.zeros(2, 10, 39))


def test_second_derivatives_name_the_reference_backend():
    tensors = operands(1, 8, 4)
    (slope,) = torch.autograd.grad(cpu_mixer(*tensors, 0.5).sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match='reference'):
        torch.autograd.grad(slope.sum(), tensors[0])


def test_operator_passes_opcheck():
    tensors = operands(2, 70, 20)
    torch.library.opcheck(torch.ops.vim_timm.cpu_mixer, (*tensors, 0.5, True))
    torch.library.opcheck(torch.ops.vim_timm.cpu_mixer, (*operands(1, 5, 6, bias=False), 1.0, True))


def test_operations_are_counted_as_in_the_composition():
    counts = []
    for function in (cpu_mixer, composed):
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            function(*operands(2, 10, 20), 0.5)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


@pytest.fixture
def block():
    torch.manual_seed(0)
    return BiMamba(32)


def calls_of(module, x):
    """Names of the kernel's operators that a pass runs, but for products, which are torch's on some machines."""
    with torch.profiler.profile() as profile:
        module(x)
    names = {event.key for event in profile.key_averages() if event.key.startswith('vim_timm::')}
    return names - {'vim_timm::cpu_linear'}


def test_a_block_takes_one_operator_unless_a_module_inside_is_wrapped(block):
    x = torch.randn(2, 20, 32)
    assert calls_of(block, x) == {'vim_timm::cpu_mixer'}
    with use_scan_backend('cpu'):
        assert calls_of(block, x) == {'vim_timm::cpu_mixer'}
    block.x_proj.register_forward_hook(lambda *_: None)
    assert calls_of(block, x) == {'vim_timm::cpu_conv', 'vim_timm::cpu_scan'}


def test_frozen_parameters_get_no_gradient(block):
    x = torch.randn(2, 20, 32)
    block(x).sum().backward()
    expected = block.dt_proj.weight.grad
    block.zero_grad()
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(name == 'dt_proj.weight')
    block(x).sum().backward()
    assert torch.equal(block.dt_proj.weight.grad, expected)
    assert block.A_log.grad is None and block.in_proj.weight.grad is None


def test_autocast_and_half_precision_stay_close(block):
    x = torch.randn(2, 20, 32)
    expected = block(x)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out = block(x)
        out.sum().backward()  # inside the region on purpose: the kernel's backward pass is not cast
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).abs().max() < 0.02 * expected.abs().max() + 0.01
    assert block.x_proj.weight.grad.dtype == torch.float32


def test_one_graph_under_compile(block):
    x = torch.randn(2, 20, 32)
    compiled = torch.compile(block, fullgraph=True, backend='aot_eager')
    gradients = []
    for module in (block, compiled):
        block.zero_grad()
        module(x).sum().backward()
        gradients.append([p.grad for p in block.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_export_keeps_plain_operators(block):
    program = torch.export.export(block.eval(), (torch.randn(1, 9, 32),))
    assert not any('vim_timm' in str(node.target) for node in program.graph.nodes)
