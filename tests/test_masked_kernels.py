"""The Triton kernels of a masked image's mixer agree with plain operators on the whole image, in float64.

The interpreter must be chosen before Triton is imported: a run without a GPU starts one with TRITON_INTERPRET=1.
"""

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import vim_timm  # noqa: F401  registers the models
from tests.kernels import assert_agrees, error, kept_bytes, pass_in_the_interpreter, with_gradients
from tests.test_ssd import DEVICE, GPU, INTERPRETER, TOLERANCE, kernels, mixer_operands
from vim_timm.layers import BiSSD, Layout
from vim_timm.ops import GridMixer, Ssd, Visible, fused_grid_mixer, triton_kernels, use_scan_backend, visible_neighbours
from vim_timm.ops.backends import TABLE
from vim_timm.ops.plain import ssd as plain
from vim_timm.ops.triton_kernels import masked_conv_launch, ssd_op
from vim_timm.ops.triton_kernels.ssd_launch import precision

SUMS = ('A_log', 'D', 'delta_bias', 'conv', 'conv_bias')  # gradients that are sums of what nearly cancels
# grid, kept patches, prefix tokens, orders
MASKED = [
    ((1, 1), 1, 0, 'both'),
    ((1, 9), 3, 0, 'row'),
    ((5, 7), 1, 0, 'column'),
    ((3, 5), 1, 1, 'both'),
    ((5, 7), 0, 2, 'both'),
    ((3, 4), 12, 1, 'both'),
    ((7, 5), 9, 2, 'column'),
    ((14, 14), 49, 0, 'both'),
    ((14, 14), 49, 0, 'column'),
]
# the same, d_state, channels of a head, dtype
SIZES = [
    *((*layout, 16, 16, torch.float32) for layout in MASKED),
    ((6, 5), 17, 0, 'row', 32, 64, torch.bfloat16),
    ((6, 5), 17, 1, 'column', 64, 32, torch.float16),
    ((9, 9), 70, 0, 'both', 16, 32, torch.bfloat16),
    ((11, 12), 66, 1, 'column', 32, 16, torch.float32),
]
if GPU:  # long for the interpreter
    SIZES += [
        ((14, 14), 49, prefix, orders, 32, headdim, dtype)
        for prefix in (0, 1)
        for orders in ('row', 'column', 'both')
        for headdim in (32, 64)
        for dtype in TOLERANCE
    ]
    SIZES += [((27, 25), 540, 1, 'both', 32, 64, dtype) for dtype in TOLERANCE]
    SIZES += [((32, 32), 256, 0, 'column', 32, 64, dtype) for dtype in TOLERANCE]


class Calls(TorchDispatchMode):
    """How often operators run whose name has `part` in it."""

    def __init__(self, part):
        super().__init__()
        self.part, self.count = part, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += self.part in function.name()
        return function(*args, **(kwargs or {}))


def kept_of(grid, kept, batch, device='cpu'):
    """Random places (B, kept), ascending, of other patches in each image and at every call."""
    return torch.rand(batch, grid[0] * grid[1], device=device).argsort(1)[:, :kept].sort(1).values


def masked_composition(operands, eps, state, rows, prefix, height, width, keep, law=plain.by_length):
    """What the fused operator computes of masked images, of plain operators on whole ones, one after the other."""
    zxbcdt, conv, conv_bias, delta_bias, A_log, D, norm = operands
    dim, heads, outputs, device = norm.shape[0], A_log.shape[1], [], zxbcdt.device
    both = len(A_log) == 2
    moves = (torch.arange(zxbcdt.shape[1], device=device) >= prefix).float()
    for row, places in zip(zxbcdt[..., : 2 * dim + 2 * state + heads], keep):
        z, xbc, delta = row.split([dim, dim + 2 * state, heads], -1)
        image = xbc.new_zeros(height * width, xbc.shape[1]).index_copy(0, places, xbc[prefix:])
        image = image.t().reshape(1, -1, height, width)
        image = F.conv2d(image, conv.view(-1, 1, 3, 3), conv_bias, padding=1, groups=len(conv))
        alone = xbc[:prefix] * conv[:, 4] + (0.0 if conv_bias is None else conv_bias)
        xbc = F.silu(torch.cat([alone, image[0].flatten(1).t()[places]]))
        x, B, C = (t[None] for t in xbc.split([dim, state, state], -1))
        by_column = sorted(range(len(places)), key=lambda i: (int(places[i]) % width, int(places[i])))
        columns = torch.tensor([[*range(prefix), *(prefix + i for i in by_column)]], device=device)
        visits = rows, columns if both or not rows else None, moves
        y = law(Ssd(x.unflatten(-1, (heads, -1)), delta[None], A_log, B, C, D, delta_bias, *visits))
        outputs.append(F.rms_norm(y.flatten(2), (dim,), norm, eps) * F.silu(z))
    return torch.cat(outputs)


@pytest.mark.skipif(GPU or INTERPRETER, reason='this run has the kernels itself')
@pytest.mark.timeout(900)
def test_all_of_this_in_the_interpreter():
    others = Path(__file__).with_name('test_visible_kernels.py')  # in the same process: it takes seconds to start
    pass_in_the_interpreter([__file__, str(others)], 'kernel')


@pytest.fixture
def after_training():
    """What a run of training on a GPU leaves behind in its process."""
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


@kernels
def test_kernels_are_tested_with_exact_products_whatever_ran_before(after_training, triton):
    assert precision(torch.float32) == 'tf32x3'


@kernels
@pytest.mark.parametrize('grid, kept, prefix, orders, state, headdim, dtype', SIZES, ids=str)
def test_kernels_equal_plain_operators(grid, kept, prefix, orders, state, headdim, dtype, triton):
    length, settings = kept + prefix, (1e-5, state, orders != 'column', prefix, *grid)
    operands = mixer_operands(length, 2 if orders == 'both' else 1, dtype, headdim=headdim, state=state)
    given, keep = dict(zip(GridMixer._fields, operands)), kept_of(grid, kept, 2, DEVICE)

    def fused(*x):
        return fused_grid_mixer(GridMixer(*x, *settings, keep))

    first = assert_agrees(
        fused,
        lambda *x: masked_composition(x, *settings, keep),
        given,
        2 * TOLERANCE[dtype],
        sums=SUMS,
        zero=('A_log',) if kept < 2 else (),
    )
    if GPU:  # the interpreter has no order to depend on
        second = with_gradients(fused, given)
        assert all(torch.equal(first[name], second[name]) for name in first)


@kernels
def test_patches_in_another_order_are_scanned_in_it(triton):
    settings, keep = (1e-5, 16, True, 1, 3, 5), torch.tensor([[7, 3, 11, 0], [2, 14, 5, 9]], device=DEVICE)
    assert_agrees(
        lambda *x: fused_grid_mixer(GridMixer(*x, *settings, keep)),
        lambda *x: masked_composition(x, *settings, keep),
        dict(zip(GridMixer._fields, mixer_operands(5, 2, torch.float32))),
        2 * TOLERANCE[torch.float32],
        sums=SUMS,
    )


@kernels
@pytest.mark.parametrize('orders', ['column', 'both'])
def test_kernels_of_long_sequences_equal_plain_operators(orders, triton, monkeypatch):
    monkeypatch.setattr(ssd_op, 'MAX_LENGTH', 32)  # tokens from which on the sums are in chunks
    grid, kept, prefix = (11, 13), 74, 1
    settings, keep = (1e-5, 16, orders != 'column', prefix, *grid), kept_of(grid, kept, 2, DEVICE)
    operands = mixer_operands(kept + prefix, 2 if orders == 'both' else 1, torch.float32)
    assert_agrees(
        lambda *x: fused_grid_mixer(GridMixer(*x, *settings, keep)),
        lambda *x: masked_composition(x, *settings, keep),
        dict(zip(GridMixer._fields, operands)),
        2e-5,
        sums=SUMS,
    )


@kernels
def test_kernels_take_no_bias_and_project_as_torch_does(triton):
    grid, kept, prefix = (6, 5), 9, 1
    settings, keep = (1e-5, 16, True, prefix, *grid), kept_of(grid, kept, 2, DEVICE)
    zxbcdt, conv, _, *others = mixer_operands(kept + prefix, 2, torch.float32)
    names = [name for name in GridMixer._fields[:7] if name != 'conv_bias']
    out_proj = torch.randn(7, 32, device=DEVICE) / 5
    assert_agrees(
        lambda x, conv, *w: fused_grid_mixer(GridMixer(x, conv, None, *w[:-1], *settings, keep, None, w[-1])),
        lambda x, conv, *w: F.linear(masked_composition((x, conv, None, *w[:-1]), *settings, keep), w[-1]),
        {**dict(zip(names, [zxbcdt, conv, *others])), 'out_proj': out_proj},
        2e-5,
        sums=SUMS,
    )


@kernels
@pytest.mark.parametrize('orders', ['row', 'column', 'both'])
def test_kernels_give_a_whole_image_that_is_masked_nowhere_the_same_bits(orders, triton):
    operands = mixer_operands(16, 2 if orders == 'both' else 1, torch.float32)
    settings = (1e-5, 16, orders != 'column', 1, 3, 5)
    every = torch.arange(15, device=DEVICE).expand(2, -1)
    whole, masked = (fused_grid_mixer(GridMixer(*operands, *settings, keep)) for keep in (None, every))
    assert torch.equal(whole, masked)


def neighbours_of(keep, prefix, height, width):
    """Of a token at each tap (B, 9, L), and the tokens by columns (B, L)."""
    from vim_timm.ops.triton_kernels import masked_conv_kernels

    launch = masked_conv_launch.PlacesLaunch(16, 16, 1)  # several of each in the sizes below
    visible = Visible(keep, prefix, height, width)
    found = masked_conv_launch.find_neighbours(masked_conv_kernels, visible, launch)
    assert torch.equal(found, visible_neighbours(visible))
    return found[:9].transpose(0, 1), found[9]


@kernels
@pytest.mark.parametrize('grid, kept, prefix', [((1, 1), 1, 0), ((7, 9), 40, 2), ((9, 5), 45, 1), ((4, 4), 0, 1)])
def test_kernels_find_neighbours_and_columns(grid, kept, prefix, triton):
    keep, width = kept_of(grid, kept, 3, DEVICE), grid[1]
    neighbours, columns = neighbours_of(keep, prefix, *grid)
    for image, places in enumerate(keep.tolist()):
        token = {divmod(place, width): prefix + i for i, place in enumerate(places)}
        for (row, column), i in token.items():
            steps = [(row + a, column + b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
            assert neighbours[image, :, i].tolist() == [token.get(step, -1) for step in steps]
        for i in range(prefix):
            assert neighbours[image, :, i].tolist() == [i if tap == 4 else -1 for tap in range(9)]
        by_column = [token[place] for place in sorted(token, key=lambda place: place[::-1])]
        assert columns[image].tolist() == [*range(prefix), *by_column]


@kernels
@pytest.mark.parametrize('places', [[0, 1, 15], [-1, 1, 2], [4, 4, 5], [2**40, 2**62, -(2**62)]], ids=str)
def test_kernels_read_nothing_outside_for_places_that_are_none_of_a_grid(places, triton):
    """The device is not waited for, so that nothing can be raised: the image is NaN, and the others are right."""
    keep = torch.tensor([places, [0, 1, 2]], device=DEVICE)
    neighbours, columns = neighbours_of(keep, 1, 3, 5)
    assert neighbours.min() >= -1 and neighbours.max() < 4
    assert columns.sort(1).values.tolist() == [[0, 1, 2, 3]] * 2
    given, settings = dict(zip(GridMixer._fields, mixer_operands(4, 2, torch.float32))), (1e-5, 16, True, 1, 3, 5)
    found = with_gradients(lambda *x: fused_grid_mixer(GridMixer(*x, *settings, keep)), given)
    assert found['output'][0].isnan().all()
    good = keep[1:].expand(2, -1)
    wanted = with_gradients(lambda *x: fused_grid_mixer(GridMixer(*x, *settings, good)), given)
    for name in ('output', 'gradient of zxbcdt'):
        assert torch.equal(found[name][1], wanted[name][1]), name


@kernels
@pytest.mark.parametrize(
    'keep, what',
    [
        (torch.tensor([[0, 1, 2]]), r'torch.int64 \[1, 3\]'),
        (torch.tensor([[0, 1], [0, 1]]), r'torch.int64 \[2, 2\]'),
        (torch.tensor([[0, 1, 2], [0, 1, 2]]).int(), r'torch.int32 \[2, 3\]'),
    ],
    ids=str,
)
def test_kernels_refuse_places_past_whose_ends_they_would_read(keep, what, triton):
    given = GridMixer(*mixer_operands(4, 2, torch.float32), 1e-5, 16, True, 1, 3, 5, keep.to(DEVICE))
    with pytest.raises(ValueError, match=f'places of 2 x 3 tokens on a grid are not {what}'):
        fused_grid_mixer(given)


@kernels
def test_kernels_take_no_image(triton):
    operands, settings = mixer_operands(9, 2, torch.float32, batch=0), (1e-5, 16, True, 0, 3, 4)
    keep = torch.zeros(0, 9, dtype=torch.int64, device=DEVICE)
    given = dict(zip(GridMixer._fields, operands))
    found = with_gradients(lambda *x: fused_grid_mixer(GridMixer(*x, *settings, keep)), given)
    assert found['output'].shape == (0, 9, 32) and not any(x.any() for x in found.values())


@kernels
@pytest.mark.parametrize('orders', ['both', 'alternate'])
def test_kernels_run_a_masked_images_mixer_whole(orders, triton, monkeypatch):
    arguments = dict(depth=2, embed_dim=32, headdim=16, d_state=16, num_classes=0, orders=orders)
    model = timm.create_model('vim2_tiny_patch4_32', **arguments).to(DEVICE)
    images, keep = torch.randn(2, 3, 32, 32, device=DEVICE), kept_of((8, 8), 16, 2, DEVICE)
    monkeypatch.setattr(BiSSD, '_convolve', lambda *_: pytest.fail('the mixer is composed'))
    with Calls('visible_neighbours') as looked_up:
        fused = model.encode(*model.embed(images, keep), keep)[0]
    assert looked_up.count == 1  # for both blocks
    fused.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.blocks.named_parameters()}
    monkeypatch.undo()
    model.zero_grad()
    with use_scan_backend('reference'):
        composed = model.encode(*model.embed(images, keep), keep)[0]
    composed.square().mean().backward()
    assert error(fused, composed) < 1e-4
    assert all(error(gradients[name], p.grad) < 1e-3 for name, p in model.blocks.named_parameters())


@kernels
def test_kernels_count_the_convolution_of_the_whole_image(triton):
    """As backends do that compute it."""
    operands, keep, found = mixer_operands(9, 2, torch.float32), kept_of((4, 5), 8, 2, DEVICE), []
    for settings in ((1e-5, 16, True, 1, 4, 5, keep), (1e-5, 16, True, 1, 2, 4)):
        operands[0].requires_grad_()
        with FlopCounterMode(display=False) as counter:
            fused_grid_mixer(GridMixer(*operands, *settings)).sum().backward()
        found.append(counter.get_total_flops())
    assert found[0] - found[1] == 3 * 18 * 2 * 12 * 64


@kernels
def test_kernels_follow_autocast_and_keep_little_of_places(triton):
    """A token's bytes for the backward pass: as of a whole image, and ten numbers of four bytes for its places."""
    mixer, grid = BiSSD(16, d_state=16, headdim=16).to(DEVICE), (3, 4)
    x, keep = torch.randn(3, 5, 16, device=DEVICE).bfloat16(), kept_of(grid, 5, 3, DEVICE)

    def run(images):
        return mixer(x[:images].clone(), Layout(grid, [], keep[:images]))

    with torch.autocast(DEVICE, torch.bfloat16):
        assert run(3).dtype == torch.bfloat16
        bytes_of_image = kept_bytes(lambda: run(3)) - kept_bytes(lambda: run(2))
    row = 104 if GPU else 2 * 32 + 2 * 16 + 2  # padded there
    assert bytes_of_image == 5 * (2 * (16 + row + 64 + 32) + 4 * 2 * (1 + 2) + 4 * 10)


def test_more_tokens_than_the_table_numbers_are_left_to_others(monkeypatch):
    monkeypatch.setattr(triton_kernels, 'device_limit', lambda x: '')
    zxbcdt, *others = mixer_operands(1, 1, torch.float32)
    for length, refused in ((7000, True), (6500, False)):
        many = torch.empty(32767, length, zxbcdt.shape[2], device='meta')
        given = GridMixer(many, *others, 1e-5, 16, True, 0, 100, 100, many)
        assert ('tokens of masked images' in TABLE['masked_grid_mixer']['triton'].limit(given)) is refused


@kernels
def test_kernels_refuse_neighbours_past_whose_ends_they_would_read(triton):
    neighbours = visible_neighbours(Visible(kept_of((3, 5), 4, 2, DEVICE), 0, 3, 5))
    given = GridMixer(*mixer_operands(5, 2, torch.float32), 1e-5, 16, True, 1, 3, 5, neighbours, neighbours)
    with pytest.raises(ValueError, match=r'neighbours of tokens are not torch.int32 \[10, 2, 4\]'):
        fused_grid_mixer(given)


@kernels
@pytest.mark.parametrize('masked', [False, True])
def test_no_gradient_is_filled_for_what_kernels_keep(masked, triton):
    operands, keep = mixer_operands(9, 2, torch.float32), kept_of((4, 4), 9, 2, DEVICE) if masked else None
    operands[0].requires_grad_()
    grid = (4, 4) if masked else (3, 3)
    y = fused_grid_mixer(GridMixer(*operands, 1e-5, 16, True, 0, *grid, keep)).sum()
    with Calls('zero') as zeros:
        y.backward()
    assert zeros.count == 0


@kernels
def test_one_graph_holds_a_masked_mixer_of_kernels_forward_and_backward(triton):
    mixer, grid = BiSSD(16, d_state=16, headdim=16).to(DEVICE), (3, 4)
    x, keep = torch.randn(2, 5, 16, device=DEVICE), kept_of(grid, 5, 2, DEVICE)
    torch._dynamo.reset()

    def run(x, keep):
        return mixer(x, Layout(grid, [], keep))

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend='aot_eager')):
        y = function(x, keep)
        results.append([y, *torch.autograd.grad(y.square().sum(), [*mixer.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@kernels
@pytest.mark.parametrize('projects', [False, True])
def test_operator_of_kernels_passes_opcheck(projects, triton):
    out_proj = torch.randn(7, 32, device=DEVICE, requires_grad=True) if projects else None
    operands = [x.detach().requires_grad_() for x in mixer_operands(5, 2, torch.float32)]
    keep = kept_of((3, 5), 4, 2, DEVICE)
    neighbours = visible_neighbours(Visible(keep, 1, 3, 5))
    settings = (1e-5, 16, True, 1, 3, 5, keep, neighbours, out_proj)
    tests = ('test_schema', 'test_autograd_registration', 'test_faketensor')
    operator = torch.ops.vim_timm.triton_masked_grid_mixer.default
    torch.library.opcheck(operator, (*operands, *settings), test_utils=tests)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason='needs an NVIDIA GPU')
def test_a_recorded_encoder_follows_other_masks_without_waiting_for_the_device(triton):
    arguments = dict(depth=2, embed_dim=64, num_classes=0)
    model = timm.create_model('vim2_tiny_patch4_32', **arguments).cuda().eval()
    images, keep = torch.randn(4, 3, 32, 32, device='cuda'), kept_of((8, 8), 16, 4, 'cuda')

    def encode():
        with torch.no_grad(), torch.autocast('cuda', torch.bfloat16):
            return model.encode(*model.embed(images, keep), keep)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        encode()
        torch.cuda.set_sync_debug_mode('error')
        try:
            encode()
        finally:
            torch.cuda.set_sync_debug_mode('default')
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = encode()
    keep.copy_(kept_of((8, 8), 16, 4, 'cuda'))
    graph.replay()
    assert torch.equal(recorded, encode())
