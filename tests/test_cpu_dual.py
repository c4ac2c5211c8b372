"""The CPU kernel's state space dual for inference agrees with the law in float64, on every build."""

import pytest
import torch

from tests.kernels import error
from tests.test_ssd import operands_of, visits_of
from vim_timm.ops import Ssd, cpu, symmetric_ssd
from vim_timm.ops.cpu import library
from vim_timm.ops.plain import ssd as plain

pytestmark = pytest.mark.skipif(bool(cpu.unavailable()), reason=cpu.unavailable())

BUILDS = library.instruction_sets()
# grid, prefix tokens, orders; the last four are longer than what is computed whole
LAYOUTS = [((1, 1), 0, 'both'), ((1, 7), 0, 'row'), ((3, 5), 1, 'both'), ((6, 4), 2, 'column'), ((16, 15), 3, 'both')]
LAYOUTS += [((1, 513), 0, 'row'), ((32, 16), 1, 'both'), ((4, 150), 0, 'column'), ((25, 31), 2, 'both')]


@pytest.fixture(autouse=True)
def best_build():
    yield
    library.select(BUILDS[0])


def assert_is_the_law(given, visits):
    """The operator without gradients, beside the form in float64 that is compared with the recurrence elsewhere."""
    wide = [None if x is None else x.double() for x in given]
    with torch.no_grad():
        assert error(cpu.ssd(Ssd(*given, *visits)), plain.by_length(Ssd(*wide, *visits))) < 3e-6


@pytest.mark.parametrize('name', BUILDS)
@pytest.mark.parametrize('grid, prefix, orders', LAYOUTS, ids=str)
def test_inference_is_the_law(name, grid, prefix, orders, poison):
    library.select(name)
    length, visits = grid[0] * grid[1] + prefix, visits_of(grid, prefix, orders)
    for sizes in ({}, dict(heads=2, headdim=20, state=7), dict(heads=1, headdim=64, state=64)):
        assert_is_the_law([x.float() for x in operands_of(length, orders, **sizes)], visits)


@pytest.mark.parametrize('length', [30, 700])
def test_skip_weight_and_bias_may_be_absent_and_operands_views(length, poison):
    x, delta, A_log, B, C, _, _ = [t.float() for t in operands_of(length, 'row')]
    apart = torch.cat([x.flatten(2), B, C], 2)[:, :, 1:]  # rows that begin anywhere, as slices of a convolution's do
    apart = apart.split([x[0, 0].numel() - 1, B.shape[2], C.shape[2]], 2)
    heads = x.shape[2]
    narrow = apart[0][..., : apart[0].shape[2] // heads * heads].unflatten(2, (heads, -1))
    assert_is_the_law([narrow, delta, A_log, apart[1], apart[2], None, None], (True, None, None))


@pytest.mark.parametrize('length', [24, 600])
def test_entries_may_be_visited_in_orders_of_their_own(length, poison):
    given = [x.float() for x in operands_of(length, 'both')]
    columns = torch.stack([torch.randperm(length) for _ in given[0]])
    assert_is_the_law(given, (True, columns, None))


@pytest.mark.parametrize('length', [40, 700])
def test_threads_change_no_bit(length):
    given = [x.float() for x in operands_of(length, 'both')]
    columns, before, found = torch.randperm(length).unsqueeze(0), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with torch.no_grad():
                found.append(cpu.ssd(Ssd(*given, True, columns)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize('length', [40, 700])
def test_what_is_not_finite_stays_where_it_belongs(length):
    """Of a token's channel to all tokens of that channel; of a skip weight's absence nothing."""
    given = [x.float() for x in operands_of(length, 'row')]
    with torch.no_grad():
        given[0][0, 3, 0, 1] = float('nan')
        y = cpu.ssd(Ssd(*given))
        spoiled = torch.zeros(y.shape, dtype=torch.bool)
        spoiled[0, :, 0, 1] = True
        assert torch.equal(y.isnan(), spoiled)
        given[0][0, 3, 0, 1], given[5] = float('inf'), None
        assert not cpu.ssd(Ssd(*given)).isnan()[0, 3, 0, 1]


def test_orders_that_miss_tokens_are_refused():
    given = [x.float() for x in operands_of(30, 'both')]
    for columns in (torch.zeros(1, 30, dtype=torch.int64), torch.arange(1, 31).unsqueeze(0)):
        with torch.no_grad(), pytest.raises(ValueError, match='order of 30 tokens does not meet each of them once'):
            cpu.ssd(Ssd(*given, True, columns))
    for columns in (torch.arange(29).unsqueeze(0), torch.arange(30, dtype=torch.int32).unsqueeze(0)):
        with torch.no_grad(), pytest.raises(ValueError, match='is not torch.int'):
            cpu.ssd(Ssd(*given, True, columns))


def test_operands_that_do_not_fit_are_refused():
    x, s, growth, B = torch.randn(2, 9, 3, 4), torch.randn(2, 1, 3, 9), torch.rand(2, 1, 9, 3), torch.randn(2, 9, 5)
    scores, dt = torch.randn(2, 9, 9), torch.rand(2, 3, 9)
    for orders in (0, 3):
        with pytest.raises(ValueError, match=f'growth is of {orders} orders of tokens'):
            wrong = growth.repeat(1, orders, 1, 1)
            torch.ops.vim_timm.cpu_dual(x, dt.transpose(1, 2), wrong, B, B, None, None, None)
        with pytest.raises(ValueError, match=f's is of {orders} orders of tokens'):
            torch.ops.vim_timm.cpu_decayed(scores, s.repeat(1, orders, 1, 1), dt)
    with pytest.raises(ValueError, match='scores has the shape'):
        torch.ops.vim_timm.cpu_decayed(scores[:, :8], s, dt)
    with pytest.raises(ValueError, match='dt has the shape'):
        torch.ops.vim_timm.cpu_decayed(scores, s, dt[:, :2])
    with pytest.raises(ValueError, match='the gradient has the shape'):
        torch.ops.vim_timm.cpu_decayed_backward(torch.randn(2, 3, 9, 8), scores, s, dt)


@pytest.mark.parametrize('wide', ['C', 'D'])
def test_an_operand_in_float64_is_taken_with_gradients_and_without(wide):
    given = Ssd(*[x.float() for x in operands_of(12, 'row')])
    given = given._replace(**{wide: getattr(given, wide).double()})
    with torch.no_grad():
        y = symmetric_ssd(given)
    torch.testing.assert_close(symmetric_ssd(given._replace(x=given.x.requires_grad_())), y)


def test_gradients_are_refused_by_the_operator_and_had_by_the_function():
    x, delta, A_log, B, C, D, bias = [t.float() for t in operands_of(12, 'row')]
    dt = torch.nn.functional.softplus(delta + bias)
    growth = (dt * A_log.exp()).unsqueeze(1)
    y = torch.ops.vim_timm.cpu_dual(x.requires_grad_(), dt, growth, B, C, D, None, None)
    with pytest.raises(RuntimeError, match='this kernel is for inference'):
        y.sum().backward()
    learned = symmetric_ssd(Ssd(x, delta, A_log, B, C, D, bias))
    torch.testing.assert_close(learned, y, rtol=1e-4, atol=1e-5)
    learned.sum().backward()
    assert x.grad is not None
