"""A plugin of pytest that lets Triton's interpreter run a kernel's calls of other functions in half the time.

At each call the interpreter puts its operations in the place of the language's, where a launch has put them already.
Here it does so once a launch for the modules that a function names. A version of Triton without that function's parts
runs as it is.
"""

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
