"""The CPU kernel's inside of a Vision Mamba 2 mixer agrees with plain operators in float64, on every build."""

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels import assert_agrees, error, with_gradients
from tests.test_masked_kernels import MASKED, kept_of, masked_composition
from tests.test_ssd import composition, mixer_operands, operands_of, visits_of
from vim_timm.layers.bissd import BiSSD
from vim_timm.ops import GridMixer, Ssd, cpu, fused_grid_mixer, symmetric_ssd, use_scan_backend
from vim_timm.ops.cpu import library
from vim_timm.ops.plain import ssd as plain

pytestmark = pytest.mark.skipif(bool(cpu.unavailable()), reason=cpu.unavailable())

BUILDS = library.instruction_sets()
SUMS = ('A_log', 'D', 'delta_bias')  # gradients that are sums of what nearly cancels
# grid, prefix tokens, orders
LAYOUTS = [((1, 1), 0, 'both'), ((1, 7), 0, 'row'), ((3, 5), 1, 'both'), ((6, 4), 2, 'column'), ((14, 14), 0, 'both')]
LONG = [((25, 26), 1, 'both'), ((4, 150), 0, 'column')]
LONG_MASKED = [((27, 25), 540, 1, 'both')]


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


@pytest.mark.parametrize('name', BUILDS)
@pytest.mark.parametrize('grid, kept, prefix, orders', MASKED + LONG_MASKED, ids=str)
def test_the_inside_of_a_masked_images_mixer_is_that_of_plain_operators(name, grid, kept, prefix, orders, poison):
    library.select(name)
    length = kept + prefix
    operands = mixer_operands(length, 2 if orders == 'both' else 1, torch.float32, heads=3, headdim=12, state=9)
    settings = (1e-5, 9, orders != 'column', prefix, *grid)
    keep = kept_of(grid, kept, 2)

    def fused(*x):
        return fused_grid_mixer(GridMixer(*x, *settings, keep=keep))

    assert_agrees(
        fused,
        lambda *x: masked_composition(x, *settings, keep),
        dict(zip(GridMixer._fields, operands)),
        3e-6,
        sums=SUMS,
        rounded=lambda *x: masked_composition([t.float() for t in x], *settings, keep),
        zero=('A_log',) if kept < 2 else (),
    )
    with torch.no_grad():  # another form of the sum
        assert error(fused(*operands), masked_composition([x.double() for x in operands], *settings, keep)) < 1e-5


def test_a_whole_image_that_is_masked_nowhere_has_the_same_bits():
    operands = mixer_operands(16, 2, torch.float32)
    every = torch.arange(15).expand(2, -1)
    whole, masked = (cpu.grid_mixer(GridMixer(*operands, *SETTINGS, keep=keep)) for keep in (None, every))
    assert torch.equal(whole, masked)


@pytest.mark.parametrize(
    'keep, message',
    [
        (torch.tensor([[0, 1, 15], [0, 1, 2]]), 'do not ascend, or leave a grid of 3 x 5'),
        (torch.tensor([[0, 1, 2], [-1, 1, 2]]), 'do not ascend, or leave a grid of 3 x 5'),
        (torch.tensor([[0, 1, 2], [4, 3, 5]]), 'do not ascend, or leave a grid of 3 x 5'),
        (torch.tensor([[0, 1, 2], [4, 4, 5]]), 'do not ascend, or leave a grid of 3 x 5'),
        (torch.tensor([[0, 1, 2]]), r'places of 2 x 3 tokens on a grid are not torch.int64 \[1, 3\] on cpu'),
        (torch.tensor([[0, 1], [0, 1]]), 'places of 2 x 3 tokens'),
        (torch.tensor([[0, 1, 2], [0, 1, 2]]).int(), 'are not torch.int32'),
    ],
    ids=str,
)
def test_places_that_are_none_of_a_grid_are_refused(keep, message):
    operands = mixer_operands(4, 2, torch.float32)
    with pytest.raises(ValueError, match=message):
        cpu.grid_mixer(GridMixer(*operands, *SETTINGS, keep=keep))
    grad, (x, taps) = torch.randn(2, 4, 5), (torch.randn(2, 4, 5), torch.randn(9, 5))
    with pytest.raises(ValueError, match=message):
        torch.ops.vim_timm.cpu_grid_conv_backward(grad, x, taps, None, 1, 3, 5, keep)


@pytest.mark.parametrize('orders', ['both', 'alternate'])
def test_a_masked_image_takes_the_fused_operator(orders, monkeypatch):
    model = timm.create_model('vim2_tiny_patch4_32', depth=2, embed_dim=64, num_classes=0, orders=orders)
    images, keep = torch.randn(2, 3, 32, 32), kept_of((8, 8), 16, 2)
    monkeypatch.setattr(BiSSD, '_convolve', lambda *_: pytest.fail('the mixer is composed'))
    fused = model.encode(*model.embed(images, keep), keep)[0]
    fused.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.blocks.named_parameters()}
    monkeypatch.undo()
    model.double().zero_grad()
    with use_scan_backend('reference'):
        composed = model.encode(*model.embed(images.double(), keep), keep)[0]
    composed.square().mean().backward()
    assert error(fused, composed) < 1e-5
    assert all(error(gradients[name], p.grad) < 1e-3 for name, p in model.blocks.named_parameters())


def test_a_masked_image_counts_as_the_whole_one_on_every_backend():
    model = timm.create_model('vim2_tiny_patch4_32', depth=1, embed_dim=64, num_classes=0)
    images, keep, found = torch.randn(2, 3, 32, 32), kept_of((8, 8), 16, 2), []
    for backend in ('auto', 'reference'):
        with use_scan_backend(backend), FlopCounterMode(display=False) as counter:
            model.encode(*model.embed(images, keep), keep)[0].sum().backward()
        found.append(counter.get_total_flops())
    assert found[0] == found[1] > 0


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


@pytest.mark.parametrize('masked', [False, True])
def test_threads_change_no_bit(masked):
    keep = torch.arange(15).expand(3, -1) if masked else None
    given = dict(zip(GridMixer._fields, mixer_operands(16, 2, torch.float32, batch=3)))
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(with_gradients(lambda *x: cpu.grid_mixer(GridMixer(*x, *SETTINGS, keep)), given))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one[name], found[0][name]) for one in found for name in one)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_two_byte_tensors_are_computed_in_float32(dtype):
    given = dict(zip(GridMixer._fields, mixer_operands(16, 2, dtype)))
    assert fused_grid_mixer(GridMixer(*given.values(), *SETTINGS)).dtype == dtype
    given['out_proj'] = torch.randn(7, 32).to(dtype) / 5
    assert_agrees(
        lambda *x: fused_grid_mixer(GridMixer(*x[:-1], *SETTINGS, out_proj=x[-1])),
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
        lambda: operators.cpu_grid_conv_backward(short, x, taps, bias, 1, 2, 3, None),
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
        ('cpu_grid_conv', (x, taps, bias, 1, 2, 3, None)),
        ('cpu_grid_conv', (x, taps, bias, 3, 2, 3, torch.tensor([[0, 1, 3, 5], [1, 2, 3, 4]]))),
        ('cpu_decayed', (scores, s, dt)),
        ('cpu_gated_norm', (x, bias, z, 1e-5)),
    ):
        leaves = [t.clone() if isinstance(t, torch.Tensor) else t for t in operands]
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                leaf.requires_grad_()
        torch.library.opcheck(getattr(torch.ops.vim_timm, name).default, tuple(leaves), test_utils=tests)
