"""The gated hidden layer of a SwiGLU: the kernel is the law, and the layer is timm's."""

import pytest
import torch
import torch.nn as nn
from timm.layers import SwiGLUPacked

from tests.kernels import assert_agrees, with_gradients
from vim_timm.layers.swiglu import SwiGluMlp
from vim_timm.ops import SwiGlu, cpu, swiglu, use_scan_backend
from vim_timm.ops.cpu import library

only_native = pytest.mark.skipif(bool(cpu.unavailable()), reason=cpu.unavailable())
BUILDS = [] if cpu.unavailable() else library.instruction_sets()


@pytest.fixture(autouse=True)
def best_build():
    yield
    if BUILDS:
        library.select(BUILDS[0])


def law(x, weight, bias=None):
    a, b = nn.functional.linear(x, weight, bias).chunk(2, -1)
    return nn.functional.silu(a) * b


def operands_of(rows, hidden, bias):
    given = {'x': torch.randn(*rows, 6), 'weight': torch.randn(2 * hidden, 6), 'bias': torch.randn(2 * hidden)}
    return given if bias else {**given, 'bias': None}


@only_native
@pytest.mark.parametrize('name', BUILDS)
@pytest.mark.parametrize('rows, hidden, bias', [((3, 33), 37, True), ((2,), 16, False), ((1, 1, 70), 3, True)], ids=str)
def test_the_kernel_is_the_law(name, rows, hidden, bias, poison):
    library.select(name)
    assert_agrees(lambda *x: swiglu(SwiGlu(*x)), law, operands_of(rows, hidden, bias), 2e-6)


@only_native
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_two_byte_tensors_are_computed_in_float32(dtype):
    given = {name: x.to(dtype) for name, x in operands_of((4, 9), 12, True).items()}
    assert_agrees(lambda *x: swiglu(SwiGlu(*x)), law, given, 1e-2)
    assert swiglu(SwiGlu(*given.values())).dtype == dtype


@only_native
def test_threads_change_no_bit_and_no_rows_are_none():
    given, before, found = operands_of((5, 50), 20, True), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(with_gradients(lambda *x: swiglu(SwiGlu(*x)), given))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one[name], found[0][name]) for one in found for name in one)
    nothing = swiglu(SwiGlu(torch.zeros(0, 6).requires_grad_(), *list(given.values())[1:]))
    nothing.sum().backward()
    assert nothing.shape == (0, 20)


@only_native
def test_the_operator_passes_opcheck_and_refuses_odd_rows():
    tests = ('test_schema', 'test_autograd_registration', 'test_faketensor')
    leaves = torch.randn(3, 8).requires_grad_(), torch.randn(8).requires_grad_()
    torch.library.opcheck(torch.ops.vim_timm.cpu_swiglu.default, leaves, test_utils=tests)
    backward, grad, x = torch.ops.vim_timm.cpu_swiglu_backward.default, torch.randn(3, 4), torch.randn(3, 8).bfloat16()
    for bias in (torch.randn(8), None):
        torch.library.opcheck(backward, (grad, x, bias), test_utils=tests[::2])
    with pytest.raises(ValueError, match='rows of 7 have no two halves'):
        torch.ops.vim_timm.cpu_swiglu(torch.randn(3, 7), None)
    with pytest.raises(ValueError, match=r'the gradient has the shape \(2, 4\), not \(3, 4\)'):
        backward(grad[:2], x, None)


def both():
    ours, timms = SwiGluMlp(6, 10), SwiGLUPacked(6, 20)
    timms.load_state_dict(ours.state_dict())
    return ours, timms


@pytest.mark.parametrize('backend', ['auto', 'torch'])
def test_the_layer_is_that_of_timm(backend):
    (ours, timms), x = both(), torch.randn(2, 5, 6)
    with use_scan_backend(backend):
        torch.testing.assert_close(ours(x), timms(x))
        with torch.autocast('cpu', torch.bfloat16):
            torch.testing.assert_close(ours(x), timms(x), rtol=2e-2, atol=2e-2)
            assert ours(x).dtype == torch.bfloat16
    torch.testing.assert_close(torch.jit.script(ours)(x), timms(x))
    torch.testing.assert_close(torch.compile(ours, backend='eager', fullgraph=True)(x), timms(x))
    torch.testing.assert_close(torch.fx.symbolic_trace(ours)(x), timms(x))
    torch.testing.assert_close(torch.func.jvp(ours, (x,), (x,))[1], torch.func.jvp(timms, (x,), (x,))[1])


def test_what_is_hooked_or_replaced_is_called():
    (ours, timms), x = both(), torch.randn(2, 5, 6)
    for mlp in (ours, timms):
        mlp.fc1.register_forward_hook(lambda module, given, output: output + 1)
        mlp.act.register_forward_hook(lambda module, given, output: output * 3)
    torch.testing.assert_close(ours(x), timms(x))
    ours, timms = both()
    for mlp in (ours, timms):
        mlp.act = nn.GELU()
        nn.utils.parametrizations.weight_norm(mlp.fc1)
    torch.testing.assert_close(ours(x), timms(x))
