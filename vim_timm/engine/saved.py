"""Trained models to work with: from a checkpoint, a folder saved for the Hub, or by the name of published weights."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from timm.data import ImageNetInfo
from timm.models import create_model, get_deprecated_models, is_model, resolve_model_input_args

from ..errors import UserError, explain
from ..models.checkpoint import class_names_in, read_checkpoint, recorded_size, select_weights
from ..models.load import check_published, check_size, load_content
from ..settings.inherited import settings_of
from ..settings.masked import NOT_ENCODERS
from .build import explain_download, label_names, resolve_images
from .process import usual_defaults
from .record import history_of

# settings of a run that say what images its model takes
_IMAGES = ('img_size', 'in_chans', 'input_size', 'crop_pct', 'mean', 'std', 'interpolation', 'crop_mode')


@dataclasses.dataclass
class Saved:
    """A trained model and what was saved with it.

    Attributes:
        model: in eval mode, on the CPU.
        data_config: timm's settings of its images.
        class_names: in the order of its outputs; [] where nobody knows them.
        run: settings of its training run by flag, as the file has them: for a text, not to be acted on.
        record: what else its checkpoint holds, tensors apart: history, provenance, ...
        image_mode: PIL mode in which its pictures were read; '' for the usual one of its number of channels.
    """

    model: Any
    data_config: dict[str, Any]
    class_names: list[str]
    run: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    image_mode: str = ''

    @property
    def architecture(self) -> str:
        """The full registered name of the model."""
        return self.model.pretrained_cfg['architecture']


@usual_defaults()
def open_published(name: str, **kwargs: Any) -> Saved:
    """The model `name` (a registered one, `hf-hub:...`, `local-dir:...`) with its weights; `kwargs` of its constructor.

    Raises:
        UserError: there is no such model, or its weights cannot be had.
    """
    with explain(f'model {name}'), explain_download(name):
        check_published(name)
        model = create_model(name, pretrained=True, **kwargs).eval()
        return Saved(model, resolve_images(model, {}), _label_names(model))


@usual_defaults()
def open_saved(path: str, name: str = '', use_ema: bool = False) -> Saved:
    """The model in a file or folder, built as it was trained.

    Args:
        path: a training checkpoint, a file of weights, or a folder that was saved for the Hub.
        name: the model, where the file does not say.
        use_ema: take the moving average.

    Raises:
        UserError: it cannot be read, does not say which model it holds, or the weights do not fit.
    """
    if os.path.isdir(path):
        if use_ema:
            raise UserError(f'the folder {path} holds one set of weights: leave --use-ema out')
        return open_published(f'local-dir:{path}')
    content, what = read_checkpoint(path), f'checkpoint {path}'
    settings = settings_of(content, what) or recorded_size(path)
    name = name or settings.get('model') or _architecture(path)
    if settings.get('mae'):  # what it holds as its model is the encoder, without a classifier
        name = name.removeprefix('mae_')
        own = settings.get('model_kwargs', {})
        settings['model_kwargs'] = {key: value for key, value in own.items() if key not in NOT_ENCODERS}
    name = get_deprecated_models().get(name) or name
    if not name:
        raise UserError(f'{path} does not say which model it holds: name it with --model')
    if not is_model(name.partition('.')[0]):
        raise UserError(f'there is no model {name!r}, which {path} is of')
    state = select_weights(content, use_ema, what)
    head = state.get('head.weight')
    classes = settings.get('num_classes') or (None if head is None else len(head))
    with explain(f'model {name}'):
        check_size({**settings, 'model': name, 'mae': False}, state, what)
        kwargs: dict[str, Any] = dict(num_classes=0 if settings.get('mae') else classes, global_pool=settings.get('gp'))
        arguments = resolve_model_input_args(name, settings, **kwargs, **settings.get('model_kwargs', {}))
        model = create_model(**arguments)
        load_content(model, content, use_ema, what)
    data_config = resolve_images(model, {key: settings[key] for key in _IMAGES if settings.get(key)})
    run = _run(content)
    names = class_names_in(content, path) or (_imagenet(model) if run.get('data_set') == 'IMNET' else [])
    names = names if model.num_classes else []  # an encoder's data may well have had classes
    record = {key: value for key, value in content.items() if key in ('provenance', 'epoch')}
    record['history'] = history_of(content, path)
    return Saved(model.eval(), data_config, names, run, record, settings.get('input_img_mode', ''))


def _run(content: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a checkpoint of ours or of timm; of the original's only its model, size and data."""
    args = content.get('args')
    if isinstance(args, dict):
        return args
    theirs = vars(args) if hasattr(args, '__dict__') else {}
    if 'state_dict' in content:
        return theirs
    names = {'model': 'model', 'img_size': 'input_size', 'data_set': 'data_set'}
    return {ours: theirs[name] for ours, name in names.items() if name in theirs}


def _architecture(path: str) -> str:
    """The model that the metadata of a safetensors file name; ''."""
    if Path(path).suffix != '.safetensors':
        return ''
    with safe_open(path, 'pt') as file:
        return (file.metadata() or {}).get('architecture', '')


def _label_names(model: Any) -> list[str]:
    """Class names of published weights, from their configuration or, for ImageNet's, from timm."""
    names = label_names(model.pretrained_cfg, model.num_classes)
    if names:
        return names
    return _imagenet(model) if 'in1k' in model.pretrained_cfg.get('tag', '') else []


def _imagenet(model: Any) -> list[str]:
    info = ImageNetInfo()
    if model.num_classes != info.num_classes():
        return []
    return [info.index_to_description(index).split(',')[0] for index in range(info.num_classes())]
