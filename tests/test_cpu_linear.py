"""Products with the weights of linear layers on the CPU kernel: every build is the law, and
layers take it where they may."""

import pytest
import timm
import torch
import torch.nn.functional as F

import vim_timm  # noqa: F401  registers the models
from tests.kernels import assert_agrees, with_gradients
from vim_timm.layers.bissd import BiSSD
from vim_timm.layers.swiglu import SwiGluMlp
from vim_timm.layers.token_order import Layout
from vim_timm.ops import Linear, cpu, linear, use_scan_backend
from vim_timm.ops.cpu import library

pytestmark = pytest.mark.skipif(bool(cpu.unavailable()), reason=cpu.unavailable())
BUILDS = [] if cpu.unavailable() else library.instruction_sets()
every_build = pytest.mark.parametrize('build', BUILDS)
product, gated = torch.ops.vim_timm.cpu_linear.default, torch.ops.vim_timm.cpu_gated_linear.default


@pytest.fixture
def wide(monkeypatch):
    """The processor is as one that is not Intel's and has AVX-512."""
    if BUILDS[:1] != ['avx512']:
        pytest.skip("products of narrow registers are torch's")
    monkeypatch.setattr(library, '_intel', False)


@pytest.fixture(autouse=True)
def best_build():
    yield
    if BUILDS:
        library.select(BUILDS[0])


def operands(rows, depth, columns, bias=True):
    x, weight = torch.randn(*rows, depth), torch.randn(columns, depth)
    return {'x': x, 'weight': weight, 'bias': torch.randn(columns) if bias else None}


SIZES = [((), 1, 1), ((3, 5), 6, 7), ((97,), 19, 49), ((2, 101), 64, 451), ((195,), 400, 33), ((901,), 5, 3)]
GATED = [((1,), 1, 1, 1), ((2, 101), 19, 37, 49), ((13,), 4, 16, 48)]


@every_build
@pytest.mark.parametrize('rows, depth, columns', SIZES, ids=str)
@pytest.mark.parametrize('bias', [True, False])
def test_the_product_is_the_law(build, rows, depth, columns, bias, poison):
    library.select(build)
    assert_agrees(product, F.linear, operands(rows, depth, columns, bias), 2e-6)


@every_build
@pytest.mark.parametrize('rows, depth, width, columns', GATED, ids=str)
@pytest.mark.parametrize('bias', [True, False])
def test_the_gated_product_is_the_law(build, rows, depth, width, columns, bias, poison):
    library.select(build)
    given = operands(rows, depth, 2 * width, bias)
    out, out_bias = torch.randn(columns, width), torch.randn(columns) if bias else None
    a, b = F.linear(*(None if x is None else x.double() for x in given.values())).chunk(2, -1)
    wanted = F.linear(F.silu(a) * b, out.double(), None if out_bias is None else out_bias.double())
    found = gated(*given.values(), out, out_bias)
    assert found.shape == wanted.shape and (found - wanted).norm() < 2e-6 * wanted.norm()


@pytest.mark.parametrize('strided', [lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), lambda x: x[:, ::2]])
def test_operands_of_any_strides(strided):
    given = {name: x if x.dim() == 1 else strided(x) for name, x in operands((14,), 20, 12).items()}
    assert_agrees(product, F.linear, given, 2e-6)


def test_threads_change_no_bit_and_nothing_of_nothing():
    before, found = torch.get_num_threads(), []
    given = operands((5, 83), 70, 130)
    out = torch.randn(33, 65), torch.randn(33)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append({**with_gradients(product, given), 'gated': gated(*given.values(), *out)})
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one[name], found[0][name]) for one in found for name in one)
    none = with_gradients(product, operands((0,), 3, 4))
    assert none['output'].shape == (0, 4) and not none['gradient of weight'].any()
    assert gated(torch.zeros(0, 3), torch.zeros(4, 3), None, torch.zeros(5, 2), None).shape == (0, 5)
    weightless = with_gradients(product, operands((3,), 0, 4))
    assert torch.equal(weightless['output'], weightless['output'][:1].expand(3, 4))


def test_what_is_frozen_gets_no_gradient():
    for learns in ((True, False, False), (False, True, False), (False, False, True)):
        leaves = [x.requires_grad_(on) for x, on in zip(operands((3, 5), 6, 7).values(), learns)]
        product(*leaves).square().sum().backward()
        wanted = [x.detach().double().requires_grad_(on) for x, on in zip(leaves, learns)]
        F.linear(*wanted).square().sum().backward()
        for x, y in zip(leaves, wanted):
            assert (x.grad is None) == (y.grad is None)
            if x.grad is not None:
                torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-5, atol=1e-5)


def test_the_operators_pass_opcheck_and_refuse_what_does_not_fit():
    tests = ('test_schema', 'test_autograd_registration', 'test_faketensor')
    leaves = [x.requires_grad_() for x in operands((2, 3), 4, 5).values()]
    torch.library.opcheck(product, leaves, test_utils=tests)
    backward = torch.ops.vim_timm.cpu_linear_backward.default
    x, weight, grad = torch.randn(2, 3, 4).bfloat16(), torch.randn(5, 4), torch.randn(2, 3, 5)
    for asked in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(backward, (grad, x, weight, *asked), test_utils=tests[::2])
    torch.library.opcheck(gated, (x, torch.randn(6, 4), None, torch.randn(2, 3), None), test_utils=tests[::2])
    with pytest.raises(ValueError, match=r'weight has the shape \(5, 3\), not \(5, 4\)'):
        product(x, weight[:, 1:], None)
    with pytest.raises(ValueError, match=r'bias has the shape \(4,\), not \(5,\)'):
        product(x, weight, torch.zeros(4))
    with pytest.raises(ValueError, match=r'weight has the shape \(5, 4\), not \(6, 4\)'):
        gated(x, weight, None, torch.randn(2, 3), None)
    with pytest.raises(ValueError, match=r'the gradient has the shape \(1, 3, 5\), not \(2, 3, 5\)'):
        backward(grad[:1], x, weight, True, True)
    with pytest.raises(RuntimeError, match='this kernel is for inference'):
        gated(*(torch.randn(size).requires_grad_() for size in ((3, 4), (6, 4), 6, (2, 3), 2))).sum().backward()


def operators_of(function):
    """Names of the kernel's operators that a call runs."""
    with torch.profiler.profile() as profile:
        function()
    return {event.key for event in profile.key_averages() if event.key.startswith('vim_timm::')}


def test_layers_take_the_products_of_float32(wide, monkeypatch):
    mixer, mlp, x = BiSSD(64, d_state=16, expand=1), SwiGluMlp(64, 96), torch.randn(2, 6, 64)
    layout = Layout((2, 3), [], None)
    assert 'vim_timm::cpu_linear' in operators_of(lambda: mixer(x, layout))
    assert operators_of(lambda: mlp(x)) == {'vim_timm::cpu_linear', 'vim_timm::cpu_swiglu'}
    with torch.no_grad():
        assert operators_of(lambda: mlp(x)) == {'vim_timm::cpu_gated_linear'}
        with torch.autocast('cpu', torch.bfloat16):
            assert operators_of(lambda: mlp(x)) == {'vim_timm::cpu_swiglu'}
            assert 'vim_timm::cpu_linear' not in operators_of(lambda: mixer(x, layout))
        mixer.bfloat16(), mlp.bfloat16()
        assert operators_of(lambda: mlp(x.bfloat16())) == {'vim_timm::cpu_swiglu'}
        assert 'vim_timm::cpu_linear' not in operators_of(lambda: mixer(x.bfloat16(), layout))
        mlp.float()
        library.select('avx2')
        assert operators_of(lambda: mlp(x)) == {'vim_timm::cpu_swiglu'}
        library.select('avx512')
        monkeypatch.setattr(library, '_intel', True)
        assert operators_of(lambda: mlp(x)) == {'vim_timm::cpu_swiglu'}


def test_compiled_layers_take_them_too(wide):
    mlp, x = SwiGluMlp(6, 10), torch.randn(2, 5, 6)
    compiled = torch.compile(mlp, backend='aot_eager', fullgraph=True)
    with torch.no_grad():
        assert operators_of(lambda: compiled(x)) >= {'vim_timm::cpu_gated_linear'}
    compiled(x).sum().backward()
    found, mlp.fc1.weight.grad = mlp.fc1.weight.grad, None
    mlp(x).sum().backward()
    assert torch.equal(found, mlp.fc1.weight.grad)


def test_a_hooked_projection_is_called():
    mixer, x = BiSSD(64, d_state=16, expand=1), torch.randn(2, 6, 64)
    seen = []
    mixer.in_proj.register_forward_hook(lambda module, given, output: seen.append(output))
    mixer(x, Layout((2, 3), [], None))
    assert len(seen) == 1


def test_no_backend_but_this_one_has_it():
    given = Linear(*operands((3,), 4, 5).values())
    for backend in ('torch', 'reference', 'export'):
        with use_scan_backend(backend):
            assert linear(given) is None
    with use_scan_backend('cpu'):
        torch.testing.assert_close(linear(given), F.linear(*given))


@pytest.mark.parametrize('name', ['vim_nano_patch4_32', 'vim2_nano_patch4_32'])
def test_models_agree_with_plain_torch(name):
    torch.manual_seed(0)
    model, images, found = timm.create_model(name, depth=2), torch.randn(3, 3, 32, 32), []
    for backend in ('cpu', 'torch'):
        with use_scan_backend(backend):
            model.zero_grad()
            logits = model(images)
            logits.square().sum().backward()
            found.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
    for ours, plain in zip(*found):
        assert (ours - plain).norm() <= 2e-5 * plain.norm() + 1e-6
