"""The CPU kernel's inside of a Vision Mamba 2 mixer agrees with plain operators in float64, on every build."""

import pytest
import torch

from tests.kernels import assert_agrees, error, with_gradients
from tests.test_ssd import composition, mixer_operands, operands_of, visits_of
from vim_timm.ops import GridMixer, Ssd, cpu, fused_grid_mixer, symmetric_ssd
from vim_timm.ops.cpu import library
from vim_timm.ops.plain import ssd as plain

pytestmark = pytest.mark.skipif(bool(cpu.unavailable()), reason=cpu.unavailable())

BUILDS = library.instruction_sets()
SUMS = ('A_log', 'D', 'delta_bias')  # gradients that are sums of what nearly cancels
# grid, prefix tokens, orders
LAYOUTS = [((1, 1), 0, 'both'), ((1, 7), 0, 'row'), ((3, 5), 1, 'both'), ((6, 4), 2, 'column'), ((14, 14), 0, 'both')]
LONG = [((25, 26), 1, 'both'), ((4, 150), 0, 'column')]


@pytest.fixture(autouse=True)
def best_build():
    yield
    library.select(BUILDS[0])


@pytest.mark.parametrize('name', BUILDS)
@pytest.mark.parametrize('grid, prefix, orders', LAYOUTS + LONG, ids=str)
def test_the_state_space_dual_is_the_law(name, grid, prefix, orders, poison):
    library.select(name)
    length, visits = grid[0] * grid[1] + prefix, visits_of(grid, prefix, orders)
    given = dict(zip(Ssd._fields, [x.float() for x in operands_of(length, orders)]))
    # in a float64 that is compared with the recurrence elsewhere
    law = plain.reference if length < 100 else plain.by_length
    zero = ('A_log',) if length == 1 else ()

    def in_float32(*operands):
        """A cumulated step of hundreds has a last place of 1e-5, whatever computes with it."""
        return plain.by_length(Ssd(*(x.float() for x in operands), *visits))

    assert_agrees(
        lambda *x: cpu.ssd(Ssd(*x, *visits)),
        lambda *x: law(Ssd(*x, *visits)),
        given,
        3e-6,
        sums=SUMS,
        rounded=in_float32,
        zero=zero,
    )


@pytest.mark.parametrize('name', BUILDS)
@pytest.mark.parametrize('grid, prefix, orders', LAYOUTS + LONG[:1], ids=str)
def test_the_inside_of_a_mixer_is_that_of_plain_operators(name, grid, prefix, orders, poison):
    library.select(name)
    length = grid[0] * grid[1] + prefix
    operands = mixer_operands(length, 2 if orders == 'both' else 1, torch.float32, heads=3, headdim=12, state=9)
    settings = (1e-5, 9, orders != 'column', prefix, *grid)
    assert_agrees(
        lambda *x: cpu.grid_mixer(GridMixer(*x, *settings)),
        lambda *x: composition(x, *settings, law=plain.by_length),
        dict(zip(GridMixer._fields, operands)),
        3e-6,
        sums=SUMS,
        rounded=lambda *x: composition([t.float() for t in x], *settings, law=plain.by_length),
        zero=('A_log',) if length == 1 else (),
    )


@pytest.mark.parametrize('learns', [False, True])
def test_a_steep_step_leaves_the_smaller_ones_exact(learns):
    heads, headdim, state, grid = 2, 16, 16, (3, 11)
    dim = heads * headdim
    zxbcdt = torch.randn(1, 33, 2 * dim + 2 * state + heads)
    zxbcdt[..., -heads:] -= 9.0
    zxbcdt[:, 8, -heads:] = 1e4
    conv, bias = torch.randn(dim + 2 * state, 9) / 3, torch.randn(dim + 2 * state)
    weights = [conv, bias, torch.zeros(heads), torch.full((1, heads), 5.0), torch.zeros(heads), torch.ones(dim)]
    settings = (1e-5, state, True, 0, *grid)
    y = cpu.grid_mixer(GridMixer(zxbcdt.requires_grad_(learns), *weights, *settings))
    law = composition([x.detach().double() for x in (zxbcdt, *weights)], *settings, law=plain.by_length)
    assert error(y, law) < 2e-5


SETTINGS = (1e-5, 16, True, 1, 3, 5)


def test_threads_change_no_bit():
    given = dict(zip(GridMixer._fields, mixer_operands(16, 2, torch.float32, batch=3)))
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(with_gradients(lambda *x: cpu.grid_mixer(GridMixer(*x, *SETTINGS)), given))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one[name], found[0][name]) for one in found for name in one)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_two_byte_tensors_are_computed_in_float32(dtype):
    given = dict(zip(GridMixer._fields, mixer_operands(16, 2, dtype)))
    assert fused_grid_mixer(GridMixer(*given.values(), *SETTINGS)).dtype == dtype
    given['out_proj'] = torch.randn(7, 32).to(dtype) / 5
    assert_agrees(
        lambda *x: fused_grid_mixer(GridMixer(*x[:-1], *SETTINGS, x[-1])),
        lambda *x: torch.nn.functional.linear(composition(x[:-1], *SETTINGS), x[-1]),
        given,
        5e-3,
        sums=SUMS,
    )


def test_no_tokens_and_no_images():
    for batch, length in ((0, 15), (2, 0)):
        operands = [x.float().requires_grad_() for x in operands_of(length, 'row', batch=batch)]
        y = symmetric_ssd(Ssd(*operands))
        y.sum().backward()
        assert y.shape == operands[0].shape and all(not x.grad.any() for x in operands)


def test_gradients_of_another_shape_are_refused():
    x, taps, bias = torch.randn(2, 7, 5), torch.randn(9, 5), torch.randn(5)
    operators, short = torch.ops.vim_timm, torch.randn(2, 6, 5)
    for call in (
        lambda: operators.cpu_grid_conv_backward(short, x, taps, bias, 1, 2, 3),
        lambda: operators.cpu_gated_norm_backward(short, x, bias, x, 1e-5),
        lambda: operators.cpu_rms_norm_backward(short, x, bias, 1e-5),
    ):
        with pytest.raises(ValueError, match=r'the gradient has the shape \(2, 6, 5\), not \(2, 7, 5\)'):
            call()


def test_operators_pass_opcheck():
    tests = ('test_schema', 'test_autograd_registration', 'test_faketensor')
    x, taps, bias, z = torch.randn(2, 7, 5), torch.randn(9, 5), torch.randn(5), torch.randn(2, 7, 5)
    s, dt, scores = torch.rand(2, 2, 3, 7), torch.rand(2, 3, 7), torch.randn(2, 7, 7)
    for name, operands in (
        ('cpu_grid_conv', (x, taps, bias, 1, 2, 3)),
        ('cpu_decayed', (scores, s, dt)),
        ('cpu_gated_norm', (x, bias, z, 1e-5)),
    ):
        leaves = [t.clone().requires_grad_() if isinstance(t, torch.Tensor) else t for t in operands]
        torch.library.opcheck(getattr(torch.ops.vim_timm, name).default, tuple(leaves), test_utils=tests)
