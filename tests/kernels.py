"""Kernels as functions of flat operands, the form in which tests draw operands and take gradients; whether a kernel
agrees with the law; and Triton's in its interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from vim_timm.ops import operands


def fields(kind):
    """Names of a class of operands' flat fields."""
    return [part.split()[-1] for part in operands.schema(kind).split(', ')]


def with_gradients(function, given, dtype=None):
    """Outputs of function(*tensors), and the gradients of a weighted sum of them, by name.

    Args:
        given: Tensors by name, None for an absent one; those that are not floating point get no gradient.
        dtype: Of the tensors and weights, None for theirs.
    """
    leaves = {}
    for name, x in given.items():
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            x = (x.detach() if dtype is None else x.detach().to(dtype)).requires_grad_()
        leaves[name] = x
    outputs = function(*leaves.values())
    outputs = [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if y is not None]
    generator = torch.Generator().manual_seed(0)
    first = next(iter(given.values()))
    weights = [torch.randn(y.shape, generator=generator).to(y.device, first.dtype).to(y.dtype) for y in outputs]
    named = {name: x for name, x in leaves.items() if isinstance(x, torch.Tensor) and x.requires_grad}
    gradients = torch.autograd.grad(outputs, list(named.values()), weights)
    found = {f'output {i}' if i else 'output': y.detach() for i, y in enumerate(outputs)}
    return found | {f'gradient of {name}': g for name, g in zip(named, gradients)}


def kept_bytes(function):
    """Bytes that autograd keeps for the backward pass of function(), each storage once."""
    kept = {}

    def pack(x):
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage, storage.nbytes()  # held, so that no other has its address
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = function()
    del y
    return sum(size for _, size in kept.values())


def error(found, wanted):
    """Norm of the difference over the norm; absolute where nothing is wanted."""
    difference = float((found.detach().double() - wanted.detach().double()).norm())
    return difference / float(wanted.detach().norm()) if wanted.norm() > 0 else difference


def assert_agrees(function, law, given, tolerance, *, sums=(), rounded=None, zero=()):
    """Outputs and every gradient of a kernel, which are those of the law in float64; the message names what is off.

    Args:
        function, law: Functions of the tensors of `given`, as in `with_gradients`.
        tolerance: Of errors, see `error`; NaN is never within it.
        sums: Names of operands whose gradients are sums of what nearly cancels: ten times the tolerance.
        rounded: The law with intermediate results in the kernel's types: twice its error is allowed on top.
        zero: Names of operands whose gradients are zero but for rounding: not compared.
    """
    found, wanted = with_gradients(function, given), with_gradients(law, given, torch.float64)
    allowed = {name: 10 * tolerance if name[len('gradient of ') :] in sums else tolerance for name in wanted}
    if rounded is not None:
        for name, value in with_gradients(rounded, given, torch.float64).items():
            allowed[name] += 2 * error(value, wanted[name])
    assert list(found) == list(wanted)
    off = {}
    for name, value in wanted.items():
        assert found[name].shape == value.shape, name
        if name[len('gradient of ') :] not in zero and not error(found[name], value) < allowed[name]:
            off[name] = f'{error(found[name], value):.1e}, not under {allowed[name]:.1e}'
    assert not off, off
    return found


def scan(backend):
    """`backend.scan` of the fields of `operands.Scan`."""
    return lambda *flat: backend.scan(operands.Scan.of(*flat))


def conv(backend):
    """`backend.conv` of the fields of `operands.Conv`."""
    return lambda *flat: backend.conv(operands.Conv.of(*flat))


def mixer(backend):
    """`backend.mixer` of the fields of `operands.Mixer`."""
    return lambda *flat: backend.mixer(operands.Mixer.of(*flat))


def pass_in_the_interpreter(files, selected):
    """Tests of files, selected as by pytest's -k, pass with Triton's interpreter, which is chosen before its import."""
    command = [sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider']
    command += ['-p', 'tests.interpreter', '-k', selected, *files]
    environment = dict(os.environ, TRITON_INTERPRET='1', CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1')
    folder = Path(__file__).parents[1]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-1000:]
