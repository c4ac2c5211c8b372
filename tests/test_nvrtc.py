"""How CUDA C++ is compiled at run time and launched; launches on a GPU are in `test_cuda_mixer`."""

import importlib.util
import types

import numpy as np
import pytest
import torch

from vim_timm.ops.cuda import mixer_op, nvrtc, sizes
from vim_timm.ops.plain import reference


def test_sources_have_the_largest_decay_rate_of_the_reference():
    rate = dict(sizes.macros([('RANK', 3)]))['FASTEST']
    assert rate[-1] == 'f' and np.float32(rate[:-1]) == np.float32(reference.FASTEST)


def test_a_thread_without_a_context_gets_one():
    """Autograd's thread may launch before torch has used CUDA in it."""

    class Driver:
        bound = False

        def cuDeviceGet(self, ordinal):
            return 0, ordinal

        def cuDevicePrimaryCtxRetain(self, device):
            return 0, f'context of {device}'

        def cuCtxSetCurrent(self, context):
            self.bound = context == 'context of 0'
            return (0,)

    module = object.__new__(nvrtc.Module)
    module.driver = Driver()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, 'current_device', lambda: 0)
        assert (
            module.in_context(lambda: (0, 'done') if module.driver.bound else (nvrtc.INVALID_CONTEXT, None)) == 'done'
        )
    with pytest.raises(RuntimeError, match='failed'):
        module.in_context(lambda: (1,))


@pytest.mark.parametrize('codes', [[0], 2 * [nvrtc.INVALID_CONTEXT] + [0], [1, 1]], ids=str)
def test_a_kernel_is_launched_again_only_where_it_was_not(codes, monkeypatch):
    calls, module = [], object.__new__(nvrtc.Module)

    def launch(function, *arguments):
        calls.append((function, *arguments[:-2]))
        return (codes[len(calls) - 1],)

    module.driver = types.SimpleNamespace(
        cuLaunchKernel=launch, cuDeviceGet=lambda ordinal: (0, ordinal), cuCtxSetCurrent=lambda context: (0,),
        cuDevicePrimaryCtxRetain=lambda device: (0, device),
    )  # fmt: skip
    module.device, module.overlaps, module.functions = 3, False, {'f': 'function'}
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 3)
    monkeypatch.setattr(torch._C, '_cuda_getCurrentRawStream', lambda device: 10 + device, raising=False)
    if codes[-1]:
        with pytest.raises(RuntimeError, match='CUDA call failed'):
            module.launch('f', (1, 2, 3), 64, 2**40, 7, shared=5)
    else:
        module.launch('f', (1, 2, 3), 64, 2**40, 7, shared=5)
    assert calls == [('function', 1, 2, 3, 64, 1, 1, 5, 13)] * len(codes)
    assert nvrtc.buffer.words[:2] == [2**40, 7]


@pytest.mark.skipif(
    importlib.util.find_spec('cuda') is None, reason='needs the CUDA bindings of a CUDA build of PyTorch'
)
@pytest.mark.parametrize('capability', [80, 90, 100, 120])  # 86 and 89 run what is compiled for 80
def test_kernels_compile_for_every_gpu(capability):
    """More static shared memory than the 48 KiB that every GPU gives a block fails to compile."""

    def compiles(files, **macros):
        given = dict(HALF=half, RANK=rank, **macros)
        assert nvrtc.compile_cubin(files, capability, tuple(given.items()))

    scans = {(0, 12, 6): ('0000', '1000', '0100', '0011'), (1, 48, 5): ('0111',)}  # LOCAL, CARRY, KEEP, GRAD
    for (half, rank, blocks), kinds in scans.items():
        for kind in kinds:
            flags = dict(zip(('LOCAL', 'CARRY', 'KEEP', 'GRAD'), map(int, kind)))
            compiles(mixer_op.FORWARD, BLOCKS=blocks, **flags)
        compiles(mixer_op.CONV_BACKWARD, WIDTH=4, HAS_BIAS=1)
        for fused, warps in ((0, 1), (1, 4)):
            shared = sizes.project_shared(rank, warps, bool(fused))
            compiles(mixer_op.PROJECT, WIDTH=4, HAS_BIAS=1, PROJECT=fused, WARPS=warps, SHARED_BYTES=shared)
        compiles(mixer_op.BACKWARD, BLOCKS=8, CHUNKED=half)
        compiles(mixer_op.SUMS)
        compiles(mixer_op.WEIGHTS)
