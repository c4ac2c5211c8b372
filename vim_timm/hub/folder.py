"""The folder of a published model, as timm and the Hub know it: weights, configuration, card, settings and log."""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from huggingface_hub import get_token
from timm.models import save_for_hf

from ..engine.saved import Saved
from ..errors import UserError, explain
from ..files import table
from ..models.checkpoint import write_safetensors
from ..models.pretrained import SUMS, check_sum, sha256
from ..version import __version__
from .repeat import public

WEIGHTS, CONFIG, CARD, SETTINGS, LOG = 'model.safetensors', 'config.json', 'README.md', 'args.yaml', 'summary.csv'
FILES = (WEIGHTS, CONFIG, CARD, SETTINGS, LOG, SUMS)  # nothing else is ever uploaded
_TOKEN = re.compile(r'\bhf_[A-Za-z0-9]{16,}')


@contextlib.contextmanager
def replacing(folder: str | Path) -> Iterator[Path]:
    """A folder to fill, which at the end takes the place of an older one: whole, or after an error not at all.

    Raises:
        UserError: there is something else than a published model, or nothing can be written there.
    """
    folder = Path(folder)
    with explain(f'folder {folder}'):
        _refuse_other_files(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=folder.parent, prefix='.publish-')
    with temporary as place:
        new = Path(place) / folder.name
        yield new
        with explain(f'folder {folder}'):
            _refuse_other_files(folder)
            if folder.is_dir():
                os.replace(folder, Path(place) / '.older')
            os.replace(new, folder)


def write_folder(folder: str | Path, saved: Saved, half: bool = False) -> None:
    """Write everything but the card.

    Args:
        half: round the tensors to float16.

    Raises:
        UserError: the model has constructor arguments that JSON cannot hold, or the folder cannot be written.
    """
    folder, model = Path(folder), saved.model.half() if half else saved.model
    with explain(f'folder {folder}'):
        names = {'label_names': list(saved.class_names)} if saved.class_names else {}
        save_for_hf(model, str(folder), model_config=names, safe_serialization=True, data_config=saved.data_config)
        metadata = {'architecture': saved.architecture, 'vim_timm': __version__}
        write_safetensors(model.state_dict(), folder / WEIGHTS, metadata)
        if saved.run:
            (folder / SETTINGS).write_text(yaml.safe_dump(public(saved.run)), encoding='utf-8')
        if saved.record.get('history'):
            (folder / LOG).write_text(table(saved.record['history'], 'epoch'), encoding='utf-8')


def _refuse_other_files(folder: Path) -> None:
    """Keep what is no folder of a published model from being replaced by one."""
    others = sorted(set(os.listdir(folder)) - set(FILES)) if folder.is_dir() else []
    if others:
        raise UserError(f'it holds other files, such as {others[0]}: choose another --output')


def finish_folder(folder: str | Path, text: str, private: Sequence[str] = ()) -> None:
    """Add the card and SHA256SUMS, and check the whole.

    Raises:
        UserError: a file would tell a path of this machine or a token.
    """
    folder = Path(folder)
    (folder / CARD).write_text(text, encoding='utf-8')
    names = [name for name in FILES if (folder / name).is_file() and name != SUMS]
    (folder / SUMS).write_text(''.join(f'{sha256(folder / name)}  {name}\n' for name in names), encoding='utf-8')
    check_folder(folder, private)


def check_folder(folder: str | Path, private: Sequence[str] = ()) -> None:
    """Refuse a folder that is not whole, was changed since, or tells a path of this machine or a token.

    Args:
        private: strings that must not be in it, besides the home folder, the working folder and the token in use.
    """
    folder = Path(folder)
    for name in (WEIGHTS, CONFIG, CARD, SUMS):
        if not (folder / name).is_file():
            raise UserError(f'{folder} is no folder of a published model: it has no {name}')
    private = [text for text in (*private, str(Path.home()), os.getcwd(), get_token() or '') if len(text) > 3]
    for name in FILES:
        if not (folder / name).is_file():
            continue
        if name != SUMS:
            check_sum(folder / name)
        with open(folder / name, 'rb') as file:
            text = file.read(1 << 20).decode(errors='replace')
        if any(secret in text for secret in private) or _TOKEN.search(text):
            raise UserError(f'{folder / name} would tell a path of this machine or a token: it is not published')
