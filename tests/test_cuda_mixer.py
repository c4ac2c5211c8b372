"""The fused CUDA kernels agree with the composition that they replace: on a GPU (`-m gpu`) and as C++ on the CPU."""

import functools
import gc
import math
import re
import shutil
import sys
import threading
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

import vim_timm  # noqa: F401  registers the models
from tests import kernels
from vim_timm.layers import BiMamba, bimamba
from vim_timm.ops import Direction, Mixer, Taps, cuda, mamba_ssm_adapter, use_scan_backend
from vim_timm.ops.cuda import mixer_op, nvrtc, sizes
from vim_timm.ops.cuda.mixer_op import cut
from vim_timm.ops.cuda.sizes import STATE, padded_rank
from vim_timm.ops.operands import Scan
from vim_timm.ops.plain import reference

sys.path.insert(0, str(Path(__file__).parent))
import cuda_on_cpu  # noqa: E402

GPU = torch.cuda.is_available()


def only_gpu(function):
    return pytest.mark.gpu(pytest.mark.skipif(not GPU, reason='needs an NVIDIA GPU')(function))


def given(xz, *tensors):
    """`ops.Mixer` of `operands`."""
    return Mixer.of(xz, *tensors[:14], 0.5, *tensors[14:])


def mixer(*tensors):
    """`cuda.mixer` of `operands`."""
    return cuda.mixer(given(*tensors))


def operands(batch, length, dim, rank, width=4, bias=True, out=0, device='cuda', dtype=torch.bfloat16):
    """Fresh random operands of `cuda.mixer`, of the sizes that a model has; with out_proj to width `out` if not 0."""

    def draw(*shape):
        return torch.randn(*shape, device=device)

    def direction():
        A_log = torch.arange(1.0, STATE + 1, device=device).log() + 0.1 * draw(dim, STATE)
        return [
            0.4 * draw(dim, width),
            0.1 * draw(dim) if bias else None,
            draw(rank + 2 * STATE, dim) / math.sqrt(dim),
            draw(dim, rank) / math.sqrt(rank),
            5 * torch.rand(dim, device=device) - 5,
            A_log,
            draw(dim),
        ]

    out_proj = [draw(out, dim) / math.sqrt(dim), draw(out) if bias else None] if out else []
    return [draw(batch, length, 2 * dim).to(dtype), *direction(), *direction(), *out_proj]


def compose(*tensors, rounded=None):
    """The same by reference operators; `rounded` is the dtype in which intermediate results travel."""

    def travel(x):
        return x if rounded is None else x.to(rounded).to(x.dtype)

    xz, forward, backward, scale, out_proj, out_bias = given(*tensors)
    x, z = xz.chunk(2, dim=-1)
    directions = []
    for weights, reverse in ((forward, False), (backward, True)):
        taps = Taps(weights.conv, weights.conv_bias)
        u = travel(reference.conv_one_direction(x, taps, True, reverse))
        rows = travel(u @ travel(weights.x_proj).t())
        step, B, C = rows.split([weights.dt.shape[1], STATE, STATE], dim=-1)
        delta = step @ travel(weights.dt).t()
        directions.append(Direction(u, delta, weights.A_log, B, C, weights.D, weights.dt_bias))
    y = reference.scan(Scan(*directions, z, scale))
    return y if out_proj is None else F.linear(travel(y), travel(out_proj), out_bias)


error = kernels.error


def with_gradients(function, tensors, weight):
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], weight.to(y.dtype))]


def assert_fused_agrees(size, dtype, device):
    """Outputs and every gradient against float64, and what two-byte intermediate results cost in any composition."""
    tensors = operands(**size, device=device, dtype=dtype)
    names = [name for name in kernels.fields(Mixer) if name != 'scale']
    law = functools.partial(compose, rounded=dtype)
    kernels.assert_agrees(mixer, compose, dict(zip(names, tensors)), 1e-2, rounded=law)


@pytest.fixture
def emulator(monkeypatch):
    """The kernels as plain C++, for a device of 132 multiprocessors."""
    if shutil.which('c++') is None:
        pytest.skip('needs a C++ compiler')
    monkeypatch.setattr(mixer_op, 'load', cuda_on_cpu.load)
    monkeypatch.setattr(mixer_op, 'multiprocessors', lambda device: 132)


SIZES = [
    dict(batch=12, length=1, dim=64, rank=4),
    dict(batch=1, length=5, dim=64, rank=12, bias=False),
    dict(batch=3, length=17, dim=64, rank=16, width=3),
    dict(batch=2, length=130, dim=192, rank=7, width=2),
    dict(batch=64, length=197, dim=384, rank=12),
    dict(batch=64, length=197, dim=384, rank=12, out=192),
    dict(batch=3, length=333, dim=128, rank=8, out=100, bias=False),
    dict(batch=1, length=300, dim=128, rank=24),
    dict(batch=2, length=333, dim=128, rank=48),
    dict(batch=2, length=2049, dim=384, rank=12),
]


@only_gpu
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('size', SIZES, ids=str)
def test_outputs_and_gradients_agree_with_float64(size, dtype, poison):
    assert_fused_agrees(size, dtype, 'cuda')


SMALL_SIZES = [  # each of few compilations: other tests take the same bfloat16 kernels of rank 12
    (dict(batch=12, length=1, dim=64, rank=12), torch.bfloat16),
    (dict(batch=1, length=5, dim=64, rank=12, bias=False), torch.bfloat16),
    (dict(batch=2, length=37, dim=64, rank=16, width=3), torch.float16),
    (dict(batch=1, length=140, dim=128, rank=48, width=2), torch.bfloat16),  # in chunks
    (dict(batch=2, length=37, dim=64, rank=4, out=24), torch.float16),
    (dict(batch=1, length=140, dim=64, rank=4, out=33, bias=False), torch.float16),  # in chunks
]


@pytest.mark.parametrize('size, dtype', SMALL_SIZES, ids=str)
def test_kernels_agree_with_float64_as_plain_cpp(size, dtype, poison, emulator):
    assert_fused_agrees(size, dtype, 'cpu')


@pytest.mark.parametrize('size, dtype', [SMALL_SIZES[1], SMALL_SIZES[5]], ids=str)
def test_addresses_of_launches_are_those_of_living_tensors(size, dtype, emulator, monkeypatch):
    """What a tensor leaves before a launch may be another's by then."""
    launch, seen = cuda_on_cpu.Module.launch, set()

    def watched(module, name, grid, threads, *arguments, **options):
        living = [x.untyped_storage() for x in gc.get_objects() if type(x) is torch.Tensor]
        spans = [(x.data_ptr(), x.data_ptr() + x.nbytes()) for x in living if x.device.type == 'cpu']
        for address in (x for x in arguments if x >= 2**32):  # not sizes; the last buffer may be empty
            assert address % 16 == 0 and any(first <= address <= end for first, end in spans), name
        seen.add(name)
        launch(module, name, grid, threads, *arguments, **options)

    monkeypatch.setattr(cuda_on_cpu.Module, 'launch', watched)
    tensors = operands(**size, device='cpu', dtype=dtype)
    with_gradients(mixer, tensors, torch.randn(size['batch'], size['length'], size.get('out') or size['dim']))
    assert {'conv_project', 'scan_forward', 'scan_backward', 'conv_backward', 'place_gradients'} <= seen
    assert ('carry' in seen) == (size['length'] > 128)


def test_taps_have_one_more_axis_of_one_or_none(emulator):
    tensors = operands(1, 5, 64, 12, device='cpu')

    def with_taps(change):
        return mixer(*(change(x) if i in (1, 8) else x for i, x in enumerate(tensors)))

    assert torch.equal(with_taps(lambda taps: taps[:, None]), mixer(*tensors))
    with pytest.raises(ValueError, match=r'conv must be \(D, W\) or \(D, 1, W\), not \(64, 2, 4\)'):
        with_taps(lambda taps: taps[:, None].repeat(1, 2, 1))


@pytest.mark.parametrize('out', [0, 24])
def test_operators_pass_opcheck(out, emulator):
    tensors = operands(1, 5, 64, 12, out=out, device='cpu')
    tests = ('test_schema', 'test_autograd_registration', 'test_faketensor')
    out_proj = [t.requires_grad_() for t in tensors][15:] or [None, None]
    torch.library.opcheck(torch.ops.vim_timm.cuda_mixer.default, (*tensors[:15], 0.5, *out_proj), test_utils=tests)
    grad = torch.randn(1, 5, out or 64).to(tensors[0].dtype)
    weight = None if out_proj[0] is None else out_proj[0].detach()
    backward = (grad, *(t.detach() for t in tensors[:15]), 0.5, weight)
    torch.library.opcheck(torch.ops.vim_timm.cuda_mixer_backward.default, backward, test_utils=tests)


@pytest.mark.parametrize(
    'size, dtype',
    [
        (dict(batch=12, length=1, dim=64, rank=4), torch.bfloat16),
        (dict(batch=2, length=37, dim=64, rank=16, width=3), torch.float16),
        (dict(batch=2, length=77, dim=128, rank=24, bias=False), torch.bfloat16),
    ],
    ids=str,
)
def test_the_projection_in_one_kernel_agrees_as_plain_cpp(size, dtype, poison, emulator, monkeypatch):
    monkeypatch.setattr(mixer_op, 'multiprocessors', lambda device: 0)  # so that few tokens fill it
    xz, *parameters = operands(**size, device='cpu', dtype=dtype)
    launches = mixer_op.Mixer(given(xz, *parameters))
    (buffer,) = launches.project().held
    shapes = [(*xz.shape[:2], size['dim']), (launches.row, size['dim']), (size['dim'], launches.rank_pad)]
    shapes = [(2, *shape) for shape in (*shapes, (*xz.shape[:2], launches.row))]
    parts = buffer.split([math.prod(shape) for shape in shapes])
    u, packed, dt, rows = (part.view(shape) for part, shape in zip(parts, shapes))
    for i, reverse in enumerate((False, True)):
        conv, bias, x_proj = parameters[7 * i : 7 * i + 3]
        x = xz[..., : size['dim']].double()
        wanted = reference.conv_one_direction(
            x, Taps(conv.double(), None if bias is None else bias.double()), True, reverse
        )
        assert error(u[i], wanted) < 4e-3
        kept = torch.cat([packed[i, : size['rank']], packed[i, padded_rank(size['rank']) :]])
        assert torch.equal(kept, x_proj.to(dtype))
        assert torch.equal(dt[i], F.pad(parameters[7 * i + 3].to(dtype), [0, dt.shape[2] - size['rank']]))
        assert error(rows[i], u[i].double() @ packed[i].double().t()) < 4e-3


def test_autocast_to_another_type_changes_nothing(emulator):
    tensors = operands(2, 5, 64, 12, device='cpu', out=32)
    weight = torch.randn(2, 5, 32)

    def cast(*leaves):
        with torch.autocast('cpu', torch.float16):
            return mixer(*leaves)

    wanted, found = (with_gradients(function, tensors, weight) for function in (mixer, cast))
    assert all(torch.equal(f, w) for f, w in zip(found, wanted))


def test_one_token_may_have_any_stride(emulator):
    xz, *rest = operands(3, 1, 64, 12, device='cpu')
    strange = torch.empty(1, 3, 128, dtype=xz.dtype).transpose(0, 1).copy_(xz)
    weight = torch.randn(3, 1, 64)
    wanted, found = (with_gradients(mixer, [x, *rest], weight) for x in (xz, strange))
    assert all(torch.equal(f, w) for f, w in zip(found, wanted))


def test_operands_may_lie_anywhere(emulator):
    tensors = operands(1, 5, 64, 12, out=24, device='cpu')
    shifted = [torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in tensors]
    weight = torch.randn(1, 5, 24)
    wanted, found = with_gradients(mixer, tensors, weight), with_gradients(mixer, shifted, weight)
    assert all(torch.equal(f, w) for f, w in zip(found, wanted))


@pytest.mark.parametrize('some', [slice(1, None), slice(3, 9)], ids=['all', 'some'])
def test_parameters_of_two_bytes_are_their_float32_copies(some, emulator, monkeypatch):
    copies, single_copies = [], mixer_op.single_copies
    monkeypatch.setattr(mixer_op, 'single_copies', lambda some: copies.append(len(some)) or single_copies(some))
    tensors = operands(2, 9, 64, 12, out=24, device='cpu')
    tensors[some] = [t.to(torch.bfloat16) for t in tensors[some]]
    singles = [tensors[0], *(t.float() for t in tensors[1:])]
    weight = torch.randn(2, 9, 24)
    wanted, found = with_gradients(mixer, singles, weight), with_gradients(mixer, tensors, weight)
    assert torch.equal(found[0], wanted[0])
    for tensor, f, w in zip(tensors, found[1:], wanted[1:]):
        assert f.dtype == tensor.dtype and torch.equal(f, w.to(f.dtype))
    assert copies == [min(14, len(tensors[some]))] * 2  # a launch in the forward pass, a launch in the backward pass


@pytest.mark.skipif(shutil.which('c++') is None, reason='needs a C++ compiler')
def test_plain_cpp_notices_a_missing_wait(tmp_path, monkeypatch):
    for source in nvrtc.SOURCES.glob('*.cu*'):
        text = source.read_text()
        (tmp_path / source.name).write_text(text.replace('copies_wait<2>();', '') if source.stem == 'forward' else text)
    monkeypatch.setattr(nvrtc, 'SOURCES', tmp_path)
    monkeypatch.setattr(mixer_op, 'load', cuda_on_cpu.load.__wrapped__)
    monkeypatch.setattr(mixer_op, 'multiprocessors', lambda device: 132)
    assert not torch.isfinite(mixer(*operands(1, 5, 64, 12, device='cpu'))).all()


@pytest.mark.parametrize('state', [3, 4])
def test_a_nan_decay_makes_its_channel_nan(state, emulator):
    tensors = operands(1, 5, 64, 12, device='cpu')
    tensors[6][1, state] = math.nan
    y = mixer(*tensors)
    assert y[..., 1].isnan().all() and y[..., 2:].isfinite().all()


def test_a_decay_at_once_is_exact_and_has_finite_gradients(emulator):
    """A_log of plus infinity in some states, and steps of zero length."""
    tensors = operands(1, 5, 64, 12, device='cpu')
    for A_log in (tensors[6], tensors[13]):
        A_log[1, 3] = A_log[2] = math.inf
    tensors[5][2] = -300.0
    weight = torch.randn(1, 5, 64)
    found = with_gradients(mixer, tensors, weight)
    wanted = with_gradients(compose, [t.double() for t in tensors], weight.double())
    assert all(f.isfinite().all() and error(f, w) < 2e-2 for f, w in zip(found, wanted))


def test_directions_that_differ_are_refused():
    xz, *parameters = operands(1, 5, 64, 12, device='cpu')
    parameters[1] = None
    meta = [None if t is None else t.to('meta') for t in (xz, *parameters)]
    assert 'both a bias or none' in cuda.mixer_limit(given(*meta))


@only_gpu
def test_a_new_thread_launches():
    tensors = operands(8, 197, 384, 12)
    wanted, found = mixer(*tensors), []
    thread = threading.Thread(target=lambda: found.append(mixer(*tensors)))
    thread.start()
    thread.join()
    assert torch.equal(found[0], wanted)


@only_gpu
def test_captured_gradients_in_chunks_are_those_of_an_eager_run():
    tensors = operands(2, 4096, 384, 12)
    grad = torch.randn(2, 4096, 384, device='cuda', dtype=torch.bfloat16)

    def run():
        return torch.ops.vim_timm.cuda_mixer_backward(grad, *tensors, 0.5, None)

    wanted = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for f in found:
        f.fill_(float('nan'))
    graph.replay()
    assert all(error(f, w) < 5e-3 for f, w in zip(found, wanted))


@only_gpu
@pytest.mark.parametrize('batch, out', [(8, 0), (8, 192), (128, 0)])  # in the last one a captured scan starts early
def test_runs_are_bit_equal_and_equal_compiled_and_captured_ones(batch, out):
    tensors = operands(batch, 197, 384, 12, out=out)
    weight = torch.randn(batch, 197, out or 384, device='cuda')

    def run(function):
        return with_gradients(function, tensors, weight)

    eager = run(lambda *t: 2 * mixer(*t))
    assert all(torch.equal(a, b) for a, b in zip(eager, run(lambda *t: 2 * mixer(*t))))
    compiled = run(torch.compile(lambda *t: 2 * mixer(*t), fullgraph=True))
    # cuBLAS may take another kernel for out_proj
    assert all(error(a, b) < 5e-3 if out else torch.equal(a, b) for a, b in zip(compiled, eager))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = 2 * mixer(*tensors)
    captured.fill_(float('nan'))
    graph.replay()
    assert error(captured, eager[0]) < 5e-3 if out else torch.equal(captured, eager[0])


class LowRank(nn.Module):
    """A linear layer with a low-rank addition."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2)
        self.up = nn.Linear(2, base.out_features)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.fixture
def block(monkeypatch, emulator):
    """A mixer whose inside is the fused kernels as plain C++, under bfloat16 autocast."""
    monkeypatch.setattr(bimamba, 'fused_mixer', cuda.mixer)
    torch.manual_seed(0)
    with torch.autocast('cpu', torch.bfloat16):
        yield BiMamba(32, proj_bias=True)


def test_out_proj_inside_the_operator_is_the_module(block):
    x, weight = torch.randn(2, 2, 9, 32)
    x.requires_grad_()

    def run():
        y = block(x)
        return [y, *torch.autograd.grad(y, [x, *block.parameters()], weight.to(y.dtype))]

    inside = run()
    block.out_proj.register_forward_hook(lambda *_: None)
    assert all(torch.equal(a, b) for a, b in zip(inside, run()))


def test_a_hook_and_a_wrapper_of_out_proj_take_effect(block):
    x = torch.randn(2, 9, 32)
    plain = block(x)
    handle = block.out_proj.register_forward_hook(lambda module, args, output: 1.5 * output)
    assert torch.equal(block(x), 1.5 * plain)
    handle.remove()
    block.out_proj = LowRank(block.out_proj)
    (grad,) = torch.autograd.grad(block(x).sum(), block.out_proj.down.weight)
    assert not torch.equal(block(x), plain) and grad.any()


@pytest.mark.parametrize('name', ['in_proj', 'x_proj', 'x_proj_b', 'out_proj'])
def test_a_projection_with_another_bias_counts_whole(block, name, monkeypatch):
    layer, x = block.get_submodule(name), torch.randn(2, 9, 32)
    setattr(block, name, nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is None))
    found = block(x)
    with torch.autocast('cpu', enabled=False), use_scan_backend('reference'):
        monkeypatch.setattr(bimamba, 'fused_mixer', lambda given: None)
        wanted = block.double()(x.double())
    assert error(found.detach(), wanted.detach()) < 2e-2


def test_nothing_between_the_projections_is_kept_for_the_backward_pass(block):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        block(torch.randn(1, 9, 32))
    assert sum(t.numel() for t in kept if 9 in t.shape) == 9 * (32 + 128)


@only_gpu
def test_large_activations_stay_within_a_percent():
    tensors = operands(2, 197, 384, 12)
    tensors[0] *= 1e4 / tensors[0].abs().max()
    doubles = [t.double() for t in tensors]
    wanted = compose(*doubles)
    rounding = error(compose(*doubles, rounded=torch.bfloat16), wanted)
    assert error(mixer(*tensors), wanted) < 1e-2 + 2 * rounding


@only_gpu
@pytest.mark.parametrize('name', ['vim_tiny_patch16_224', 'test_vim'])
def test_a_model_gives_the_same_with_and_without_fusion(name):
    model = timm.create_model(name).cuda().eval()
    images = torch.randn(2, 3, *model.patch_embed.img_size, device='cuda')

    def gradients(backend, autocast):
        """Of a parameter of all blocks together: one of a single block may be small and mostly noise."""
        model.zero_grad()
        with use_scan_backend(backend), torch.autocast('cuda', torch.bfloat16, enabled=autocast):
            model(images).float().square().sum().backward()
        kinds = {}
        for name, p in model.named_parameters():
            kinds.setdefault(re.sub(r'\d+', '*', name), []).append(p.grad.flatten())
        return {name: torch.cat(grads) for name, grads in kinds.items()}

    wanted, fused, composed = gradients('triton', False), gradients('auto', True), gradients('triton', True)
    errors = {name: (error(fused[name], w), error(composed[name], w)) for name, w in wanted.items()}
    worse = {name: pair for name, pair in errors.items() if not pair[0] < 2e-3 + 1.5 * pair[1]}
    assert not worse, worse


@only_gpu
@pytest.mark.skipif(bool(mamba_ssm_adapter.unavailable()), reason='needs mamba-ssm')
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_a_mixer_is_no_less_accurate_than_with_mamba_ssm(dtype):
    torch.manual_seed(0)
    mixer = BiMamba(192).cuda()
    x, weight = torch.randn(2, 8, 197, 192, device='cuda')

    def run(backend, type):
        leaf = x.to(type).requires_grad_()
        with use_scan_backend(backend), torch.autocast('cuda', dtype, enabled=type == torch.float32):
            y = mixer(leaf)
        return [y.detach(), *torch.autograd.grad(y, [leaf, *mixer.parameters()], weight.to(y.dtype))]

    ours, theirs = run('auto', torch.float32), run('mamba_ssm', torch.float32)
    mixer.double()
    wanted = run('reference', torch.float64)
    names = ['output', 'input', *(name for name, _ in mixer.named_parameters())]
    errors = {n: (error(a, w), error(b, w)) for n, a, b, w in zip(names, ours, theirs, wanted)}
    worse = {n: pair for n, pair in errors.items() if not pair[0] < 1.1 * pair[1]}
    assert not worse, worse


@only_gpu
def test_double_backward_names_the_reference():
    xz, *rest = operands(1, 5, 64, 4)
    xz.requires_grad_()
    (grad,) = torch.autograd.grad(mixer(xz, *rest).float().sum(), xz, create_graph=True)
    with pytest.raises(RuntimeError, match='reference'):
        torch.autograd.grad(grad.float().sum(), xz)


def test_shared_memory_of_the_projection_fits_every_gpu():
    assert sizes.project_shared(cuda.MAX_RANK, 4, True) <= 99 * 1024


def test_limits_are_named_before_any_launch():
    assert 'CUDA tensors' in cuda.mixer_limit(given(*operands(1, 3, 64, 12, device='meta')))


def test_scans_for_gradients_take_no_more_rounds_than_they_must():
    blocks = [mixer_op.gradient_blocks(128 * dim // 64, dim // 32, sms=132) for dim in (384, 768, 1536)]
    assert blocks == [6, 4, 4]  # one, three and six rounds
    assert mixer_op.gradient_blocks(600, 24, sms=132) == 5


def test_short_sequences_stay_whole_and_chunks_cover_long_ones():
    assert cut(128, 197, 384, 12, sms=132).chunks == 1
    assert cut(1, 40, 384, 12, sms=132).chunks == 1
    for batch, length in ((8, 6085), (1, 785), (1, 65536)):
        chunk, chunks, _ = cut(batch, length, 384, 12, sms=132)
        assert chunk % 16 == 0 and (chunks - 1) * chunk < length <= chunks * chunk
