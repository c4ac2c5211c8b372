"""The command lines that repeat a training run and its evaluation, without this machine's paths."""

import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from ..settings.flags import TRAIN, VALIDATE, Row, refused

# what a run was called, where it wrote and whom it told is nobody else's business
_PRIVATE = {
    'output', 'experiment', 'overwrite', 'resume', 'no_resume_opt', 'device', 'device_modules', 'workers', 'pin_mem',
    'dist_timeout', 'log_interval', 'save_images', 'tensorboard', 'log_wandb', 'log_trackio', 'wandb_project',
    'wandb_tags', 'wandb_resume_id', 'save_encoder',
}  # fmt: skip
# settings, and entries of them, that are a file's path wherever it lies, also of one that is no longer there
_FILES = {'initial_checkpoint', 'pretrained_path', 'class_map', 'file', 'checkpoint_path'}
_FOLDER = 'local-dir:'  # how a model's name says that a folder follows
_DATA = (
    'dataset', 'data_dir', 'class_map', 'input_img_mode', 'input_span', 'input_key', 'target_key',
    'dataset_trust_remote_code',
)  # fmt: skip


def arguments(flags: Mapping[str, Any]) -> list[str]:
    """Words of a command line: switches for True, lists and `key=value` pairs spelled out, None and False left out."""
    words: list[str] = []
    for name, value in flags.items():
        if value is None or value is False:
            continue
        words.append(f'--{name.replace("_", "-")}')
        if isinstance(value, Mapping):
            words += [f'{key}={item}' for key, item in value.items()]
        elif isinstance(value, (list, tuple)):
            words += map(str, value)
        elif value is not True:
            words.append(str(value))
    return words


def command(program: str, flags: Mapping[str, Any]) -> str:
    """A line to type."""
    return shlex.join(['python', '-m', f'vim_timm.{program}', *arguments(flags)])


def defaults(table: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """Defaults of a table's flags by name, but for refused flags."""
    rows = [row for rows in table.values() for row in rows if row[1] is not refused]
    return {row[0].split()[0].lstrip('-').replace('-', '_'): row[2] for row in rows}


def public(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that say how to repeat a run: of a file only its name, of the data's folder nothing."""
    known = defaults(TRAIN).keys() - _PRIVATE
    return {name: without_path(name, settings[name]) for name in settings if name in known}


def without_path(name: str, value: Any) -> Any:
    """The value of a setting without the folders of its files; DATA for that of the images."""
    if name == 'data_dir':
        return value and 'DATA'
    if isinstance(value, Mapping):
        return {key: without_path(str(key), item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_path(name, item) for item in value]
    if not isinstance(value, str):
        return value
    if value.startswith(_FOLDER):
        return _FOLDER + _last(value.removeprefix(_FOLDER))
    here = os.path.isabs(os.path.expanduser(value)) or os.sep in value and os.path.exists(value)
    return _last(value) if here or name in _FILES else value


def _last(path: str) -> str:
    return os.path.basename(os.path.normpath(path)) if path else ''


def train_command(settings: Mapping[str, Any]) -> str:
    """The command line of a run, every setting that is not the default spelled out."""
    kept, usual = public(settings), defaults(TRAIN)
    changed = {name: kept[name] for name in usual if name in kept and kept[name] != usual[name]}
    return command('train', {name: value for name, value in changed.items() if value not in ('', {}, [])})


def data_flags(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Flags of validate.py for the data that a run was evaluated on."""
    flags = {name: settings.get(name) for name in _DATA}
    flags.update(split=settings.get('val_split'), num_samples=settings.get('val_num_samples'))
    usual = defaults(VALIDATE)
    changed = {name: value for name, value in flags.items() if value and value != usual[name]}
    if settings.get('val_fraction'):  # the seed says which images of the training split were held out
        names = {'split': 'train_split', 'val_fraction': 'val_fraction', 'seed': 'seed'}
        changed.update((flag, settings[name]) for flag, name in names.items() if settings.get(name) is not None)
    return changed
