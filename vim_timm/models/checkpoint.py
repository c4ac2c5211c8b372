"""Reading checkpoint files of any origin, once, without executing anything in them; writing files of weights."""

import errno
import json
import os
import re
import stat
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Union

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from timm.models import clean_state_dict

from ..errors import UserError, sentence, shown
from ..settings.inherited import settings_of
from .unpickling import harmless

_WEIGHTS = ('model', 'state_dict')
_EMA_WEIGHTS = ('model_ema', 'state_dict_ema')
_FOLDER = 0x10  # attribute of an entry of a zip file

StateDict = Dict[str, torch.Tensor]


class CheckpointError(UserError, ValueError):
    """A checkpoint that cannot be read, or that is not for the model; the message is one sentence for a user."""


def read_checkpoint(path: Union[str, Path], mmap: bool = False) -> Dict[str, Any]:
    """The whole content of a safetensors or torch file on the CPU; which of them it is, its first bytes say.

    Only tensors, plain containers and what `unpickling.harmless` lists are unpickled. Checksums are compared where the
    format has them.

    Args:
        mmap: leave tensors in the file until they are used, which has to stay as it is as long as they are.

    Raises:
        CheckpointError: missing, truncated, damaged, or in need of running code.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f'no checkpoint at {path}')
    try:
        with open(path, 'rb') as file:
            start = file.read(9)
        if start[8:] == b'{' or path.suffix == '.safetensors' and start[:2] != b'PK':
            return safetensors.torch.load_file(path)
        zipped = zipfile.is_zipfile(path)
        if zipped:
            _check_entries(path)
        mmap = mmap and zipped and path.suffix != '.safetensors'  # torch's older format cannot be mapped
        with torch.serialization.safe_globals(harmless()), warnings.catch_warnings(), open(path, 'rb') as file:
            warnings.simplefilter('ignore')  # torch warns of foreign pickles, which end in a sentence below
            content = torch.load(path if mmap else file, map_location='cpu', weights_only=True, mmap=mmap)
    except CheckpointError:
        raise
    except MemoryError as e:
        raise CheckpointError(f'{path} needs more memory than there is') from e
    except BaseException as e:  # safetensors' panics are no Exceptions
        if isinstance(e, (KeyboardInterrupt, SystemExit)):
            raise
        raise CheckpointError(_unreadable(path, e)) from e
    if not isinstance(content, dict):
        raise CheckpointError(f'{path} holds a {type(content).__name__}, not a dictionary of weights')
    return content


def recorded_size(path: Union[str, Path]) -> Dict[str, Any]:
    """`input_size` that the metadata of a file of `--save-encoder` say, for which its positions are; {} of other files.

    Raises:
        CheckpointError: they say something else there.
    """
    try:
        with safe_open(path, 'pt') as file:
            text = (file.metadata() or {}).get('input_size')
    except (SafetensorError, OSError):  # no safetensors file
        return {}
    try:
        return {} if text is None else settings_of({'data_config': {'input_size': json.loads(text)}}, str(path))
    except (ValueError, RecursionError):
        raise CheckpointError(f'{path} is damaged: its input_size is {shown(repr(text))}') from None


def write_safetensors(state_dict: Mapping[str, torch.Tensor], path: Union[str, Path], metadata: Dict[str, str]) -> None:
    """Write tensors to a safetensors file of PyTorch's, the same bytes every time, which appears whole or not at all.

    Raises:
        FileNotFoundError: its folder does not exist.
        OSError: the disk is full, say; it names `path`, which is as it was before.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f'there is no folder {path.parent} to write {path.name} into')
    tensors = {name: value.detach().cpu().contiguous() for name, value in state_dict.items()}
    with tempfile.TemporaryDirectory(dir=path.parent, prefix='.weights-') as folder:
        temporary = Path(folder) / 'weights'
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        try:
            safetensors.torch.save_file(tensors, temporary, {'format': 'pt', **metadata})
        except SafetensorError as e:
            raise OSError(errno.EIO, sentence(e), str(path)) from e
        temporary.chmod(mode)  # safetensors writes a file that only its owner may read
        with open(temporary, 'r+b') as file:
            size = int.from_bytes(file.read(8), 'little')
            header = json.loads(file.read(size))
            header['__metadata__'] = dict(sorted(header['__metadata__'].items()))  # it writes them in any order
            text = json.dumps(header, ensure_ascii=False, separators=(',', ':')).encode()
            assert len(text) <= size, 'a longer header would overwrite weights'
            file.seek(8)
            file.write(text.ljust(size))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def class_names_in(content: Mapping[str, Any], path: Union[str, Path]) -> List[str]:
    """Class names by number in a training checkpoint of ours, or an empty list.

    Raises:
        CheckpointError: they are no names.
    """
    names = content.get('class_names')
    if names is None or isinstance(names, torch.Tensor):
        return []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f'{path} is damaged: its class names are no list of names')
    return names


def _unreadable(path: Path, error: BaseException) -> str:
    """Why torch or safetensors would not read a file, in a sentence."""
    text = str(error)
    if 'TorchScript' in text:
        return f'{path} is a scripted model, which is code: save its state_dict() instead'
    if 'weights_only' in text or 'Unsupported' in text:
        found = re.search(r'GLOBAL ([\w.]+)', text)
        what = f'{found[1]} beside weights' if found else 'more than weights'
        return f'{path} is refused: it holds {what}, a pickle that would run code'
    return f'{path} is truncated or no checkpoint ({type(error).__name__})'


def _check_entries(path: Path) -> None:
    """Compare the entries of a zip file with their checksums; torch compresses none of them, and compares none."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        size = sum(entry.file_size for entry in entries)
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or size > path.stat().st_size:
            raise CheckpointError(f'{path} is compressed: unpack it and save it with torch.save')
        for entry in entries:
            if entry.file_size and (entry.is_dir() or entry.external_attr & _FOLDER):  # torch would read nothing of it
                raise CheckpointError(f'{path} is damaged: {shown(entry.filename)} is a folder, and has content')
            if entry.CRC == 0:  # torch.serialization.set_crc32_options(False)
                continue
            try:
                with archive.open(entry) as file:
                    while file.read(1 << 20):
                        pass
            except zipfile.BadZipFile as e:
                raise CheckpointError(
                    f'{path} is damaged: {shown(entry.filename)} is not what its checksum says'
                ) from e


def has_average(content: Mapping[str, Any]) -> bool:
    """Whether a training checkpoint holds a moving average of its weights."""
    return any(content.get(key) is not None for key in _EMA_WEIGHTS)


def wants_average(content: Mapping[str, Any], use_ema: Optional[bool]) -> bool:
    """Whether to take the moving average of a training checkpoint; where nobody says (None), as timm does.

    timm takes that of its own checkpoints (`state_dict_ema`), and so do we, but not that of those with a `model` and a
    `model_ema`.
    """
    return content.get('state_dict_ema') is not None if use_ema is None else use_ema


def select_weights(
    content: Mapping[str, Any], use_ema: Optional[bool] = False, what: str = 'the checkpoint'
) -> StateDict:
    """The state dict of a training checkpoint: `model` / `state_dict`, or where `wants_average` its moving average.

    Every route from a file to a model chooses by this function.

    Args:
        what: The checkpoint, in words.

    Raises:
        CheckpointError: `use_ema` of a checkpoint without one, or no state dict where it should be.
    """
    use_ema = wants_average(content, use_ema)
    for key in _EMA_WEIGHTS if use_ema else _WEIGHTS:
        if isinstance(content.get(key), dict):
            return check_weights(content[key], what)
    if use_ema:
        raise CheckpointError(f'{what} holds no moving average (model_ema or state_dict_ema)')
    return check_weights(dict(content), what)


def check_weights(found: Dict[Any, Any], what: str = 'the checkpoint') -> StateDict:
    """A state dict from a file, its names without the prefixes of wrappers.

    Raises:
        CheckpointError: it is none, or holds tensors that are no weights: sparse, complex, not finite, ...
    """
    if not found or not all(isinstance(name, str) for name in found):
        raise CheckpointError(f'{what} holds no state dict')
    for name, value in found.items():
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f'{what} holds no state dict: {shown(name)} is a {type(value).__name__}, not a tensor'
            )
        if value.layout != torch.strided or value.is_quantized or value.is_complex():
            raise CheckpointError(f'{shown(name)} in {what} is sparse, quantized or complex, which no weight is')
        if value.untyped_storage().nbytes() < value.numel() * value.element_size():
            raise CheckpointError(f'{shown(name)} in {what} repeats fewer numbers than it has places')
        if value.is_floating_point() and not value.is_meta and not _is_finite(value):
            raise CheckpointError(f'{shown(name)} in {what} holds numbers that are not finite')
    return clean_state_dict(found)


def _is_finite(value: torch.Tensor) -> bool:
    value = value if value.element_size() > 1 else value.float()  # few operators know eight bits
    return bool(torch.isfinite(value).all())


def load_weights(path: Union[str, Path], use_ema: Optional[bool] = False) -> StateDict:
    """`select_weights` of `read_checkpoint`."""
    return select_weights(read_checkpoint(path), use_ema, f'checkpoint {path}')
