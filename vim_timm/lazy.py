"""Imports that wait until they are needed: torch and timm take seconds, which `--help` and a typing error need not."""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def attributes(package: str, names: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """A package's `__getattr__` and `__dir__` (PEP 562): a name is imported when it is first asked for.

    Args:
        package: full name of the package.
        names: name -> full name of the module that has it, or of the submodule that it is.
    """

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f'module {package!r} has no attribute {name!r}')
        module = importlib.import_module(names[name])
        value = module if names[name] == f'{package}.{name}' else getattr(module, name)
        setattr(sys.modules[package], name, value)
        return value

    return get, lambda: sorted({*vars(sys.modules[package]), *names})


class After:
    """Imports `then` as soon as `name` is imported, or now where it is already.

    A finder of `sys.meta_path` (https://docs.python.org/3/reference/import.html#the-meta-path): it finds nothing
    by itself, and adds one import to the end of the loading of `name`.
    """

    def __init__(self, name: str, then: str):
        self.name, self.then = name, then
        if name in sys.modules:
            importlib.import_module(then)
        else:
            sys.meta_path.insert(0, self)  # type: ignore[arg-type]

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.name:
            return None
        finders = [finder for finder in sys.meta_path if finder is not self]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in finders)), None)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_import(module: Any) -> None:
                load(module)
                importlib.import_module(self.then)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)  # type: ignore[arg-type]

            spec.loader.exec_module = load_and_import  # type: ignore[method-assign]
        return spec
