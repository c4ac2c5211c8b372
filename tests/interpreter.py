"""A plugin of pytest that lets Triton's interpreter run kernels in a third of the time, without what it does in vain.

* At each call of another function it puts its operations in the place of the language's, where a launch has put them
  already. Here it does so once a launch for the modules that a function names.
* It computes sums and products of integers again in 64 bits, for an assertion that it makes only in `debug`.
* It makes a table of all types for each look into it, and the shape of every tensor anew.

A version of Triton without these parts runs as it is.
"""

import dataclasses

import triton.language as tl
from triton.runtime import interpreter

replace = getattr(interpreter, '_patch_lang', None)
replaced: set[frozenset[int]] = set()  # by the launch that runs


def replace_once(fn):
    modules = frozenset(id(value) for value in fn.__globals__.values() if value is tl or value is tl.core)
    if modules in replaced:
        return None  # only a launch restores
    launched = not replaced
    scope = replace(fn)
    replaced.add(modules)
    if launched:
        restore = scope.restore

        def end():
            replaced.clear()
            restore()

        scope.restore = end
    return scope


if replace and hasattr(interpreter, '_LangPatchScope'):
    interpreter._patch_lang = replace_once

options = interpreter.interpreter_builder.options
if hasattr(options, 'sanitize_overflow') and not options.debug:
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)

look_up = interpreter._get_np_dtype
dtypes: dict[str, object] = {}  # of numpy, by names of Triton's


def known_dtype(dtype):
    name = dtype.scalar.name
    if name not in dtypes:
        dtypes[name] = look_up(dtype.scalar)
    return dtypes[name]


interpreter._get_np_dtype = known_dtype

initialize = tl.tensor.__init__
shapes: dict[tuple, tuple] = {}  # numel and shape of a tensor


def initialize_from_known(tensor, handle, type):
    key = tuple(type.shape) if type.is_block() else ()
    if key in shapes:
        tensor.handle, tensor.type, tensor.dtype = handle, type, type.scalar
        tensor.numel, tensor.shape = shapes[key]
    else:
        initialize(tensor, handle, type)
        shapes[key] = tensor.numel, tensor.shape


tl.tensor.__init__ = initialize_from_known
