"""The symmetric state space dual: its forms agree in float64, and the Triton kernels with them.

The interpreter must be chosen before Triton is imported: a run without a GPU starts one with TRITON_INTERPRET=1.
"""

import os

import pytest
import torch
import torch.nn.functional as F

from tests.kernels import assert_agrees, kept_bytes, pass_in_the_interpreter, with_gradients
from vim_timm.layers import BiSSD, Layout
from vim_timm.ops import GridConv, GridMixer, Ssd, cpu, fused_grid_mixer, grid_conv, symmetric_ssd, use_scan_backend
from vim_timm.ops.plain import ssd as plain
from vim_timm.ops.triton_kernels import ssd_op
from vim_timm.ops.triton_kernels.grid_mixer_op import GatedNorm, kernel_modules
from vim_timm.ops.triton_kernels.grid_mixer_op import GridMixer as FusedGridMixer
from vim_timm.ops.triton_kernels.ssd_launch import Grid

INTERPRETER = os.environ.get('TRITON_INTERPRET') == '1'
GPU = torch.cuda.is_available() and not INTERPRETER
DEVICE = 'cuda' if GPU else 'cpu'
FORMS = {
    'quadratic': plain.quadratic,
    'chunks of 8': lambda operands: plain.chunked(operands, 8),
    'one chunk': plain.chunked,
}
# grid, prefix tokens, orders
LAYOUTS = [
    ((1, 1), 0, 'both'),
    ((1, 7), 0, 'row'),
    ((3, 5), 1, 'both'),
    ((6, 4), 2, 'column'),
    ((9, 7), 0, 'both'),
    ((0, 0), 0, 'row'),
]
kernels = pytest.mark.skipif(not (GPU or INTERPRETER), reason='needs an NVIDIA GPU or TRITON_INTERPRET=1')


def column_places(height, width, prefix):
    grid = torch.arange(height * width, device=DEVICE).view(height, width).t().reshape(-1)
    return torch.cat([torch.arange(prefix, device=DEVICE), prefix + grid])[None]


def visits_of(grid, prefix, orders):
    moves = (torch.arange(grid[0] * grid[1] + prefix, device=DEVICE) >= prefix).float()
    return orders != 'column', None if orders == 'row' else column_places(*grid, prefix), moves


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, device=DEVICE)


def operands_of(length, orders, batch=2, heads=3, headdim=4, state=5):
    torch.manual_seed(0)
    count = 2 if orders == 'both' else 1
    steps, matrix = (batch, length, heads), (batch, length, state)
    return [
        draw(*steps, headdim),
        draw(*steps),
        draw(count, heads),
        draw(*matrix),
        draw(*matrix),
        draw(heads),
        draw(heads),
    ]


def results(function, operands, *others):
    """The output and the gradients of a weighted sum of it."""
    leaves = [x if x is None else x.detach().requires_grad_() for x in operands]
    y = function(leaves, *others)
    torch.manual_seed(1)
    weights = torch.randn(y.shape, dtype=torch.float64, device=y.device).to(operands[0].dtype)
    return [y, *torch.autograd.grad(y, [x for x in leaves if x is not None], weights.to(y.dtype))]


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('grid, prefix, orders', LAYOUTS, ids=str)
def test_every_form_equals_the_law(grid, prefix, orders, form):
    length = grid[0] * grid[1] + prefix
    if length == 0 and form != 'quadratic':
        return  # nothing to cut
    operands, visits = operands_of(length, orders), visits_of(grid, prefix, orders)
    found = results(lambda x, v: FORMS[form](Ssd(*x, *v)), operands, visits)
    if length == 0:
        assert found[0].shape == operands[0].shape
        return
    wanted = results(lambda x, v: plain.reference(Ssd(*x, *v)), operands, visits)
    for f, w in zip(found, wanted):
        torch.testing.assert_close(f, w, rtol=1e-10, atol=1e-10)


def test_the_law_is_a_forward_and_a_backward_mamba_2_with_the_diagonal_once():
    x, delta, A_log, B, C, D, bias = operands_of(9, 'row')
    dt = F.softplus(delta + bias)
    s = (dt * A_log.exp()).cumsum(1)
    mask = torch.exp(-(s[:, :, None] - s[:, None]).abs())
    wanted = torch.einsum('bin,bjn,bijh,bjh,bjhp->bihp', C, B, mask, dt, x) + D[:, None] * x
    found = plain.reference(Ssd(x, delta, A_log, B, C, D, bias))
    torch.testing.assert_close(found, wanted)


def test_tokens_of_a_masked_image_are_visited_in_their_own_order():
    operands = operands_of(6, 'both')
    keep = torch.tensor([[0, 1, 5, 6, 9, 11], [1, 2, 3, 4, 8, 10]], device=DEVICE)  # of a grid of 3 x 4
    columns = torch.argsort(keep % 4 * 3 + keep // 4, dim=1)
    found = symmetric_ssd(Ssd(*operands, True, columns))
    for i in range(2):
        one = [x if x.ndim < 3 else x[i : i + 1] for x in operands]
        alone = plain.reference(Ssd(*one, True, columns[i : i + 1]))
        torch.testing.assert_close(found[i : i + 1], alone)


@pytest.mark.parametrize('form', [plain.quadratic, plain.chunked, plain.reference])
def test_large_decays_give_finite_gradients(form):
    operands = operands_of(33, 'both')
    operands[1] = operands[1] * 1e3
    visits = visits_of((11, 3), 0, 'both')
    assert all(torch.isfinite(x).all() for x in results(lambda x, v: form(Ssd(*x, *v)), operands, visits))


def steep_operands(grid=(11, 3), **sizes):
    """Steps of 2e-4 around ones of 1e4, and a head that decays at once."""
    operands = [x.float() for x in operands_of(grid[0] * grid[1], 'both', **sizes)]
    operands[1] -= 9
    operands[1][:, 8::100] = 1e4
    operands[2][:] = torch.tensor([5.0, float('inf')], device=DEVICE)
    operands[6] = torch.zeros_like(operands[6])
    return operands


def assert_steep_agrees(function, operands, grid=(11, 3)):
    visits = visits_of(grid, 0, 'both')
    assert_agrees(
        lambda *x: function(Ssd(*x, *visits)),
        lambda *x: plain.reference(Ssd(*x, *visits)),
        dict(zip(Ssd._fields, operands)),
        1e-4,
        sums=('A_log', 'delta_bias'),
    )


@pytest.mark.parametrize('form', [*FORMS, 'cpu'])
def test_a_steep_step_leaves_the_smaller_ones_behind_it_exact(form):
    if form == 'cpu' and (DEVICE != 'cpu' or cpu.unavailable()):
        pytest.skip('needs the CPU kernel')
    assert_steep_agrees(cpu.ssd if form == 'cpu' else FORMS[form], steep_operands(heads=2))


def test_another_number_of_orders_is_refused():
    with pytest.raises(ValueError, match='A_log has 2 rows for 1 orders'):
        symmetric_ssd(Ssd(*operands_of(4, 'both')))


@pytest.mark.parametrize('place, shape', [(1, (2, 4, 1)), (3, (1, 4, 5)), (4, (2, 4, 1)), (5, (1,)), (6, (2,))])
def test_operands_of_other_shapes_are_refused(place, shape):
    operands = operands_of(4, 'row')
    operands[place] = torch.zeros(shape)
    with pytest.raises(ValueError, match='do not fit together'):
        symmetric_ssd(Ssd(*operands))


def test_a_forced_backend_without_the_operator_does_not_follow_autocast():
    operands = [x.float().cpu() for x in operands_of(12, 'row')]
    wanted = symmetric_ssd(Ssd(*operands))
    with use_scan_backend('cpu'), torch.autocast('cpu', torch.bfloat16):
        torch.testing.assert_close(symmetric_ssd(Ssd(*operands)), wanted)


def test_the_operator_scripts_and_exports():
    class Model(torch.nn.Module):
        def forward(self, x, delta, A_log, B, C, D, bias, columns):
            return symmetric_ssd(Ssd(x, delta, A_log, B, C, D, bias, True, columns))

    operands = (*operands_of(12, 'both'), column_places(3, 4, 0))
    wanted = Model()(*operands)
    torch.testing.assert_close(torch.jit.script(Model())(*operands), wanted)
    torch.testing.assert_close(torch.export.export(Model(), operands).module()(*operands), wanted)


@pytest.mark.skipif(GPU or INTERPRETER, reason='this run has the kernels itself')
@pytest.mark.timeout(900)
def test_all_of_this_in_the_interpreter():
    pass_in_the_interpreter([__file__], 'kernel')


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
SHAPES = [
    ((1, 1), 0, 'both', torch.float32),
    ((5, 4), 0, 'column', torch.float32),
    ((4, 17), 2, 'both', torch.float32),
    ((2, 8), 1, 'both', torch.bfloat16),
    ((2, 8), 1, 'row', torch.float16),
    ((1, 257), 0, 'row', torch.float32),  # longer than a row of scores: in chunks
    ((13, 20), 0, 'both', torch.float32),
    ((16, 17), 1, 'both', torch.bfloat16),
    ((20, 13), 2, 'column', torch.float16),
    ((19, 27), 0, 'column', torch.float32),
    ((1, 300), 1, 'row', torch.bfloat16),
]
if GPU:  # long for the interpreter
    GRIDS = [
        ((1, 7), 0),
        ((7, 9), 0),
        ((8, 8), 0),
        ((14, 14), 0),
        ((14, 14), 1),
        ((16, 16), 0),
        ((28, 28), 1),
        ((78, 78), 0),
    ]
    SHAPES += [(*grid, orders, dtype) for grid in GRIDS for orders in ('both', 'column') for dtype in TOLERANCE]


@kernels
@pytest.mark.parametrize('grid, prefix, orders, dtype', SHAPES, ids=str)
def test_kernels_equal_the_law(grid, prefix, orders, dtype, triton):
    length = grid[0] * grid[1] + prefix
    batch = 1 if INTERPRETER and length > 257 else 2  # images of the others are apart
    exact = operands_of(length, orders, batch=batch, heads=2, headdim=16, state=16)
    exact[1] = exact[1] - 2
    rounded = [x.to(torch.float32 if i in (2, 5, 6) else dtype) for i, x in enumerate(exact)]
    visits = visits_of(grid, prefix, orders)
    given = dict(zip(Ssd._fields, rounded))
    # A_log's and the bias's are sums of what nearly cancels; A_log's of one token is zero
    assert_agrees(
        lambda *x: symmetric_ssd(Ssd(*x, *visits)),
        lambda *x: plain.reference(Ssd(*x, *visits)),
        given,
        TOLERANCE[dtype],
        sums=('A_log', 'delta_bias'),
        zero=('A_log',) if length == 1 else (),
    )


@kernels
@pytest.mark.parametrize('orders', ['column', 'both'])
def test_kernels_visit_a_grid_as_they_visit_a_table_of_it(orders, triton):
    prefix, height, width = 1, 13, 23
    length = prefix + height * width
    operands = [x.float() for x in operands_of(length, orders, batch=1, heads=2, headdim=16, state=16)]
    rows, columns, moves = visits_of((height, width), prefix, orders)
    found = []
    for given, grid in (
        (Ssd(*operands, rows), Grid(prefix, height, width)),
        (Ssd(*operands, rows, columns, moves), None),
    ):
        ssd = ssd_op.ssd_of(given, grid)
        found.append(ssd.forward(*ssd.decays(), torch.float32))
    assert torch.equal(*found)


def composition(operands, eps, state, rows, prefix, height, width, law=plain.reference):
    """What the fused operator computes, of plain operators."""
    zxbcdt, conv, conv_bias, delta_bias, A_log, D, norm = operands
    dim, heads = norm.shape[0], A_log.shape[1]
    z, xbc, delta = zxbcdt[..., : 2 * dim + 2 * state + heads].split([dim, dim + 2 * state, heads], -1)
    kernel = conv.view(-1, 1, 3, 3)
    grid = xbc[:, prefix:].transpose(1, 2).unflatten(-1, (height, width))
    alone = xbc[:, :prefix].transpose(1, 2).unflatten(-1, (-1, 1)) if prefix else grid[..., :0, :1]
    parts = [F.conv2d(alone, kernel[..., 1:2, 1:2], conv_bias, groups=len(conv)).flatten(2)] if prefix else []
    parts.append(F.conv2d(grid, kernel, conv_bias, padding=1, groups=len(conv)).flatten(2))
    x, B, C = F.silu(torch.cat(parts, 2).transpose(1, 2)).split([dim, state, state], -1)
    orders = 'both' if len(A_log) == 2 else 'row' if rows else 'column'
    x = x.unflatten(-1, (heads, dim // heads))
    y = law(Ssd(x, delta, A_log, B, C, D, delta_bias, *visits_of((height, width), prefix, orders)))
    return F.rms_norm(y.flatten(2), (dim,), norm, eps) * F.silu(z)


def mixer_operands(length, orders, dtype, batch=2, heads=2, headdim=16, state=16):
    torch.manual_seed(0)
    dim = heads * headdim
    channels, row = dim + 2 * state, 8 * -(-(2 * dim + 2 * state + heads) // 8)
    zxbcdt = draw(batch, length, row + 8).to(dtype)[..., :row]
    weights = [draw(channels, 9) / 3, draw(channels), draw(heads) - 2, draw(orders, heads), draw(heads), draw(dim)]
    return [zxbcdt, *[w.float() for w in weights]]


FUSED = SHAPES if GPU else [shape for shape in SHAPES if shape[0][0] * shape[0][1] < 100]


@kernels
@pytest.mark.parametrize('most', [256, 32])  # tokens from which on the sums are in chunks
def test_kernels_keep_small_steps_behind_a_steep_one_exact(most, triton, monkeypatch):
    monkeypatch.setattr(ssd_op, 'MAX_LENGTH', most)
    assert_steep_agrees(symmetric_ssd, steep_operands(heads=2, headdim=16, state=16))


@kernels
def test_kernels_keep_small_steps_behind_a_steep_one_exact_over_several_chunks(triton):
    grid = (11, 27)
    assert_steep_agrees(symmetric_ssd, steep_operands(grid, batch=1, heads=2, headdim=16, state=16), grid)


@kernels
@pytest.mark.parametrize('most', [256, 32])  # tokens from which on the sums are in chunks
@pytest.mark.parametrize('grid, prefix, orders, dtype', FUSED[1:], ids=str)
def test_fused_kernels_equal_plain_operators(grid, prefix, orders, dtype, most, triton, monkeypatch):
    if most < 256 and grid[0] * grid[1] < 32:
        pytest.skip('in one chunk')
    monkeypatch.setattr(ssd_op, 'MAX_LENGTH', most)

    def fused(*operands):
        return fused_grid_mixer(GridMixer(*operands, *settings))

    length = grid[0] * grid[1] + prefix
    batch = 1 if INTERPRETER and 64 < length <= most else 2  # images of shorter ones and of those in chunks are apart
    operands = mixer_operands(length, 2 if orders == 'both' else 1, dtype, batch=batch)
    settings = (1e-5, 16, orders != 'column', prefix, *grid)
    given = dict(zip(GridMixer._fields, operands))
    first = assert_agrees(
        fused,
        lambda *operands: composition(operands, *settings),
        given,
        2 * TOLERANCE[dtype],
        sums=('A_log', 'D', 'delta_bias', 'conv', 'conv_bias'),
    )
    if GPU:  # the interpreter has no order to depend on
        second = with_gradients(fused, given)
        assert all(torch.equal(first[name], second[name]) for name in first)


@kernels
@pytest.mark.parametrize('heads, most', [(1, 256), (3, 4), (9, 256)])  # the second tokens make chunks
def test_fused_kernels_take_any_number_of_heads(heads, most, triton, monkeypatch):
    monkeypatch.setattr(ssd_op, 'MAX_LENGTH', most)
    settings = (1e-5, 16, True, 1, 2, 3)
    operands = mixer_operands(7, 2, torch.float32, heads=heads)
    assert_agrees(
        lambda *operands: fused_grid_mixer(GridMixer(*operands, *settings)),
        lambda *operands: composition(operands, *settings),
        dict(zip(GridMixer._fields, operands)),
        2 * TOLERANCE[torch.float32],
        sums=('A_log', 'D', 'delta_bias', 'conv', 'conv_bias'),
    )


@kernels
@pytest.mark.parametrize('grid, prefix, orders, dtype', FUSED[1:5], ids=str)
def test_fused_kernels_project_as_torch_does(grid, prefix, orders, dtype, triton):
    settings, length = (1e-5, 16, orders != 'column', prefix, *grid), grid[0] * grid[1] + prefix
    operands = mixer_operands(length, 2 if orders == 'both' else 1, dtype, batch=1)
    given = {**dict(zip(GridMixer._fields, operands)), 'out_proj': (draw(7, 32) / 5).to(dtype)}
    assert_agrees(
        lambda *operands: fused_grid_mixer(GridMixer(*operands[:-1], *settings, out_proj=operands[-1])),
        lambda *operands: F.linear(composition(operands[:-1], *settings), operands[-1]),
        given,
        2 * TOLERANCE[dtype],
        sums=('A_log', 'D', 'delta_bias', 'conv', 'conv_bias'),
    )


@kernels
@pytest.mark.parametrize('before, row, dim, eps', [(0, 40, 32, 1e-5), (1, 41, 33, 1e-5), (3, 46, 40, 0.0)])
def test_the_gated_norm_takes_rows_of_any_stride(before, row, dim, eps, triton):
    inside = slice(None), slice(1, 6), slice(before, before + dim)  # some tokens and channels
    z, around = draw(3, 7, row).float(), torch.full((3, 7, row), torch.nan, device=DEVICE)
    y, weight, grad = draw(3, 5, dim).float(), draw(dim).float(), draw(3, 5, dim).float()
    norm = GatedNorm(kernel_modules()['gated_norm_kernels'], y, z[inside], weight, eps)
    leaves = [x.double().requires_grad_() for x in (y, z[inside], weight)]
    wanted = F.rms_norm(leaves[0], (dim,), leaves[2], eps) * F.silu(leaves[1])
    gradients = torch.autograd.grad(wanted, leaves, grad.double())
    outputs = [norm.forward(), grad]  # the output takes the place of its gradient
    grad_y, parts = norm.backward(grad, around[inside], again=True)
    found = [*outputs, grad_y, around[inside], parts.sum(0)]
    for x, right in zip(found, (wanted, wanted, *gradients), strict=True):
        torch.testing.assert_close(x.double(), right, rtol=1e-5, atol=1e-5)
    assert around.isnan().sum() == around.numel() - grad.numel()


@kernels
def test_sums_over_more_parts_than_a_step_takes(triton):
    mixer = FusedGridMixer(GridMixer(*mixer_operands(6, 2, torch.float32), 1e-5, 16, True, 0, 2, 3))
    shapes = (257, 10, 13), (1, 5), (300, 2, 3), (2, 9), (513, 150)
    parts = [draw(*shape) for shape in shapes]
    taps, *others = (part.sum(0) for part in parts)
    found = mixer.sums(*(part.float() for part in parts))
    for x, right in zip(found, (taps[:9].t(), taps[9], *others), strict=True):
        torch.testing.assert_close(x.double(), right, rtol=1e-5, atol=1e-4)


@kernels
def test_a_mixer_of_kernels_keeps_no_gated_norm(triton):
    """A token's bytes for the backward pass: in_proj's input and output, the convolution's, step sizes, their sums in
    each order, and the sum before the norm; not what out_proj takes."""
    mixer, layout = BiSSD(16, d_state=16, headdim=16).to(DEVICE), Layout((3, 4), [], None)
    x = torch.randn(3, 12, 16, device=DEVICE).bfloat16()
    with torch.autocast(DEVICE, torch.bfloat16):
        bytes_of_image = kept_bytes(lambda: mixer(x, layout)) - kept_bytes(lambda: mixer(x[:2].clone(), layout))
    row = 104 if GPU else 2 * 32 + 2 * 16 + 2  # padded there
    assert bytes_of_image == 12 * (2 * (16 + row + 64 + 32) + 4 * 2 * (1 + 2))


@kernels
@pytest.mark.parametrize('prefix, bias, dtype', [(0, True, torch.float32), (2, False, torch.bfloat16)], ids=str)
def test_the_convolution_alone_equals_plain_operators(prefix, bias, dtype, triton):
    """That of a masked image, whose tokens are gathered before the sums."""
    height, width, channels = 9, 21, 48
    given = {
        'x': draw(2, prefix + height * width, channels + 8).to(dtype)[..., :channels],
        'weight': draw(channels, 9).float() / 3,
        'bias': draw(channels).float() if bias else None,
    }

    def plain_conv(x, weight, bias):
        kernel, parts = weight.view(-1, 1, 3, 3), []
        if prefix:
            alone = x[:, :prefix].transpose(1, 2).unsqueeze(-1)
            parts.append(F.conv2d(alone, kernel[..., 1:2, 1:2], bias, groups=channels).flatten(2))
        grid = x[:, prefix:].transpose(1, 2).unflatten(-1, (height, width))
        parts.append(F.conv2d(grid, kernel, bias, padding=1, groups=channels).flatten(2))
        return F.silu(torch.cat(parts, 2)).transpose(1, 2)

    given = {name: x for name, x in given.items() if x is not None}
    settings = (prefix, height, width)
    assert_agrees(
        lambda x, weight, bias=None: grid_conv(GridConv(x, weight, bias, *settings)),
        lambda x, weight, bias=None: plain_conv(x, weight, bias),
        given,
        TOLERANCE[dtype],
    )


@kernels
def test_operands_past_whose_ends_kernels_would_read_are_refused(triton):
    x, weight, bias = draw(2, 12, 16).float(), draw(16, 9).float(), draw(16).float()
    for given, message in (
        (GridConv(x, weight, bias, 1, 3, 4), '12 tokens are not 1 and a grid of 3 x 4'),
        (GridConv(x, weight[:8], bias, 0, 3, 4), 'do not fit 16 channels'),
        (GridConv(x, weight, bias[:8], 0, 3, 4), 'do not fit 16 channels'),
    ):
        with pytest.raises(ValueError, match=message):
            grid_conv(given)
    operands = [x.float() for x in operands_of(12, 'both', heads=2, headdim=16, state=16)]
    rows, columns, moves = visits_of((3, 4), 0, 'both')
    for visits in ((columns[:, :9], moves), (columns.expand(3, -1), moves), (columns, moves[:9])):
        with pytest.raises(ValueError, match='do not fit'):
            symmetric_ssd(Ssd(*operands, rows, *visits))
    with pytest.raises(ValueError, match='12 tokens are not 0 and a grid of 4 x 4'):
        fused_grid_mixer(GridMixer(*mixer_operands(12, 2, torch.float32), 1e-5, 16, True, 0, 4, 4))


@kernels
def test_kernels_take_parameters_of_any_stride(triton):
    operands = [x.float() for x in operands_of(12, 'both', batch=1, heads=2, headdim=16, state=16)]
    visits = visits_of((3, 4), 0, 'both')
    strided = [torch.stack([x, x + 1], dim=-1)[..., 0] if x.ndim == 1 else x for x in operands]
    for found, wanted in zip(
        *(results(lambda x, v: symmetric_ssd(Ssd(*x, *v)), x, visits) for x in (strided, operands))
    ):
        assert torch.equal(found, wanted)
    operands, settings = mixer_operands(12, 2, torch.float32, batch=1), (1e-5, 16, True, 0, 3, 4)
    strided = [torch.stack([x, x + 1], dim=-1)[..., 0] if x.ndim == 1 else x for x in operands]
    found, wanted = (results(lambda x: fused_grid_mixer(GridMixer(*x, *settings)), x) for x in (strided, operands))
    assert all(torch.equal(f, w) for f, w in zip(found, wanted))


@kernels
def test_fused_kernels_take_no_image(triton):
    operands, settings = mixer_operands(12, 2, torch.float32, batch=0), (1e-5, 16, True, 0, 3, 4)
    found = results(lambda x: fused_grid_mixer(GridMixer(*x, *settings)), operands)
    assert found[0].shape == (0, 12, 32) and not any(gradient.any() for gradient in found[1:])


@kernels
def test_kernels_count_their_operations(triton):
    from torch.utils.flop_counter import FlopCounterMode

    operands, settings = mixer_operands(20, 2, torch.float32, batch=1), (1e-5, 16, True, 0, 4, 5)
    operands[0].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        y = fused_grid_mixer(GridMixer(*operands, *settings))
        forward = counter.get_total_flops()
        y.sum().backward()
    assert forward > 2 * 20 * 20 * (16 + 32) and counter.get_total_flops() > 2 * forward
