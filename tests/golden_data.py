"""Golden data: the original code's own numbers, read by the tests.

`tests/golden` holds a selection; `VIM_TIMM_GOLDEN=DIR` runs the same tests over another folder of the same structure.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


def root() -> Path:
    """The folder that holds `models/`, `selective_scan/`, `rope.npz` and so on."""
    return Path(os.environ.get('VIM_TIMM_GOLDEN') or Path(__file__).with_name('golden'))


def load(path: Path) -> tuple[Arrays, dict[str, Any]]:
    """The arrays and the metadata of one `.npz` file."""
    with np.load(path) as data:
        arrays = {name: data[name] for name in data.files if name != 'meta_json'}
        return arrays, json.loads(str(data['meta_json']))


def load_json(name: str) -> Any:
    """A `.json` file, by its path under the root."""
    return json.loads((root() / name).read_text())


def cases(kind: str) -> list[Path]:
    """Every `.npz` file of a folder (`models`, `selective_scan`, `mixer`), without the models of the refused modes."""
    paths = sorted((root() / kind).glob('*.npz'))
    if kind == 'models':
        paths = [path for path in paths if not refused(load(path)[1]['kwargs'])]
    return paths


def groups(name: str) -> dict[str, tuple[Arrays, dict[str, Any]]]:
    """The cases inside one `.npz` file (`causal_conv1d.npz`, `rope.npz`, ...): name -> (arrays, metadata)."""
    arrays, meta = load(root() / name)
    return {
        case: ({key[len(case) + 1 :]: value for key, value in arrays.items() if key.startswith(f'{case}/')}, case_meta)
        for case, case_meta in meta.items()
    }


def split(arrays: Arrays, prefix: str) -> Arrays:
    """The arrays named `prefix/NAME`, as `{NAME: array}`."""
    return {key[len(prefix) + 1 :]: value for key, value in arrays.items() if key.startswith(f'{prefix}/')}


def refused(kwargs: dict[str, Any]) -> bool:
    """Whether a model's original arguments select one of the research modes that `from_original` refuses."""
    without_cls = not kwargs.get('if_cls_token', True)
    return (
        kwargs.get('flip_img_sequences_ratio', -1.0) > 0
        or kwargs.get('if_bidirectional', False)
        or (kwargs.get('final_pool_type') in ('max', 'all') and without_cls)
    )


def original_kwargs(meta: dict[str, Any]) -> dict[str, Any]:
    """A model case's arguments, as HEAD's constructor takes them: the first release's implied ones spelled out."""
    kwargs = dict(meta['kwargs'])
    if meta['class_version'].startswith('first release'):
        kwargs |= {'if_divide_out': False, 'use_middle_cls_token': False, 'stride': kwargs['patch_size']}
    return kwargs


def tolerance(reference: np.ndarray, rope: bool = False) -> float:
    """Relative tolerance of a float64 run: some references, and the rope tables, are only stored as float32."""
    return 1e-6 if rope or reference.dtype == np.float32 else 1e-9
