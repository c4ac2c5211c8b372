"""SwiGLU: the kernels are the law, keep the tokens alone for the backward pass (Triton's), and the layer is timm's.

A run without TRITON_INTERPRET=1 leaves Triton's kernels out; `test_triton_kernels.py` starts one with it.
"""

import os

import pytest
import torch
import torch.nn as nn
from timm.layers import SwiGLUPacked

from tests.kernels import assert_agrees, error, kept_bytes, with_gradients
from vim_timm.layers.swiglu import SwiGluMlp
from vim_timm.ops import SwiGlu, backends, cpu, swiglu, use_scan_backend
from vim_timm.ops.cpu import library
from vim_timm.ops.triton_kernels import swiglu_op

only_native = pytest.mark.skipif(bool(cpu.unavailable()), reason=cpu.unavailable())
INTERPRETER = os.environ.get('TRITON_INTERPRET') == '1'
GPU = torch.cuda.is_available() and not INTERPRETER
DEVICE = 'cuda' if GPU else 'cpu'
only_triton = pytest.mark.skipif(not (GPU or INTERPRETER), reason='needs an NVIDIA GPU or TRITON_INTERPRET=1')
BUILDS = [] if cpu.unavailable() else library.instruction_sets()


@pytest.fixture(autouse=True)
def best_build():
    torch._dynamo.reset()  # what other tests compiled of the same code counts as recompiles
    yield
    if BUILDS:
        library.select(BUILDS[0])


def law(x, weight, bias, out, out_bias):
    a, b = nn.functional.linear(x, weight, bias).chunk(2, -1)
    return nn.functional.linear(nn.functional.silu(a) * b, out, out_bias)


def operands_of(rows, hidden, bias, device='cpu'):
    sizes = {'x': (*rows, 6), 'weight': (2 * hidden, 6), 'bias': 2 * hidden, 'out': (5, hidden), 'out_bias': 5}
    given = {name: torch.randn(size, device=device) for name, size in sizes.items()}
    return given if bias else {**given, 'bias': None, 'out_bias': None}


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
    gate, before, found = torch.ops.vim_timm.cpu_swiglu.default, torch.get_num_threads(), []
    given = {'x': torch.randn(5, 50, 40), 'bias': torch.randn(40)}
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(with_gradients(gate, given))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one[name], found[0][name]) for one in found for name in one)
    nothing = gate(torch.zeros(0, 40).requires_grad_(), given['bias'])
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


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SIZES = [((3, 33), 37, True), ((2,), 16, False), ((1, 1, 7), 3, True), ((2, 9), 600, True), ((0,), 4, True)]
if GPU:  # long for the interpreter
    SIZES += [((128, 197), 480, True), ((3, 785), 1920, True), ((1025,), 960, False)]


@pytest.mark.parametrize('hidden', [1, 3, 8, 9, 16, 31, 37, 600])
def test_no_two_warps_have_the_same_elements_which_gradients_take_the_place_of(hidden):
    constants = swiglu_op.Gate(None, torch.empty(1, 2 * hidden)).constants(swiglu_op.BACKWARD)
    assert constants['num_warps'] in (1, 2, 4)
    assert constants['num_warps'] == 1 or constants['BR'] * constants['BD'] >= 32 * constants['num_warps']


def whole(*tensors):
    return swiglu(SwiGlu(*tensors))


@only_triton
@pytest.mark.parametrize('rows, hidden, bias', SIZES, ids=str)
@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
def test_triton_kernels_are_the_law(rows, hidden, bias, dtype, triton):
    given = operands_of(rows, hidden, bias, DEVICE)
    given = {name: None if x is None else x.to(dtype) for name, x in given.items()}
    found = assert_agrees(whole, law, given, TOLERANCE[dtype])
    again = with_gradients(whole, given)
    assert found['output'].dtype == dtype and all(torch.equal(found[name], again[name]) for name in found)


@only_triton
def test_triton_kernels_follow_autocast_to_gradients_of_the_weights_in_float32(triton):
    given = operands_of((3, 33), 37, True, DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = with_gradients(whole, given)
    assert found.pop('output').dtype == torch.bfloat16
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    with torch.autocast(DEVICE, torch.bfloat16):
        assert_agrees(whole, law, given, 1e-2, rounded=law)


@only_triton
def test_triton_keeps_the_tokens_alone_for_the_backward_pass(triton):
    """What grows with the tokens is x as the products take it."""
    given = operands_of((4, 9), 12, True, DEVICE)

    def kept(x):
        leaves = [x, *(y.requires_grad_() for y in list(given.values())[1:])]
        return kept_bytes(lambda: whole(*leaves))

    with torch.autocast(DEVICE, torch.bfloat16):
        assert kept(given['x']) - kept(given['x'][:3]) == 9 * 6 * 2


@only_triton
def test_the_triton_operator_passes_opcheck_and_has_no_second_derivative(triton):
    leaves = [x.requires_grad_() for x in operands_of((3, 2), 4, True, DEVICE).values()]
    tests = ('test_schema', 'test_autograd_registration', 'test_faketensor')
    torch.library.opcheck(torch.ops.vim_timm.triton_swiglu.default, leaves, test_utils=tests)
    backward = torch.ops.vim_timm.triton_swiglu_backward.default
    torch.library.opcheck(backward, (torch.randn(3, 2, 5, device=DEVICE), *leaves[:4]), test_utils=tests[::2])
    (gradient,) = torch.autograd.grad(whole(*leaves).square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match='kernels have a first derivative'):
        gradient.sum().backward()


BFLOAT16 = 4e-3 if GPU else 8e-3  # the interpreter cuts numbers off where a GPU rounds them
WIDTHS = [(1, 32, 40), (127, 64, 100), (129, 96, 64), (1000, 192, 130), (33, 256, 96), (5, 20, 7)]
if GPU:  # vim2_tiny, small and base
    WIDTHS += [(25_088, 192, 768), (25_088, 384, 1536), (5_000, 768, 3072)]


def drawn(rows, channels, hidden, bias, dtype):
    """x and the layers' weights, whose outputs are about one."""
    shapes = (rows, channels), (2 * hidden, channels), (2 * hidden,), (channels, hidden), (channels,)
    x, weight, offset, out, out_bias = (torch.randn(shape, device=DEVICE) for shape in shapes)
    tensors = x, weight / channels**0.5, offset if bias else None, out / hidden**0.5, out_bias if bias else None
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


def in_float64(tensors):
    return law(*(None if tensor is None else tensor.double() for tensor in tensors))


@only_triton
@pytest.mark.parametrize('rows, channels, hidden', WIDTHS)
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('dtype, bound', [(torch.bfloat16, BFLOAT16), (torch.float16, 8e-4)], ids=str)
def test_tritons_product_with_the_gate_is_the_law(rows, channels, hidden, bias, dtype, bound, poison, triton):
    given = drawn(rows, channels, hidden, bias, dtype)
    assert error(whole(*given), in_float64(given)) < bound


BOUNDS = pytest.mark.parametrize('dtype, bound', [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)], ids=str)


@only_triton
@pytest.mark.parametrize('rows, channels, hidden', WIDTHS)
@pytest.mark.parametrize('bias', [True, False])
@BOUNDS
def test_gradients_with_tritons_product_are_those_of_the_law(
    rows, channels, hidden, bias, dtype, bound, poison, triton
):
    """Of rows that lie apart, too."""
    names = ('x', 'weight', 'bias', 'out', 'out_bias')
    given = dict(zip(names, drawn(rows, channels, hidden, bias, dtype)))
    found = assert_agrees(whole, law, given, bound)
    apart = {**given, 'x': torch.cat([given['x'], given['x']], 1)[:, channels:]}
    again = with_gradients(whole, apart)
    assert all(torch.equal(found[name], again[name]) for name in found)


COMPILED = [('bf16', False, 6, True), ('bf16', True, 6, True), ('bf16', False, 200, True), ('bf16', True, 200, False)]
COMPILED += [('f32', False, 6, False), ('f32', True, 6, False)]
TILES = [swiglu_op.GRADIENTS, (16, 64, 4, 2, None, 3), (32, 32, 4, 2, None, 1)]


@only_triton
@pytest.mark.parametrize('tile', TILES, ids=str)
@pytest.mark.parametrize(
    'rows, channels, hidden', [(1, 32, 40), (130, 96, 64), (145, 40, 128), (77, 33, 77), (0, 16, 16)]
)
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('dtype, bound', [(torch.bfloat16, BFLOAT16), (torch.float16, 8e-4)], ids=str)
def test_the_hidden_layer_takes_the_place_of_its_gradient(tile, rows, channels, hidden, bias, dtype, bound, poison):
    from vim_timm.ops.triton_kernels import gated_product_kernels

    x, weight, offset, *_ = drawn(rows, channels, hidden, bias, dtype)
    more = torch.full((rows + tile[0], hidden), torch.nan, dtype=dtype, device=DEVICE)
    grad = more[:rows].normal_()
    ab = nn.functional.linear(*(None if y is None else y.double() for y in (x, weight, offset))).requires_grad_()
    a, b = ab.chunk(2, -1)
    wanted = nn.functional.silu(a) * b
    (wanted_ab,) = torch.autograd.grad(wanted, ab, grad.double())
    gradients = swiglu_op.SwiGluGradients(gated_product_kernels, x, weight, offset)
    found, parts = gradients.backward(grad, swiglu_op.GradientTile(*tile))
    sums = parts.sum(0)
    assert error(found, wanted_ab) < bound and error(grad, wanted) < bound and more[rows:].isnan().all()
    assert sums.dtype == torch.float32 and error(sums, wanted_ab.sum(0)) < 1e-5


@only_triton
@pytest.mark.parametrize('dtype, learns, width, taken', COMPILED)
def test_a_compiled_swiglu_takes_tritons_product_with_the_gate(dtype, learns, width, taken, triton):
    mlp, x, calls = SwiGluMlp(width, 10).to(DEVICE), torch.randn(2, 5, width, device=DEVICE), []

    def look(graph, inputs):
        calls.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    with torch.set_grad_enabled(learns), torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == 'bf16'):
        compiled = torch.compile(mlp, backend=look, fullgraph=True, dynamic=True)
        found, wanted = compiled(x), mlp(x)
    assert any('triton_swiglu' in call for call in calls) == taken
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
    assert found.dtype == wanted.dtype


@only_triton
def test_gradients_of_a_compiled_swiglu_are_those_of_an_eager_one(triton):
    mlp, x = SwiGluMlp(6, 10).to(DEVICE), torch.randn(2, 5, 6, device=DEVICE, requires_grad=True)
    compiled = torch.compile(mlp, backend='inductor' if GPU else 'aot_eager', fullgraph=True)
    found = []
    for call in (mlp, compiled):
        with torch.autocast(DEVICE, torch.bfloat16):
            y = call(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *mlp.parameters()])])
    for one, other in zip(*found):
        assert one.dtype == other.dtype and error(one, other) < 1e-2


@only_triton
def test_an_exported_swiglu_is_made_of_atens_operators(monkeypatch):
    """Where torch.compile would take the kernel."""
    monkeypatch.setitem(backends.KERNELS['swiglu'], DEVICE, 'triton')
    mlp, x = SwiGluMlp(6, 10).to(DEVICE, torch.bfloat16), torch.randn(2, 5, 6, device=DEVICE, dtype=torch.bfloat16)
    with torch.no_grad():
        graph = torch.export.export(mlp, (x,)).graph
    assert not any('vim_timm' in str(node.target) for node in graph.nodes)


@only_triton
@pytest.mark.parametrize('tile', swiglu_op.WHOLE, ids=str)
@pytest.mark.parametrize('rows, channels, outputs, hidden', [(1, 192, 192, 40), (129, 160, 129, 64), (70, 32, 96, 37)])
@pytest.mark.parametrize('bias', [True, False])
def test_one_kernel_of_a_swiglu_is_the_law(tile, rows, channels, outputs, hidden, bias, poison):
    from vim_timm.ops.triton_kernels import gated_product_kernels

    x, weight, offset, out, out_bias = drawn(rows, channels, hidden, bias, torch.bfloat16)
    out = torch.randn(outputs, hidden, device=DEVICE).to(out) / hidden**0.5
    given = SwiGlu(x, weight, offset, out, torch.randn(outputs, device=DEVICE).to(out) if bias else None)
    found = swiglu_op.WholeSwiGlu(gated_product_kernels, given).forward(tile)
    assert found.shape == (rows, outputs) and error(found, in_float64(given)) < BFLOAT16


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason='needs an NVIDIA GPU')
@pytest.mark.parametrize('rows', [(128, 196), (32, 1024), (1, 196)], ids=str)
def test_compiled_and_recorded_swiglus_are_the_law(rows):
    mlp, x = SwiGluMlp(192, 768).cuda(), torch.randn(*rows, 192, device='cuda')
    given = x, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias
    compiled = torch.compile(mlp, mode='reduce-overhead', fullgraph=True)
    with torch.no_grad(), torch.autocast('cuda', torch.bfloat16):
        eager = mlp(x)
        assert error(eager, in_float64(given)) < 1e-2  # operands are rounded too
        for _ in range(3):
            assert torch.equal(compiled(x), eager)


def test_one_kernel_is_taken_where_its_waves_are_full(monkeypatch):
    """As timed on an H200: vim2_tiny at 224, 512 and 1248 pixels, a quarter of a batch, one image."""
    monkeypatch.setattr(swiglu_op, 'multiprocessors', lambda device: 132)
    many, few = swiglu_op.WHOLE
    for rows, tile in ((25_088, few), (32_768, many), (48_672, many), (6_272, None), (196, None), (0, None)):
        assert swiglu_op.whole_tile(rows, torch.device('cuda')) == tile


@only_triton
@pytest.mark.parametrize('channels', [6, 144])  # the forward pass is a kernel and a product, or one kernel
def test_triton_kernels_add_a_float32_bias_as_it_is_under_autocast(channels, triton, monkeypatch):
    monkeypatch.setattr(swiglu_op, 'tile_of', lambda given: swiglu_op.WHOLE[1] if channels == 144 else None)
    one = torch.zeros(3, channels, device=DEVICE)
    one[:, 0] = 1
    weight, out = torch.zeros(8, channels, device=DEVICE), torch.eye(channels, 4, device=DEVICE)
    weight[:, 0] = -100
    bias, out_bias = torch.full((8,), 100.3, device=DEVICE), torch.zeros(channels, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = whole(one, weight, bias, out, out_bias)
    wanted = law(*(x.double() for x in (one, weight, bias, out, out_bias)))
    assert error(found, wanted) < 4e-3  # 2 with a bias that is rounded to 100.5


@only_triton
@pytest.mark.parametrize('rows, hidden, outputs', [(3, 4, 5), (150, 70, 40)])
def test_triton_kernels_cast_weights_in_inference_as_autocast_does_in_training(
    rows, hidden, outputs, triton, monkeypatch
):
    monkeypatch.setattr(swiglu_op, 'CAST_NUMBERS', 128)  # several turns of few programs
    given = [torch.randn(size, device=DEVICE) for size in ((rows, 6), (2 * hidden, 6), (2 * hidden,))]
    given += [torch.randn(size, device=DEVICE, requires_grad=True) for size in ((outputs, hidden), (outputs,))]
    with torch.autocast(DEVICE, torch.bfloat16):
        learning = whole(*given)
        with torch.no_grad():
            found = whole(*given)
    assert error(found, learning) < (1e-2 if INTERPRETER else 1e-9)  # which cuts what autocast rounds


@only_triton
def test_programs_that_have_nothing_to_cast_leave_all_as_it_is(triton):
    from vim_timm.ops.triton_kernels import gated_product_kernels

    step, count = 2**20, 5  # numbers of 2,049 programs are more than an int32 can tell
    x, found = torch.randn(count, device=DEVICE), torch.zeros(count, dtype=torch.bfloat16, device=DEVICE)
    gated_product_kernels.cast[(2049,)](x, found, COUNT=count, BN=step)
    assert torch.equal(found, x.bfloat16()) or INTERPRETER and error(found, x) < 1e-2


@only_triton
@pytest.mark.parametrize('place, shape', [(1, (8, 5)), (2, (6,))])
def test_weights_of_other_shapes_are_refused_in_two_byte_types(place, shape, triton):
    given = [torch.randn(size, device=DEVICE).bfloat16() for size in ((3, 6), (8, 6), (8,), (5, 4), (5,))]
    given[place] = given[place].new_zeros(shape)
    with pytest.raises(RuntimeError):
        whole(*given)


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
    for name in ('drop1', 'norm', 'fc2'):
        ours, timms = both()
        for mlp in (ours, timms):
            mlp.get_submodule(name).register_forward_pre_hook(lambda module, given: (given[0] + 1,))
        torch.testing.assert_close(ours(x), timms(x))
    ours, timms = both()
    for mlp in (ours, timms):
        mlp.act = nn.GELU()
        nn.utils.parametrizations.weight_norm(mlp.fc1)
    torch.testing.assert_close(ours(x), timms(x))


def test_a_replaced_dropout_is_called():
    (ours, timms), x = both(), torch.randn(2, 5, 6)
    for mlp in (ours, timms):
        mlp.drop1 = nn.Tanh()
    torch.testing.assert_close(ours(x), timms(x))


def test_dropout_of_the_hidden_layer_acts_in_training():
    torch.manual_seed(0)
    mlp, x = SwiGluMlp(6, 10, drop=(1.0, 0.0)), torch.randn(2, 5, 6)
    torch.testing.assert_close(mlp(x), mlp.fc2.bias.expand(2, 5, 6))
    assert not torch.allclose(mlp.eval()(x), mlp.fc2.bias)
    mlp.drop1.train()  # Monte-Carlo dropout
    torch.testing.assert_close(mlp(x), mlp.fc2.bias.expand(2, 5, 6))
