"""A sum and its norm in one kernel: the law is aten's operators, and a block that takes it is the block without it."""

import importlib
import os
import warnings
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from functorch.compile import aot_function, nop
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

import vim_timm  # noqa: F401  registers the models
from tests.kernels import error
from vim_timm.layers.block import Block
from vim_timm.layers.norm import RmsNorm
from vim_timm.ops import AddNorm, add_norm, backends, rms_norm, use_scan_backend
from vim_timm.ops.triton_kernels import add_norm_op, sums
from vim_timm.ops.triton_kernels.add_norm_op import Launch

INTERPRETER = os.environ.get('TRITON_INTERPRET') == '1'
GPU = torch.cuda.is_available() and not INTERPRETER
DEVICE = 'cuda' if GPU else 'cpu'
kernels = pytest.mark.skipif(not (GPU or INTERPRETER), reason='needs an NVIDIA GPU or TRITON_INTERPRET=1')
only_gpu = pytest.mark.skipif(not GPU, reason='needs an NVIDIA GPU')

SINGLE, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
TOLERANCE = {SINGLE: 2e-6, HALF: 2e-3, BRAIN: 1e-2}


def draw(*shape, dtype=SINGLE):
    return torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()


def sum_kernels():
    return importlib.import_module('vim_timm.ops.triton_kernels.sum_kernels')  # Triton's import


def law(x, y, weight, eps):
    """The sum in the dtype of x + y, and the norm of what that holds."""
    total = x if y is None else x + y
    wide = total.double() if total.dtype == SINGLE else total.float()
    return total, F.rms_norm(wide, wide.shape[-1:], weight.to(wide.dtype), eps)


@kernels
@pytest.mark.parametrize(
    'shape, small, x_dtype, y_dtype, dtype',
    [
        ((3, 5, 19), False, SINGLE, None, SINGLE),
        ((33, 96), False, SINGLE, None, BRAIN),
        ((33, 96), True, SINGLE, SINGLE, SINGLE),
        ((3, 5, 19), True, SINGLE, BRAIN, BRAIN),
        ((7, 64), False, SINGLE, BRAIN, SINGLE),
        ((2, 1, 3), False, BRAIN, BRAIN, BRAIN),
        ((7, 64), True, BRAIN, SINGLE, SINGLE),
        ((3, 5, 19), False, SINGLE, HALF, HALF),
        ((3, 5, 19), True, HALF, None, SINGLE),
    ],
    ids=str,
)
def test_the_kernel_is_the_law(shape, small, x_dtype, y_dtype, dtype, triton, monkeypatch):
    if small:  # steps of a row
        for method, launch in (('forward', Launch(1, 1, 0)), ('backward', Launch(64, 1, 1))):
            plain = getattr(add_norm_op.AddNorm, method)
            monkeypatch.setattr(
                add_norm_op.AddNorm, method, lambda *args, plain=plain, launch=launch: plain(*args, launch)
            )
    x, weight = draw(*shape, dtype=x_dtype), draw(shape[-1])
    y = None if y_dtype is None else draw(*shape, dtype=y_dtype)
    leaves = [tensor for tensor in (x, y, weight) if tensor is not None]
    wanted, found = law(x, y, weight, 1e-5), add_norm(AddNorm(x, y, weight, 1e-5, dtype))
    assert found[0].dtype == wanted[0].dtype and found[1].dtype == dtype
    tolerance = max(TOLERANCE[tensor.dtype] for tensor in (*leaves, *found))
    grads = [torch.randn(shape, device=DEVICE).to(out.dtype) for out in found]
    for outputs in (slice(0, 2), slice(0, 1), slice(1, 2)):  # both, and each alone
        given = [torch.autograd.grad(o[outputs], leaves, g[outputs], allow_unused=True, retain_graph=True)
                 for o, g in ((found, grads), (wanted, [g.to(o.dtype) for g, o in zip(grads, wanted)]))]  # fmt: skip
        for leaf, a, b in zip(leaves, *given, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert a.dtype == leaf.dtype and error(a, b) < tolerance
    for a, b in zip(found, wanted):
        assert error(a, b) < tolerance


@kernels
def test_rows_of_any_strides_and_a_weight_of_two_bytes(triton):
    x, y = draw(6, 4, 9).transpose(0, 1), draw(4, 9, 6).transpose(1, 2)
    weight = draw(18, dtype=BRAIN)[::2]
    wanted, found = law(x, y, weight, 0.1), add_norm(AddNorm(x, y, weight, 0.1, SINGLE))
    grads = [torch.randn(9, 4, 6, device=DEVICE).permute(1, 2, 0) for _ in found]
    given = [torch.autograd.grad(o, (x, y, weight), [g.to(t.dtype) for g, t in zip(grads, o)]) for o in (found, wanted)]
    for a, b in (*zip(found, wanted), *zip(*given)):
        assert error(a, b) < (1e-2 if a.dtype == BRAIN else 2e-6)


@kernels
def test_rows_that_a_step_lacks_have_no_part_without_eps(triton):
    x, weight = draw(3, 19), draw(19)
    pairs = [torch.autograd.grad(both[1].sum(), (x, weight))
             for both in (add_norm(AddNorm(x, None, weight, 0.0, SINGLE)), law(x, None, weight, 0.0))]  # fmt: skip
    for a, b in zip(*pairs, strict=True):
        assert error(a, b) < 2e-6


@kernels
def test_other_classes_of_tensors_are_composed(triton):
    class Sharded(torch.Tensor):
        pass

    x, weight = draw(2, 8), draw(8)
    for given in ((x.as_subclass(Sharded), None, weight), (x, x.as_subclass(Sharded), weight),
                  (x, None, weight.as_subclass(Sharded))):  # fmt: skip
        assert add_norm(AddNorm(*given, 1e-5, SINGLE)) is None
    traced = aot_function(lambda x, weight: rms_norm(x, weight, 1e-5), nop)  # takes no operator that returns an operand
    assert error(traced(x, weight), law(x, None, weight, 1e-5)[1]) < 2e-6


@kernels
def test_an_empty_batch_has_a_norm_where_triton_is_forced(triton):
    assert rms_norm(draw(0, 3, 8), draw(8), 1e-5).shape == (0, 3, 8)


def test_a_norm_asks_nothing_of_what_torchscript_traces():
    weight = torch.ones(8, device=DEVICE)
    with warnings.catch_warnings():
        warnings.simplefilter('error', torch.jit.TracerWarning)
        torch.jit.trace(lambda x: rms_norm(x, weight, 1e-5), draw(2, 8))


@kernels
@pytest.mark.parametrize('rows, columns, dtype', [(1, 1, SINGLE), (70, 65, BRAIN), (1030, 9, HALF), (33, 130, SINGLE)])
def test_sums_of_rows(rows, columns, dtype, triton):
    x = torch.randn(rows, columns, device=DEVICE).to(dtype)
    assert error(sums.sum_of_rows(sum_kernels(), x, sums.ROWS._replace(rows=16)), x.double().sum(0)) < 2e-6
    assert error(sums.sum_of_parts(sum_kernels(), x.float()), x.double().sum(0)) < 2e-6


@kernels
def test_without_a_summand_the_sum_is_not_copied(triton):
    x, weight = draw(2, 8), draw(8)
    total, _ = add_norm(AddNorm(x, None, weight, 1e-5, SINGLE))
    assert total.data_ptr() == x.data_ptr()


@kernels
def test_small_norms_of_inference_are_not_for_the_kernel(triton):
    x, weight = draw(2, 8), draw(8)
    with torch.no_grad():
        assert add_norm(AddNorm(x, None, weight, 1e-5, SINGLE)) is None
    assert add_norm(AddNorm(x.detach(), None, weight.detach(), 1e-5, SINGLE)) is None


@kernels
def test_large_norms_of_inference_give_the_bits_of_training(triton, monkeypatch):
    monkeypatch.setattr('vim_timm.ops.norm._MANY', 16)
    x, y, weight = draw(2, 8), draw(2, 8), draw(8)
    for given in (AddNorm(x, y, weight, 1e-5, BRAIN), AddNorm(x, None, weight, 1e-5, BRAIN)):
        learning = add_norm(given)
        with torch.inference_mode():
            found = add_norm(given)
        assert all(torch.equal(a, b) for a, b in zip(found, learning, strict=True))


@kernels
@pytest.mark.parametrize(
    'x, y, match',
    [
        (torch.ones(2, 8, dtype=torch.float64), None, 'float64'),
        (torch.ones(2, 0), None, '1 to 8192 channels'),
        (torch.ones(0, 8), None, '1 to 8192 channels'),
        (torch.ones(2, 8193), None, '1 to 8192 channels'),
        (torch.ones(2, 8), torch.ones(1, 8), 'one shape'),
    ],
)
def test_what_the_kernel_cannot_take_is_composed(x, y, match):
    x = x.to(DEVICE).requires_grad_()
    given = AddNorm(x, None if y is None else y.to(DEVICE), torch.ones(x.shape[-1], device=DEVICE), 1e-5, x.dtype)
    assert match in backends.TABLE['add_norm']['triton'].limit(given)
    assert add_norm(given) is None


@kernels
def test_a_weight_of_another_length_is_refused(triton):
    with pytest.raises(ValueError, match='do not fit together'):
        add_norm(AddNorm(draw(2, 8), None, draw(7), 1e-5, SINGLE))


@kernels
def test_a_second_derivative_is_refused(triton):
    x, weight = draw(2, 8), draw(8)
    (grad,) = torch.autograd.grad(rms_norm(x, weight, 1e-5).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='no second one'):
        grad.sum().backward()


@kernels
@pytest.mark.parametrize(
    'name, narrow',
    [('vim_nano_patch4_32', True), ('vim2_nano_patch4_32', False), ('vim2_nano_patch4_32', True),
     ('vim_hybrid_tiny_patch4_32', False)],
)  # fmt: skip
def test_a_model_with_it_is_the_model_without(name, narrow, monkeypatch):
    size = dict(depth=2, img_size=8, embed_dim=64, num_classes=5)
    model = timm.create_model(name, **size, drop_path_rate=0.0).to(DEVICE)
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) / 20
    images = torch.randn(3, 3, 8, 8, device=DEVICE)
    calls = []
    run = backends.TABLE['add_norm']['triton']

    def counted(given):
        calls.append(given.y is not None)
        return run.run(given)

    def gradients():
        model.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=narrow):
            logits = model(images)
        logits.float().square().sum().backward()
        return {'logits': logits, **{key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}}

    with monkeypatch.context() as patch:
        patch.setitem(backends.TABLE['add_norm'], 'triton', run._replace(run=counted))
        if not GPU:
            patch.setitem(backends.KERNELS, 'add_norm', {'cpu': 'triton'})
            patch.setitem(backends.KERNELS, 'rms_norm', {})
        found = gradients()
    assert calls.count(True) == (0 if name.startswith('vim_nano') else 2)
    assert calls.count(False) >= 3
    with monkeypatch.context() as patch:
        patch.setitem(backends.KERNELS, 'add_norm', {})
        wanted = gradients()
    assert found.keys() == wanted.keys()
    if narrow:  # small gradients are sums that cancel
        found, wanted = ({'all': torch.cat([x.flatten() for x in given.values()])} for given in (found, wanted))
    for key, value in found.items():
        assert error(value, wanted[key]) < (2e-2 if narrow else 1e-4), key


@kernels
@pytest.mark.parametrize('again', [False, True], ids=['', 'checkpointed'])
@pytest.mark.parametrize('narrow', [False, True], ids=['float32', 'bfloat16'])
def test_compiled_training_has_its_gradients(narrow, again, triton):
    backward = torch.ops.vim_timm.triton_add_norm_backward.default
    calls = []

    def counted(graph, inputs):
        calls.append(sum(node.target is backward for node in graph.graph.nodes))
        return graph

    torch._dynamo.reset()
    block = Block(16, torch.nn.Linear(16, 16), torch.nn.Linear(16, 16), RmsNorm).to(DEVICE)
    run = partial(checkpoint, block, use_reentrant=False) if again else block
    x = torch.randn(2, 3, 16, device=DEVICE, requires_grad=True)
    leaves = [x, *block.parameters()]

    def gradients(run):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=narrow):
            y = run(x, None)
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    found = gradients(
        torch.compile(run, backend=aot_autograd(fw_compiler=counted, bw_compiler=counted), fullgraph=True)
    )
    assert sum(calls) == 2
    with use_scan_backend('torch'):
        wanted = gradients(block)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype and error(a, b) < (2e-2 if narrow else 1e-5)
    with torch.no_grad():
        assert error(torch.compile(block, backend='eager', fullgraph=True)(x, None), block(x, None)) < 2e-2


@only_gpu
def test_norms_are_recorded_in_a_graph():
    norm, x = RmsNorm(64).cuda(), torch.randn(5, 64, device='cuda', requires_grad=True)

    def step():
        norm.zero_grad(set_to_none=False)
        with torch.autocast('cuda', BRAIN):
            norm(x).square().sum().backward()
        return norm.weight.grad

    expected = step().clone()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = step()
    graph.replay()
    assert torch.equal(found, expected)
