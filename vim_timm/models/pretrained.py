"""Where published weights lie: in the package, a file, a folder, or on the Hugging Face Hub; always read by our reader.

timm would open some of them itself: it takes `model_ema` of a file that holds `model` as well, and its errors about a
damaged file are a pickle's. So every place is turned into a file on the disk before timm looks for the weights.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Dict, Optional, Tuple, Union

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from timm.models import (
    get_pretrained_cfg,
    list_models,
    load_model_config_from_hf,
    model_entrypoint,
    parse_model_name,
    resolve_pretrained_cfg,
)
from timm.models._hub import hf_split, load_model_config_from_path

from .checkpoint import CheckpointError

PACKAGED = Path(__file__).parent.parent / 'weights'
SUMS = 'SHA256SUMS'
_UNDESCRIBED = 'undescribed'
_NAMES = ('model.safetensors', 'pytorch_model.bin', 'pytorch_model.pth', 'model.pth')
_SUFFIXES = ('.safetensors', '.pth', '.pth.tar', '.bin')


def packaged(name: str) -> Dict[str, Any]:
    """Entries of the configuration `architecture.tag` whose weights come with the package; {} where they do not.

    Its folder in `weights/` is what `vim_timm.hub.publish` writes, and its config.json the one source of these entries.
    """
    folder = PACKAGED / name
    if not ((folder / 'config.json').is_file() and (folder / SUMS).is_file()):
        return {}
    config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    entries = {key: value for key, value in config['pretrained_cfg'].items() if key not in ('tag', 'custom_load')}
    entries.update(file=str(folder / _NAMES[0]), num_classes=config['num_classes'])
    if 'label_names' in config:
        entries['label_names'] = tuple(config['label_names'])
    return {key: tuple(value) if isinstance(value, list) else value for key, value in entries.items()}


def published() -> Dict[str, Any]:
    """Configurations of this package's models that have weights, by name with tag (`architecture.tag`)."""
    names = [name for name in list_models(pretrained=True) if _is_ours(name.partition('.')[0])]
    return {name: get_pretrained_cfg(name) for name in names}


def _is_ours(name: str) -> bool:
    return model_entrypoint(name).__module__.startswith('vim_timm.')


def on_disk(variant: str, kwargs: Dict[str, Any]) -> Dict[str, Any]:
    """The arguments of timm's model builder with the weights' place, wherever that is, as a file on this disk.

    Args:
        variant: name of the model.
        kwargs: arguments of the builder, as the entrypoint got them.

    Raises:
        CheckpointError: a folder without weights, or packaged weights that were changed.
        RuntimeError: there are none.
        huggingface_hub.errors.HfHubHTTPError, LocalEntryNotFoundError: they cannot be downloaded.
    """
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay')).to_dict()
    file: Union[str, Path, None] = cfg.get('file')
    if cfg.get('state_dict'):
        file = None
    elif cfg.get('source') == 'local-dir':
        file = find_weights(cfg['file'])
    elif cfg.get('hf_hub_id') and (cfg.get('source') == 'hf-hub' or not file):
        file = _download(cfg['hf_hub_id'], cfg.get('hf_hub_filename'), kwargs.get('cache_dir'))
    if file:
        if Path(file).parent.parent == PACKAGED:
            check_sum(file)
        overlay = kwargs.get('pretrained_cfg_overlay') or {}
        unknown = bool(overlay.get('file')) and 'input_size' not in overlay
        cfg.update(source='', file=str(file), custom_load=_UNDESCRIBED if unknown else True)
    elif cfg.get('url'):
        cfg.update(custom_load=True)  # timm downloads it, we read it
    elif not cfg.get('state_dict'):
        raise RuntimeError(
            f'no weights are published for {variant}: leave out pretrained for random ones, or name a file '
            '(--pretrained-path or --checkpoint on a command line)'
        )
    return {**kwargs, 'pretrained_cfg': cfg, 'pretrained_cfg_overlay': None}


def described(name: str) -> Optional[Tuple[Dict[str, Any], str, Dict[str, Any]]]:
    """What the config.json of `hf-hub:REPOSITORY` or `local-dir:FOLDER` says; None of a registered model's name.

    Returns:
        The pretrained configuration, the architecture, and the arguments of its constructor, none of them checked.
    """
    source, place = parse_model_name(name)
    if source is None:
        return None
    return load_model_config_from_path(place) if source == 'local-dir' else load_model_config_from_hf(place)


def described_weights(name: str) -> Path:
    """The file with the weights of `hf-hub:REPOSITORY`, downloaded where it is not in the cache, or `local-dir:FOLDER`.

    Raises:
        CheckpointError: the folder has none.
    """
    source, place = parse_model_name(name)
    return find_weights(place) if source == 'local-dir' else Path(_download(place, None, None))


def describes_weights(cfg: Dict[str, Any]) -> bool:
    """Whether a configuration's image size is that of its weights; not so where they are a file that somebody named."""
    return cfg.get('custom_load') != _UNDESCRIBED


def find_weights(folder: Union[str, Path]) -> Path:
    """The file with the weights in a folder that was saved for the Hub, by timm's order of names.

    Raises:
        CheckpointError: there is none.
    """
    folder = Path(folder)
    for name in _NAMES:
        if (folder / name).is_file():
            return folder / name
    for suffix in _SUFFIXES:
        if found := sorted(folder.glob(f'*{suffix}')):
            return found[0]
    raise CheckpointError(f'there are no weights in the folder {folder}')


def _download(hub_id: str, filename: Optional[str], cache_dir: Union[str, Path, None]) -> str:
    """A file of a repository on the Hub, in the local cache; by default its weights, safetensors before a pickle."""
    repository, revision = hf_split(hub_id)
    where: Dict[str, Any] = dict(revision=revision, cache_dir=cache_dir)
    if filename:
        return hf_hub_download(repository, filename, **where)
    try:
        return hf_hub_download(repository, _NAMES[0], **where)
    except EntryNotFoundError as error:
        unreachable = isinstance(error, LocalEntryNotFoundError)
        try:
            return hf_hub_download(repository, _NAMES[1], local_files_only=unreachable, **where)
        except EntryNotFoundError:
            raise error from None


def sha256(path: Union[str, Path]) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def known_sum(path: Union[str, Path]) -> str:
    """SHA-256 that a file has to have: by the SHA256SUMS beside it, or by its name in the Hub's cache; else ''."""
    path = Path(path)
    sums = path.parent / SUMS
    if sums.is_file():
        lines = (line.split(maxsplit=1) for line in sums.read_text(encoding='utf-8').splitlines())
        return {name.lstrip('*'): digest for digest, name in lines}.get(path.name, '')
    blob = path.resolve()
    return blob.name if blob.parent.name == 'blobs' and re.fullmatch('[0-9a-f]{64}', blob.name) else ''


def check_sum(path: Union[str, Path], expected: str = '') -> str:
    """Compare a file's SHA-256 with the expected one, or the one that is known of it; '' where neither is.

    Raises:
        CheckpointError: it is another one.
    """
    expected = (expected or known_sum(path)).lower()
    found = sha256(path) if expected else ''
    if found != expected:
        raise CheckpointError(f'{path} is damaged: its SHA-256 is {found} and should be {expected}; get the file again')
    return found
