"""Models as graphs for other programs, ONNX and torch.export: written whole, compared with the model, read again."""

import io
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import UserError, explain
from ..files import write_atomically
from ..settings.inherited import settings_of
from .process import usual_defaults
from .saved import Saved

KEY = 'vim_timm'  # of our entry in a file's metadata
TOLERANCE = 1e-3  # of logits, relative to the largest


def _facts(saved: Saved) -> str:
    """What a reader has to know: images, classes, architecture."""
    data = {name: list(value) if isinstance(value, tuple) else value for name, value in saved.data_config.items()}
    facts = {'architecture': saved.architecture, 'data_config': data, 'class_names': saved.class_names}
    facts.update({'input_img_mode': saved.image_mode} if saved.image_mode else {})
    return json.dumps({**facts, 'num_classes': saved.model.num_classes})


def _example(saved: Saved, batch: int) -> torch.Tensor:
    return torch.randn(batch, *saved.data_config['input_size'], generator=torch.Generator().manual_seed(batch))


@usual_defaults()
def export_onnx(saved: Saved, path: str, batch: int = 0, opset: int | None = None) -> float:
    """Write an ONNX file with its weights inside, and return the largest relative difference of its logits.

    Args:
        batch: number of images; 0 for any.

    Raises:
        UserError: the model cannot be exported, or the file computes something else.
    """
    require_onnx()
    with explain(f'export to {path}'), tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, 'model.onnx')
        expected = _logits(saved, batch)
        program = torch.onnx.export(
            saved.model, (_example(saved, batch or 2),), dynamo=True, verbose=False, opset_version=opset,
            input_names=['images'], output_names=['logits'],
            dynamic_shapes=None if batch else ({0: torch.export.Dim('batch', min=1)},),
        )  # fmt: skip
        assert program is not None
        written = program.model.opset_imports['']
        if opset not in (None, written):  # torch goes on after a conversion that failed
            raise ValueError(f'its operators are of version {written}, and torch cannot convert them to {opset}')
        program.model.metadata_props[KEY] = _facts(saved)
        program.save(file, external_data=False)
        _, run = open_onnx(file)
        difference = _compare(saved, run, expected)
        content = Path(file).read_bytes()
    write_atomically(path, content)
    return difference


@usual_defaults()
def export_torch(saved: Saved, path: str, batch: int = 0) -> float:
    """Write a torch.export program (`torch.export.load`), and return the largest relative difference of its logits."""
    with explain(f'export to {path}'):
        expected = _logits(saved, batch)
        # torch 2.6 wants a maximum below int64's
        shapes = None if batch else ({0: torch.export.Dim('batch', min=1, max=2**31 - 1)},)
        program = torch.export.export(saved.model, (_example(saved, batch or 2),), dynamic_shapes=shapes)
        file = io.BytesIO()
        torch.export.save(program, file, extra_files={KEY: _facts(saved)})
        file.seek(0)
        difference = _compare(saved, torch.export.load(file).module(), expected)
    write_atomically(path, file.getvalue())
    return difference


def _logits(saved: Saved, batch: int) -> list[torch.Tensor]:
    """The model's of some examples, computed before an export, which takes much longer.

    Raises:
        UserError: they are not finite.
    """
    found = []
    for count in [batch] if batch else [1, 3]:
        with torch.inference_mode():
            found.append(saved.model(_example(saved, count)))
        if not torch.isfinite(found[-1]).all():
            raise UserError('the model returns values that are not finite: its weights are broken')
    return found


def _compare(saved: Saved, run: Callable[[torch.Tensor], torch.Tensor], logits: list[torch.Tensor]) -> float:
    worst = 0.0
    for expected in logits:
        found = run(_example(saved, len(expected))).detach()
        difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
        if not difference <= TOLERANCE:  # it may be NaN
            raise UserError(
                f'the exported graph computes other logits (relative difference {difference:.2g}): not written'
            )
        worst = max(worst, difference)
    return worst


def require_onnx() -> None:
    """Raise a UserError unless the libraries of ONNX are installed."""
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError("ONNX needs `pip install 'vim-timm[export]'`") from error


def open_onnx(path: str) -> tuple[Saved, Callable[[torch.Tensor], torch.Tensor]]:
    """A model that `export_onnx` wrote: what is known of it, and images (B, C, H, W) -> logits (B, classes).

    Raises:
        UserError: it cannot be read, or is another program's.
    """
    require_onnx()
    import onnxruntime

    with explain(f'ONNX file {path}'):
        if not os.path.isfile(path):
            raise ValueError('there is no such file')
        session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
        facts: Any = json.loads(session.get_modelmeta().custom_metadata_map.get(KEY, '{}'))
        facts = facts if isinstance(facts, dict) else {}
        known = {'input_img_mode': facts.get('input_img_mode')}
        data = settings_of({'args': known, 'data_config': facts.get('data_config')}, f'ONNX file {path}')
        names = facts.get('class_names')
        if 'input_size' not in data or not isinstance(names, list):
            raise ValueError('it was not written by vim_timm.export, so nobody knows which images it takes')
    entry = session.get_inputs()[0]
    fixed = entry.shape[0] if isinstance(entry.shape[0], int) else 0

    def run(images: torch.Tensor) -> torch.Tensor:
        arrays = images.cpu().numpy().astype(np.float32, copy=False)
        count = len(arrays)
        if fixed:  # the graph takes no other number
            arrays = np.concatenate([arrays, np.zeros((-count % fixed, *arrays.shape[1:]), np.float32)])
        parts = np.split(arrays, len(arrays) // fixed) if fixed else [arrays]
        logits = [session.run(None, {entry.name: part})[0] for part in parts]
        return torch.from_numpy(np.concatenate(logits)[:count])

    data = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    mode = data.pop('input_img_mode', '')
    return Saved(None, data, list(map(str, names)), record=facts, image_mode=mode), run
