"""The Triton kernels agree with the reference: in small in Triton's interpreter, in full on a GPU (`-m gpu`).

The interpreter must be chosen before Triton is imported: a run without a GPU starts one with TRITON_INTERPRET=1.
"""

import os
import re
import sys

import pytest
import timm
import torch
from processes import Python, finish
from torch.utils.flop_counter import FlopCounterMode

import vim_timm  # noqa: F401  registers the models
from tests.golden_data import cases, load
from tests.kernels import assert_agrees, conv, error, fields, pass_in_the_interpreter, scan, with_gradients
from vim_timm.ops import Direction, Visible, backends, mamba_ssm_adapter, triton_kernels
from vim_timm.ops.operands import Conv, Scan
from vim_timm.ops.plain import reference
from vim_timm.ops.triton_kernels import compile_targets

INTERPRETER = os.environ.get('TRITON_INTERPRET') == '1'
GPU = torch.cuda.is_available() and not INTERPRETER
DEVICE = 'cuda' if GPU else 'cpu'
triton_scan, triton_conv = scan(triton_kernels), conv(triton_kernels)
RELATIVE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}

kernels = pytest.mark.skipif(not (GPU or INTERPRETER), reason='needs an NVIDIA GPU or TRITON_INTERPRET=1')


def only_gpu(function):
    return pytest.mark.gpu(pytest.mark.skipif(not GPU, reason='needs an NVIDIA GPU')(function))


def scan_operands(batch, length, dim, state, dtype=torch.float32, two=True, skip=True, bias=True, gate=True, log=True):
    """Fresh random operands, laid out as the layers lay them out: B, C and z are slices."""

    def draw(*shape):
        return torch.randn(*shape, device=DEVICE)

    def direction():
        rows = draw(batch, length, 12 + 2 * state).to(dtype)
        A = draw(dim, state) * 0.5
        return [
            draw(batch, length, dim).to(dtype),
            draw(batch, length, dim).to(dtype),
            A if log else -A.exp(),
            rows[..., 12 : 12 + state],
            rows[..., 12 + state :],
            draw(dim) if skip else None,
            draw(dim) - 1 if bias else None,
        ]

    z = draw(batch, length, 2 * dim).to(dtype)[..., dim:] if gate else None
    return [*direction(), *(direction() if two else [None] * 7), z]


def named(kind, operands):
    """Operands by the names of a class's fields."""
    return dict(zip(fields(kind), operands))


def assert_close_to_reference(operator, operands, flags, tolerance):
    kind = Scan if operator is scan else Conv
    found, law = (lambda *x, backend=backend: operator(backend)(*x, *flags) for backend in (triton_kernels, reference))
    assert_agrees(found, law, named(kind, operands), tolerance)


@pytest.mark.skipif(GPU or INTERPRETER, reason='this run has the kernels itself')
@pytest.mark.timeout(900)
def test_all_of_this_in_the_interpreter():
    pytest.importorskip('triton')
    others = [f'tests/test_{name}.py' for name in ('add_norm', 'backends', 'called_layers', 'process_state', 'swiglu')]
    pass_in_the_interpreter([__file__, *others], 'triton or convention or add_norm')


SMALL_SCANS = [
    dict(batch=2, length=9, dim=20, state=3),
    dict(batch=1, length=5, dim=33, state=16, skip=False, bias=False, gate=False, log=False),
    dict(batch=1, length=7, dim=8, state=16, dtype=torch.bfloat16),
    dict(batch=1, length=6, dim=8, state=16, dtype=torch.float16, log=False),
    dict(batch=1, length=1, dim=4, state=1),
    dict(batch=2, length=4, dim=8, state=5, two=False),
    dict(batch=1, length=3, dim=32, state=64),
    dict(batch=1, length=67, dim=4, state=4),  # in three chunks
]


@kernels
@pytest.mark.parametrize('case', SMALL_SCANS, ids=str)
def test_scan_agrees_with_the_reference(case, poison):
    operands = scan_operands(**case)
    assert_close_to_reference(scan, operands, (0.5, True, case.get('log', True)), RELATIVE[operands[0].dtype])


@only_gpu
@pytest.mark.parametrize('dtype', RELATIVE, ids=str)
@pytest.mark.parametrize(
    'batch, length, dim, state',
    [(2, 1, 96, 16), (3, 7, 200, 5), (2, 63, 384, 16), (64, 197, 384, 16), (48, 197, 768, 16), (2, 785, 384, 16)]
    + [(1, 1025, 192, 8), (1, 4100, 64, 16), (1, 17, 32, 256), (2, 65, 64, 33)],
)
def test_scan_agrees_with_the_reference_at_full_size(batch, length, dim, state, dtype, poison):
    operands = scan_operands(batch, length, dim, state, dtype)
    assert_close_to_reference(scan, operands, (0.5, True, True), RELATIVE[dtype])


@only_gpu
@pytest.mark.skipif(bool(mamba_ssm_adapter.unavailable()), reason='needs mamba-ssm')
@pytest.mark.parametrize('dtype', RELATIVE, ids=str)
def test_scan_is_no_less_accurate_than_mamba_ssm(dtype):
    operands = scan_operands(8, 197, 384, 16, dtype)

    def results(backend, precision=None):
        return with_gradients(lambda *x: scan(backend)(*x, 0.5, True, True), named(Scan, operands), precision)

    wanted = results(reference, torch.float64)
    ours, theirs = results(triton_kernels), results(mamba_ssm_adapter)
    errors = {name: (error(ours[name], w), error(theirs[name], w)) for name, w in wanted.items()}
    # noise where both round in the last place
    assert all(a < 1.1 * b + 1e-6 for a, b in errors.values()), errors


@kernels
@pytest.mark.parametrize('path', [p for p in cases('selective_scan') if 'layout' not in p.name], ids=lambda p: p.stem)
def test_scan_agrees_with_the_original(path):
    arrays, meta = load(path)
    if INTERPRETER and arrays['u'].shape[2] > 20 and 'extreme' not in path.name:
        pytest.skip('long for the interpreter')
    rows = {k: torch.from_numpy(v).to(DEVICE) for k, v in arrays.items()}

    def tokens_first(name):
        return rows[name].transpose(1, 2).contiguous() if name in rows else None

    found = triton_scan(
        tokens_first('u'), tokens_first('delta'), rows['A'], tokens_first('B'), tokens_first('C'), rows.get('D'),
        rows.get('delta_bias'), *[None] * 7, tokens_first('z'), 1.0, meta['delta_softplus'], False,
    )  # fmt: skip
    wanted = rows['out'].transpose(1, 2)
    assert torch.isfinite(found).all()
    # float32 underflows to zero where float64 keeps 1e-80
    assert (found - wanted).norm() <= 1e-5 * wanted.norm() + 1e-30


CONVOLUTIONS = [
    dict(batch=2, length=19, dim=20, width=4),
    dict(batch=1, length=1, dim=8, width=3, silu=False),
    dict(batch=2, length=33, dim=70, width=2, bias=False),
    dict(batch=2, length=5, dim=8, width=4, two=False),
    dict(batch=2, length=17, dim=16, width=4, dtype=torch.bfloat16),
]
LARGE_CONVOLUTIONS = [
    pytest.param(dict(batch=64, length=197, dim=384, width=4, dtype=dtype), marks=pytest.mark.gpu) for dtype in RELATIVE
]


@kernels
@pytest.mark.parametrize('case', CONVOLUTIONS + (LARGE_CONVOLUTIONS if GPU else []), ids=str)
def test_convolution_agrees_with_the_reference(case, poison):
    case = dict(dict(dtype=torch.float32, two=True, bias=True, silu=True), **case)
    dim, two, bias = case['dim'], case['two'], case['bias']
    x = torch.randn(case['batch'], case['length'], 2 * dim, device=DEVICE).to(case['dtype'])[..., :dim]
    weights = [torch.randn(dim, case['width'], device=DEVICE) for _ in range(2)]
    biases = [torch.randn(dim, device=DEVICE) if bias else None for _ in range(2)]
    operands = [x, weights[0], biases[0], weights[1] if two else None, biases[1] if two else None]
    assert_close_to_reference(conv, operands, (case['silu'],), RELATIVE[x.dtype])


@kernels
def test_two_runs_are_bit_equal():
    operands = scan_operands(1, 9, 16, 4) if INTERPRETER else scan_operands(64, 197, 384, 16, torch.bfloat16)
    given = named(Scan, operands)
    first, second = (with_gradients(lambda *x: triton_scan(*x, 0.5, True, True), given) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@kernels
def test_ops_pass_opcheck():
    tests = ('test_schema', 'test_autograd_registration', 'test_faketensor')
    operands = [x if x is None else x.detach().requires_grad_() for x in scan_operands(1, 5, 8, 4)]
    torch.library.opcheck(torch.ops.vim_timm.triton_scan.default, (*operands, 0.5, True, True), test_utils=tests)
    x, weight, bias = (t.requires_grad_() for t in (torch.randn(1, 5, 8), torch.randn(8, 4), torch.randn(8)))
    args = [t.detach().to(DEVICE).requires_grad_() for t in (x, weight, bias, weight, bias)]
    torch.library.opcheck(torch.ops.vim_timm.triton_conv.default, (*args, True), test_utils=tests)


@kernels
def test_fake_outputs_match_those_of_a_scan_in_chunks():
    from torch._subclasses.fake_tensor import FakeTensorMode

    triton_scan = torch.ops.vim_timm.triton_scan
    operands = scan_operands(1, 80, 8, 4)
    found = triton_scan(*operands, 0.5, True, True)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [x if x is None else mode.from_tensor(x) for x in operands]
        fake = triton_scan(*fakes, 0.5, True, True)
    assert [(f.shape, f.dtype, f.stride()) for f in fake] == [(f.shape, f.dtype, f.stride()) for f in found]


@kernels
@pytest.mark.parametrize('dynamic', [False, True])
def test_one_graph_holds_a_block_forward_and_backward(dynamic):
    from torch._dynamo.testing import CompileCounterWithBackend

    def block(x, weight, bias, *operands):
        u, u_b = triton_conv(x, weight, bias, weight, bias, True)
        delta, A, B, C, D, delta_bias = operands
        one = (delta, A, B, C, D, delta_bias)
        return triton_scan(u, *one, u_b, *one, x, 0.5, True, True).sin()

    torch._dynamo.reset()  # what another test compiled of the same code counts as a recompile
    counter = CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend=counter)
    for batch in (2, 3):  # no other size is 2 or 3: equal ones would share a symbol
        u, *operands = scan_operands(batch, 5, 4, 4, two=False, gate=False)[:7]
        leaves = [u, torch.randn(4, 4, device=DEVICE), torch.randn(4, device=DEVICE), *operands]
        leaves = [x.detach().requires_grad_() for x in leaves]
        results = []
        for function in (block, compiled):
            y = function(*leaves)
            results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
        assert all(torch.equal(a, b) for a, b in zip(*results))
    assert counter.frame_count <= (1 if dynamic else 2)


@kernels
def test_double_backward_names_the_reference():
    operands = [x if x is None else x.requires_grad_() for x in scan_operands(1, 3, 4, 2, skip=False, gate=False)]
    leaves = [x for x in operands if x is not None and x.is_leaf]
    out = triton_scan(*operands, 1.0, True, True)
    first = torch.autograd.grad(out.sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match='reference'):
        torch.autograd.grad(first[0].sum(), leaves)


@kernels
def test_flops_grow_with_the_state():
    counts = []
    for state in (4, 8):
        with FlopCounterMode(display=False) as counter:
            triton_scan(*scan_operands(1, 3, 4, state), 1.0, True, True)
        counts.append(counter.get_total_flops())
    assert counts == [3 * 4 * (2 * 9 * state + 2) for state in (4, 8)]


def test_limits_are_named_before_any_launch():
    def limit(dtype, state):
        u, A, B = (torch.empty(shape, device='meta') for shape in ((1, 3, 4), (4, state), (1, 3, state)))
        return triton_kernels.scan_limit(Scan(Direction(u.to(dtype), u, A, B, B, None, None)))

    assert '256' in limit(torch.float32, 300)
    assert 'cuda' in limit(torch.float32, 16).lower() or INTERPRETER
    if INTERPRETER:
        assert 'float64' in limit(torch.float64, 16)
        assert limit(torch.float32, 16) == ''
    keep = torch.empty(32768, 1, dtype=torch.int64, device='meta')
    refusal = backends.TABLE['visible_neighbours']['triton'].limit(Visible(keep, 0, 4, 4))
    assert ('batches up to 32767' if INTERPRETER else 'CUDA tensors, not on meta') in refusal


def test_warmup_leaves_no_gradients():
    model = timm.create_model('test_vim')
    triton_kernels.warmup(model, (1, 3, *model.patch_embed.img_size), train=True)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.skipif(INTERPRETER, reason='the run that starts this one asks it')
def test_kernels_are_not_loaded_before_a_gpu_needs_them(tmp_path):
    code = 'import sys, vim_timm.ops as o; o.triton_kernels.unavailable(); print([*sys.modules])'
    said = finish([Python(code, output=tmp_path / 'output.txt')])
    assert 'triton_kernels' in said and 'scan_kernels' not in said


@pytest.mark.skipif(INTERPRETER, reason='the interpreter compiles nothing')
@pytest.mark.parametrize('target', [86, 90, 100, 120])  # 80 and 89: as 86, in no less memory
def test_kernels_compile_within_the_shared_memory_of_every_gpu(target, monkeypatch, capsys):
    pytest.importorskip('triton')
    monkeypatch.setattr(sys, 'argv', ['compile_targets', '--targets', str(target), '--dims', '384'])
    compile_targets.main()  # ends the program where one does not fit
    report = capsys.readouterr().out
    for name in ('scan_backward', 'conv_backward', 'chunk_backward_matrices', 'masked_conv_gradients'):
        assert re.search(rf'sm_{target} .* {name} ', report), name


@only_gpu
def test_compiled_and_captured_scans_equal_eager_ones():
    operands = [x.detach() for x in scan_operands(8, 197, 384, 16, torch.bfloat16)]

    def double(*tensors):
        return 2 * triton_scan(*tensors, 0.5, True, True)

    eager = double(*operands)
    assert torch.equal(torch.compile(double, fullgraph=True)(*operands), eager)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = double(*operands)
    captured.fill_(float('nan'))
    graph.replay()
    assert torch.equal(captured, eager)


@only_gpu
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_three_hundred_steps_of_vim_tiny_stay_finite(dtype):
    torch.manual_seed(0)
    model = timm.create_model('vim_tiny_patch16_224').cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    # a scaler that neither grows nor skips: what is not finite is the model's
    scaler = torch.amp.GradScaler('cuda', 2.0**10, growth_interval=10**6, enabled=dtype == torch.float16)
    images, labels = torch.randn(64, 3, 224, 224, device='cuda'), torch.randint(1000, (64,), device='cuda')
    for _ in range(300):
        with torch.autocast('cuda', dtype):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        total = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        assert torch.isfinite(loss) and torch.isfinite(total)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert loss < 6.9


@only_gpu
def test_the_default_scaler_skips_no_more_steps_than_for_deit():
    images, labels = torch.randn(8, 32, 3, 224, 224), torch.randint(1000, (8, 32))

    def skipped(name):
        torch.manual_seed(0)
        model = timm.create_model(name).cuda().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        scaler = torch.amp.GradScaler('cuda', growth_interval=50)  # grows often, so that there is something to skip
        found = []
        for step in range(150):
            with torch.autocast('cuda', torch.float16):
                logits = model(images[step % 8].cuda())
                loss = torch.nn.functional.cross_entropy(logits, labels[step % 8].cuda())
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scale = scaler.get_scale()
            scaler.update()
            optimizer.zero_grad()
            found.append(scaler.get_scale() < scale)
        return sum(found[20:])

    assert skipped('vim_tiny_patch16_224') <= skipped('deit_tiny_patch16_224')


@kernels
@pytest.mark.parametrize('place, shape', [(1, (2, 9, 1)), (3, (1, 9, 4)), (5, (1,)), (14, (1, 9, 8))])
def test_operands_of_other_shapes_are_refused(place, shape):
    given = scan_operands(2, 9, 8, 4)
    given[place] = torch.zeros(shape, device=DEVICE)
    with pytest.raises(ValueError, match='an operand of a scan has the shape'):
        triton_scan(*given)


@kernels
@pytest.mark.parametrize('place', [0, 1, 3, 4, 5, 7, 8, 10, 11, 12])
def test_mixed_dtypes_are_not_rounded(place):
    given = scan_operands(1, 3, 8, 4)
    given[place] = given[place].bfloat16()
    inputs = [[x.detach().clone().requires_grad_() for x in given] for _ in range(2)]
    found, wanted = triton_scan(*inputs[0]), scan(reference)(*inputs[1])
    assert found.dtype == wanted.dtype
    grad = torch.randn_like(wanted)
    assert error(found, wanted) < (1e-2 if place == 0 else 1e-5)
    for f, w in zip(torch.autograd.grad(found, inputs[0], grad), torch.autograd.grad(wanted, inputs[1], grad)):
        assert f.dtype == w.dtype and error(f, w) < 1e-2
