"""What a checkpoint's pickle may hold beside its tensors: values that are nothing but data.

torch's `weights_only` unpickler constructs tensors, plain containers and what is listed here; any other name, whatever
it would do, refuses the file. Nothing that is listed runs code, opens files or takes more memory than the file.
"""

import argparse
import datetime
import decimal
import fractions
import pathlib
import types
import uuid
from typing import Any, Dict, Iterable, List, Optional, Tuple, Union

import numpy as np
from torch.torch_version import TorchVersion

_DTYPES = (
    'bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 complex64 complex128 S U O M m'
)


def _dictionary(factory: Any = None) -> Dict[Any, Any]:
    return {}


def _list(values: Iterable[Any] = (), most: Optional[int] = None) -> List[Any]:
    return list(values)


def harmless() -> List[Union[Any, Tuple[Any, str]]]:
    """Objects with the names under which pickles of all Python and NumPy versions know them."""
    plain: Tuple[Any, ...] = (
        argparse.Namespace,
        types.SimpleNamespace,
        TorchVersion,
        datetime.date,
        datetime.datetime,
        datetime.time,
        datetime.timedelta,
        datetime.timezone,
        decimal.Decimal,
        fractions.Fraction,
        uuid.UUID,
        # factories of a defaultdict; each of them makes no more than it is given
        *(bool, int, float, str, list, dict, set, frozenset),
    )
    named: List[Union[Any, Tuple[Any, str]]] = [(kind, f'{kind.__module__}.{kind.__qualname__}') for kind in plain]
    # torch's unpickler fills no others than these two
    named += [(_dictionary, 'collections.defaultdict'), (_list, 'collections.deque')]
    for module in ('pathlib', 'pathlib._local'):
        named += [(pathlib.PurePath, f'{module}.{name}') for name in ('PurePath', 'Path')]
        named += [(pathlib.PurePosixPath, f'{module}.{name}') for name in ('PosixPath', 'PurePosixPath')]
        named += [(pathlib.PureWindowsPath, f'{module}.{name}') for name in ('WindowsPath', 'PureWindowsPath')]
    for module in ('numpy.core.multiarray', 'numpy._core.multiarray'):
        named += [
            (np.float64(0).__reduce__()[0], f'{module}.scalar'),
            (np.zeros(0).__reduce__()[0], f'{module}._reconstruct'),
        ]
    named += [(np.ndarray, 'numpy.ndarray'), (np.dtype, 'numpy.dtype')]
    for kind in {type(np.dtype(name)) for name in _DTYPES.split()}:
        named.append((kind, f'{kind.__module__}.{kind.__qualname__}'))
    return named
