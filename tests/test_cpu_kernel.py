"""The CPU kernel agrees with the reference in float64, on every build, and never depends on anything but its inputs."""

import concurrent.futures
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import Python, finish

from tests import kernels
from vim_timm import ops
from vim_timm.ops import cpu, operands
from vim_timm.ops.cpu import library
from vim_timm.ops.plain import reference

pytestmark = pytest.mark.skipif(bool(cpu.unavailable()), reason=cpu.unavailable())

BUILDS = library.instruction_sets()
RELATIVE = 1e-5
cpu_scan, cpu_conv = kernels.scan(cpu), kernels.conv(cpu)
exact_scan, exact_conv = kernels.scan(reference), kernels.conv(reference)


@pytest.fixture(params=BUILDS)
def build(request):
    library.select(request.param)
    return request.param


@pytest.fixture(autouse=True)
def best_build():
    yield
    library.select(BUILDS[0])


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def scan_inputs(batch, length, channels, state, seed=0, both=True, gate=True, skip=True, bias=True, log=True):
    """The fifteen tensors of a scan in float64 (values exact in float32), as the layers lay them out."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).double()

    def direction():
        projected = draw(batch, length, 3 + 2 * state)
        A = draw(channels, state).mul(0.5).float().double()
        return [
            draw(batch, length, channels),
            draw(batch, length, channels) - 2,
            A if log else (-A.exp()).float().double(),
            projected[..., 3 : 3 + state],
            projected[..., 3 + state :],
            draw(channels) if skip else None,
            draw(channels) if bias else None,
        ]

    z = draw(batch, length, 2 * channels)[..., channels:] if gate else None
    return direction() + (direction() if both else [None] * 7) + [z]


def conv_inputs(batch, length, channels, width, seed=0, both=True, bias=True):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).double()

    parameters = [draw(channels, width), draw(channels) if bias else None] * 2
    if not both:
        parameters[2:] = [None, None]
    return [draw(batch, length, 2 * channels)[..., :channels], *parameters]


def in_dtype(inputs, dtype):
    """Leaves of another dtype with the same strides."""
    leaves = []
    for x in inputs:
        if x is not None:
            values, x = x, torch.empty_strided(x.shape, x.stride(), dtype=dtype)
            x.copy_(values).requires_grad_()
        leaves.append(x)
    return leaves


def gradients(outputs, inputs, moved=lambda x: x):
    generator = torch.Generator().manual_seed(1)
    outputs = [y for y in outputs if y is not None]
    weights = [moved(torch.randn(y.shape, generator=generator).double()).to(y.dtype) for y in outputs]
    return torch.autograd.grad(outputs, [x for x in inputs if x is not None], weights)


def excess(got, expected):
    """How many times the allowed error each tensor is off."""
    return [
        (x.double() - y).abs().max().item() / (RELATIVE * max(y.abs().max().item(), 1e-6))
        for x, y in zip(got, expected, strict=True)
    ]


def compare(function, exact_function, inputs):
    """Outputs and all gradients are within 1e-5 of float64; where a sum cancels so far that the reference is off in
    float32, or by a few roundings of what it is given, within four times its error."""
    generator = torch.Generator().manual_seed(2)

    def rounded(x):
        return x * (1 + 3e-7 * torch.randn(x.shape, generator=generator, dtype=x.dtype))

    def results(function, dtype, moved=lambda x: x):
        leaves = in_dtype([x if x is None else moved(x) for x in inputs], dtype)
        outputs = [y for y in function(*leaves) if y is not None]
        return [*outputs, *gradients(outputs, leaves, moved)]

    expected = results(exact_function, torch.float64)
    off = excess(results(function, torch.float32), expected)
    if max(off) > 1:
        # a single number may by chance stay where it was, hardly four times
        own = [
            results(exact_function, torch.float32),
            *(results(exact_function, torch.float64, rounded) for _ in range(4)),
        ]
        allowed = [max(1, 4 * max(errors)) for errors in zip(*(excess(found, expected) for found in own))]
        assert all(x <= y for x, y in zip(off, allowed)), (off, allowed)


def compare_scan(inputs, *flags):
    compare(lambda *x: [cpu_scan(*x, *flags)], lambda *x: [exact_scan(*x, *flags)], inputs)


def compare_conv(inputs, silu):
    compare(lambda *x: cpu_conv(*x, silu), lambda *x: exact_conv(*x, silu), inputs)


@pytest.mark.parametrize('shape', [(2, 197, 384, 16), (1, 1, 1, 1), (1, 1000, 20, 4), (3, 32, 16, 64), (1, 33, 200, 7)])
def test_scan_matches_the_reference(build, shape):
    compare_scan(scan_inputs(*shape), 0.5, True, True)


@pytest.mark.parametrize('name', BUILDS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_scan_matches_the_reference_at_any_size(name, data):
    library.select(name)
    length = data.draw(st.one_of(st.integers(1, 70), st.integers(1, 1000)), 'length')
    channels, state = data.draw(st.integers(1, 200), 'channels'), data.draw(st.integers(1, 64), 'state')
    batch = data.draw(st.integers(1, 3), 'batch') if length * channels * state < 200_000 else 1
    both, gate, skip, bias, log, softplus = (data.draw(st.booleans()) for _ in range(6))
    inputs = scan_inputs(batch, length, min(channels, 4_000_000 // (length * state) + 1), state, seed=length, both=both,
                         gate=gate, skip=skip, bias=bias, log=log)  # fmt: skip
    if not softplus:  # step sizes must be positive, or the states grow without bound
        for i in (1, 8):
            if inputs[i] is not None:
                inputs[i] = torch.nn.functional.softplus(inputs[i]).float().double()
        inputs[6] = inputs[13] = None
    compare_scan(inputs, data.draw(st.sampled_from([1.0, 0.5])), softplus, log)


@pytest.mark.parametrize('name', BUILDS)
@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 200),
    channels=st.integers(1, 100),
    width=st.integers(1, 9),
    both=st.booleans(),
    bias=st.booleans(),
    silu=st.booleans(),
)
def test_conv_matches_the_reference_at_any_size(name, batch, length, channels, width, both, bias, silu):
    library.select(name)
    compare_conv(conv_inputs(batch, length, channels, width, both=both, bias=bias), silu)


@pytest.mark.parametrize('shape', [(2, 50, 37), (8, 197, 192), (1, 1, 3), (5, 16)])
def test_norm_matches_aten(build, shape):
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).double(), torch.randn(shape[-1], generator=generator).double()]
    compare(
        lambda x, weight: [cpu.rms_norm(operands.Norm(x, weight, 1e-5))],
        lambda x, weight: [torch.nn.functional.rms_norm(x, shape[-1:], weight, 1e-5)],
        inputs,
    )


def test_steep_decay_and_growth_stay_exact(build):
    """Exponents far beyond float32's range take the wide exponential."""
    inputs = scan_inputs(1, 40, 20, 4, log=False)
    inputs[1][:, ::3] = 40.0
    inputs[2][:, 0] = -100.0
    compare_scan(inputs, 1.0, True, False)
    growing = scan_inputs(1, 12, 20, 4, log=False, both=False)
    growing[2].abs_()
    compare_scan(growing, 1.0, True, False)


def test_not_a_number_is_not_lost(build):
    for position in (0, 1):
        inputs = in_dtype(scan_inputs(1, 70, 20, 4), torch.float32)
        with torch.no_grad():
            inputs[position][0, 40, 3] = float('nan')
            assert cpu_scan(*inputs, 1.0, True, True)[0, 40:, 3].isnan().all()


@pytest.mark.parametrize('bits', [0x7FFFFFFF, 0x7FC00001])
def test_not_a_number_is_not_lost_whatever_its_bits(build, bits):
    """CUDA's has all of them, and came out of an exponential as the largest number."""
    number = torch.tensor(bits, dtype=torch.int32)
    inputs = in_dtype(scan_inputs(1, 70, 20, 4), torch.float32)
    for log in (True, False):
        given = inputs[:2] + [inputs[2].clone()] + inputs[3:]
        given[2].view(torch.int32)[3, 2] = number
        assert cpu_scan(*given, 1.0, True, log)[0, :, 3].isnan().all()
    given = [inputs[0], inputs[1].clone().requires_grad_(), *inputs[2:]]
    with torch.no_grad():
        given[1].view(torch.int32)[0, 40, 3] = number
    (grad,) = torch.autograd.grad(cpu_scan(*given, 1.0, True, True)[0, 40, 3], given[1])
    assert grad[0, 40, 3].isnan()


def test_steep_decays_before_what_is_no_number_stay_exact(build):
    inputs = scan_inputs(1, 70, 20, 4, both=False)
    inputs[1][0, 10, 3], inputs[1][0, 40, 3] = 400.0, float('nan')
    inputs = in_dtype(inputs, torch.float32)
    found, wanted = cpu_scan(*inputs, 1.0, True, True), exact_scan(*inputs, 1.0, True, True)
    torch.testing.assert_close(found[:, :40], wanted[:, :40], rtol=1e-4, atol=1e-4)


def test_shared_inputs_add_their_gradients(build):
    def twice(scan):
        return lambda *direction: [scan(*direction, *direction, None, 1.0, True, True)]

    compare(twice(cpu_scan), twice(exact_scan), scan_inputs(1, 40, 20, 4)[:7])


def test_inference_gives_the_same_bits_as_training(build):
    inputs = in_dtype(scan_inputs(2, 70, 37, 6), torch.float32)
    out = cpu_scan(*inputs, 0.5, True, True)
    with torch.inference_mode():
        assert torch.equal(out, cpu_scan(*inputs, 0.5, True, True))


@pytest.mark.parametrize('shape', [(1, 197, 384, 16), (8, 65, 96, 16), (3, 40, 50, 5)])
def test_the_number_of_threads_changes_no_bit(build, shape, two_threads):
    batch, length, channels, _ = shape
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        inputs = in_dtype(scan_inputs(*shape), torch.float32)
        out = cpu_scan(*inputs, 0.5, True, True)
        conv = in_dtype(conv_inputs(batch, length, channels, 4), torch.float32)
        y = cpu_conv(*conv, True)
        results.append([out, *gradients([out], inputs), *y, *gradients(y, conv)])
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other))


def test_every_element_is_written(build, monkeypatch):
    """Fresh memory is full of NaN here, and none of it shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        return empty(*args, **kwargs).fill_(float('nan'))

    inputs = in_dtype(scan_inputs(2, 70, 37, 6), torch.float32)
    conv = in_dtype(conv_inputs(2, 70, 37, 4), torch.float32)
    monkeypatch.setattr(torch, 'empty', poisoned)
    out, y = cpu_scan(*inputs, 0.5, True, True), cpu_conv(*conv, True)
    for x in (out, *y, *gradients([out], inputs), *gradients(y, conv)):
        assert x.isfinite().all()


@pytest.mark.parametrize('shape', [(0, 5, 4, 2), (2, 0, 4, 2), (2, 5, 0, 2)])
def test_empty_tensors_give_empty_results_and_zero_gradients(shape):
    inputs = in_dtype(scan_inputs(*shape), torch.float32)
    out = cpu_scan(*inputs, 0.5, True, True)
    assert out.shape == shape[:3]
    assert all(not g.any() for g in gradients([out], inputs))
    conv = in_dtype(conv_inputs(*shape[:3], 4), torch.float32)
    assert all(not g.any() for g in gradients(cpu_conv(*conv, True), conv))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    """Equal to the float32 result of the same rounded inputs, rounded once; parameters may stay float32."""
    inputs = [x if x is None else x.detach().to(dtype) for x in scan_inputs(2, 40, 20, 4)]
    for i in (2, 5, 6, 9, 12, 13):
        inputs[i] = inputs[i].float()
    single = [x if x is None else x.float() for x in inputs]
    got = cpu_scan(*[x if x is None else x.requires_grad_() for x in inputs], 0.5, True, True)
    assert got.dtype == dtype
    assert torch.equal(got, cpu_scan(*single, 0.5, True, True).to(dtype))
    assert [g.dtype for g in gradients([got], inputs)] == [x.dtype for x in inputs]
    y, _ = cpu_conv(inputs[0].detach(), torch.ones(20, 4), None, None, None, True)
    assert y.dtype == dtype


def test_wrong_tensors_are_refused_in_one_sentence():
    inputs = in_dtype(scan_inputs(2, 10, 20, 4), torch.float32)

    def call(position, x):
        return cpu_scan(*inputs[:position], x, *inputs[position + 1 :], 0.5, True, True)

    with pytest.raises(TypeError, match='z is torch.float64'):
        call(14, torch.zeros(2, 10, 20, dtype=torch.float64))
    with pytest.raises(ValueError, match=r'B_b has the shape \(2, 10, 5\), not \(2, 10, 4\)'):
        call(10, torch.zeros(2, 10, 5))
    with pytest.raises(ValueError, match='C_b is missing'):
        call(11, None)
    with pytest.raises(ValueError, match='D is on meta'):
        cpu.tensors.checked('D', torch.zeros(20, device='meta'), (20,))
    scan = operands.Scan.of(*inputs)
    u, forward = scan.forward.u, scan.forward
    doubles = forward._replace(u=u.double(), A_log=forward.A_log.double())
    assert cpu.scan_limit(scan._replace(forward=doubles)).count('float64') == 1
    assert 'meta' in cpu.scan_limit(scan._replace(forward=forward._replace(u=u.to('meta'))))
    assert cpu.scan_limit(scan) == ''


def test_channels_may_have_any_stride():
    inputs = in_dtype(scan_inputs(2, 10, 20, 4), torch.float32)
    strided = [x if x is None or x.ndim < 3 else x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    given = [[x if x is None else x.clone().requires_grad_() for x in inputs], strided]
    given[1] = [x if x is None else x.requires_grad_() for x in strided]
    outputs = [cpu_scan(*tensors, 0.5, True, True) for tensors in given]
    assert torch.equal(*outputs)
    for wanted, got in zip(*(gradients([y], tensors) for y, tensors in zip(outputs, given))):
        assert torch.equal(wanted, got)
    x, taps = torch.randn(2, 20, 10).transpose(1, 2), torch.ones(20, 4)
    y, wanted = (cpu_conv(tokens, taps, None, None, None, True)[0] for tokens in (x, x.contiguous()))
    assert torch.equal(y, wanted)
    u = torch.zeros(2, 20, 0)
    assert ops.selective_scan(u, u, -torch.ones(20, 4), torch.zeros(2, 4, 0), torch.zeros(2, 4, 0)).shape == u.shape


def test_operators_pass_opcheck():
    inputs = in_dtype(scan_inputs(1, 40, 20, 4), torch.float32)
    torch.library.opcheck(torch.ops.vim_timm.cpu_scan, (*inputs, 0.5, True, True, True))
    one_way = [None if 7 <= i < 14 else x for i, x in enumerate(inputs)]
    torch.library.opcheck(torch.ops.vim_timm.cpu_scan, (*one_way, 1.0, True, True, True))
    conv = in_dtype(conv_inputs(1, 10, 20, 4), torch.float32)
    torch.library.opcheck(torch.ops.vim_timm.cpu_conv, (*conv, True))
    torch.library.opcheck(torch.ops.vim_timm.cpu_conv, (*conv[:3], None, None, False))
    torch.library.opcheck(torch.ops.vim_timm.cpu_rms_norm, (inputs[0], inputs[5], 1e-5))


def test_one_graph_under_compile():
    inputs = in_dtype(scan_inputs(1, 40, 20, 4), torch.float32)
    weights = in_dtype(conv_inputs(1, 40, 20, 4), torch.float32)[1:]

    def block(*inputs):
        y, y_b = cpu_conv(inputs[0], *weights, True)
        return cpu_scan(y, *inputs[1:7], y_b, *inputs[8:], 0.5, True, True)

    compiled = torch.compile(block, fullgraph=True, backend='aot_eager')
    used = [x for i, x in enumerate(inputs) if i != 7] + weights
    expected = gradients([block(*inputs)], used)
    assert torch.equal(compiled(*inputs), block(*inputs))
    assert all(torch.equal(x, y) for x, y in zip(gradients([compiled(*inputs)], used), expected))


def test_second_derivatives_name_the_reference_backend():
    inputs = in_dtype(scan_inputs(1, 8, 4, 2), torch.float32)
    conv = in_dtype(conv_inputs(1, 8, 4, 4), torch.float32)
    for y, x in ((cpu_scan(*inputs, 1.0, True, True), inputs[0]), (cpu_conv(*conv, True)[0], conv[0])):
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match='reference'):
            torch.autograd.grad(slope.sum(), x)


def test_floating_point_operations_are_counted():
    inputs = in_dtype(scan_inputs(2, 10, 20, 4), torch.float32)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        cpu_scan(*inputs, 1.0, True, True).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 10 * 20 * (2 * 9 * 4 + 2)


def test_changed_parameters_are_seen_at_once():
    inputs = in_dtype(scan_inputs(1, 10, 20, 4), torch.float32)
    with torch.inference_mode():
        before = cpu_scan(*inputs, 1.0, True, True)
        inputs[2].data.add_(0.5)
        fresh = [None if x is None else x.detach().clone() for x in inputs]
        after = cpu_scan(*inputs, 1.0, True, True)
        assert not torch.equal(before, after)
        assert torch.equal(after, cpu_scan(*[x if x is None else x.contiguous() for x in fresh], 1.0, True, True))


def test_subnormal_numbers_survive_outside_the_kernel(two_threads):
    cpu_scan(*in_dtype(scan_inputs(2, 197, 64, 16), torch.float32), 1.0, True, True)
    assert (torch.full((100_000,), 1e-40) * 0.5).min() > 0


def test_python_threads_do_not_disturb_each_other(two_threads):
    def run(seed):
        inputs = in_dtype(scan_inputs(2, 100, 40, 8, seed=seed), torch.float32)
        out = cpu_scan(*inputs, 1.0, True, True)
        return [out, *gradients([out], inputs)]

    alone = [run(seed) for seed in range(6)]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        for expected, got in zip(alone, pool.map(run, range(6))):
            assert all(torch.equal(x, y) for x, y in zip(expected, got))


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork')
@pytest.mark.filterwarnings('ignore')
def test_a_forked_child_runs_the_kernel_on_two_threads(two_threads, monkeypatch):
    """The parent's thread team does not exist in the child: this must not wait for it."""
    inputs = [x if x is None else x.float() for x in scan_inputs(2, 197, 64, 16)]
    expected = cpu_scan(*inputs, 1.0, True, True)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 2)
    context = multiprocessing.get_context('fork')
    parent, child = context.Pipe()

    def body():
        child.send(cpu_scan(*inputs, 1.0, True, True).numpy().tobytes())

    process = context.Process(target=body)
    process.start()
    assert parent.poll(60)
    assert parent.recv() == expected.numpy().tobytes()
    process.join(60)
    assert process.exitcode == 0


class _Scans(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        inputs = [x if x is None else x.float() for x in scan_inputs(1, 50, 20, 4, seed=index)]
        return cpu_scan(*inputs, 1.0, True, True)[0]


def test_data_loader_workers_run_the_kernel(two_threads):
    dataset = _Scans()
    expected = torch.stack([dataset[i] for i in range(4)])
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, num_workers=1, multiprocessing_context='fork')
    assert torch.equal(next(iter(loader)), expected)


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_the_process_holds_one_openmp_runtime(two_threads):
    cpu_scan(*in_dtype(scan_inputs(2, 197, 64, 16), torch.float32), 1.0, True, True)
    code = (
        'from vim_timm.ops import causal_conv, cpu; import torch; assert not cpu.unavailable();'
        'x = torch.zeros(4, 100, 384); print(causal_conv(x, torch.ones(384, 4), None).sum().item());'
        "maps = {line.split()[-1] for line in open('/proc/self/maps') if 'omp' in line.split()[-1]};"
        'assert len(maps) == 1, maps'
    )
    subprocess.run([sys.executable, '-c', code], check=True, cwd=Path(__file__).parent.parent)


def test_the_environment_chooses_the_build(tmp_path):
    code = 'from vim_timm.ops.cpu import library as l; print(l.instruction_set() or l.problem())'
    for name, expected in ((BUILDS[-1], BUILDS[-1]), ('avx9', f'choose {", ".join(BUILDS)}')):
        process = Python(code, output=tmp_path / name, environment={'VIM_TIMM_CPU_ISA': name})
        assert expected in finish([process])


def test_operators_open_the_library_themselves(tmp_path):
    code = (
        'import torch, vim_timm.ops; print(torch.ops.vim_timm.cpu_rms_norm(torch.ones(3, 4), torch.ones(4), 0.0).sum())'
    )
    assert 'tensor(12.)' in finish([Python(code, output=tmp_path / 'log')])


def test_without_the_library_the_reason_tells_the_mend(monkeypatch):
    monkeypatch.setattr(library, '_PATH', Path('nowhere/libvim_timm_cpu.so'))
    assert 'C compiler' in library._prepare() and 'pip install' in library._prepare()


def test_a_library_of_another_version_is_not_called(monkeypatch):
    """A structure of another size would be read past its end."""
    monkeypatch.setitem(library._expected, 'CHUNK', 32)
    monkeypatch.setitem(library._expected, 'Scan', 8)
    monkeypatch.setitem(library._expected, 'FASTEST / 2^64', 8931484)
    found = library._prepare()
    wrong = 'CHUNK is 64 and not 32, FASTEST / 2^64 is 8931486 and not 8931484, Scan is 640 and not 8'
    assert wrong in found and 'setup.py build_ext' in found


@pytest.mark.skipif(shutil.which('cc') is None, reason='no C compiler')
def test_a_library_that_does_not_name_its_sizes_is_not_called(monkeypatch, tmp_path):
    source, older = tmp_path / 'older.c', tmp_path / 'older.so'
    names = ('const char *vim_timm_instruction_sets(void) { return "baseline"; }', 'void vim_timm_set_team(void *p) {}')
    source.write_text('\n'.join(names))
    subprocess.run(['cc', '-shared', '-fPIC', source, '-o', older], check=True)
    monkeypatch.setattr(library, '_PATH', older)
    monkeypatch.setattr(library, '_library', None)
    assert 'not of this version' in library._prepare()
