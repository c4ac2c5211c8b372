"""The one way from a checkpoint file into a model."""

from typing import Any, Dict, List, Mapping, Optional, Set

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from timm.models import create_model, is_model, resolve_model_input_args
from torch.nn.modules.module import register_module_parameter_registration_hook

from ..settings.inherited import settings_of
from ..settings.masked import autoencoder_arguments, is_autoencoder
from .adapt import check_fit, filter_of
from .checkpoint import CheckpointError, StateDict, read_checkpoint, select_weights, wants_average
from .masked_autoencoder import as_autoencoder
from .pretrained import described, described_weights
from .trunk import Trunk


def load_content(
    model: nn.Module, content: Mapping[str, Any], use_ema: Optional[bool] = False, what: str = 'the checkpoint'
) -> None:
    """Load the weights in a checkpoint's content into a model, all of them and no others, whatever its family.

    Position embedding and patches are resampled to the model's size where its family can.

    Args:
        content: What `read_checkpoint` returns.
        use_ema: Take the moving average; None: where timm does.
        what: The checkpoint, in words.

    Raises:
        CheckpointError: there are no such weights, or they are another model's.
    """
    state = select_weights(content, use_ema, what)
    own, filter_fn = model.state_dict(), filter_of(model)
    same = state.keys() == own.keys() and all(value.shape == own[name].shape for name, value in state.items())
    if filter_fn is not None and (isinstance(model, Trunk) or not same):
        # it may know the file as an original or older layout, or of another size
        beside = content.get('task_state_ema' if wants_average(content, use_ema) else 'task_state')
        state = filter_fn({'state_dict': state, 'args': settings_of(content), 'task_state': beside}, model)
    lacking = own.keys() - state.keys()
    if lacking and state.keys() < own.keys() and lacking <= _of_classifier(model):
        raise CheckpointError(
            f'{what} holds an encoder without a classifier, and the model has one: fine-tune it first '
            '(train.py --pretrained --pretrained-path FILE)'
        )
    check_fit(state, own, what)
    model.load_state_dict(state)


def classifiers(model: Any) -> List[nn.Module]:
    """The classifiers of a model of timm's, whose logits it averages: mostly one, two of those for distillation."""
    found = model.get_classifier()
    if hasattr(found, 'head_dist'):  # RepViT's module of two
        return [found.head, found.head_dist]
    return list(found) if isinstance(found, tuple) else [found]


def _of_classifier(model: Any) -> Set[str]:
    """Names of the weights of a model's classifier, or of those that it has for distillation."""
    if not hasattr(model, 'get_classifier'):
        return set()
    own = {id(weight) for head in classifiers(model) for weight in head.parameters()}
    return {name for name, weight in model.named_parameters() if id(weight) in own}


def model_of(settings: Mapping[str, Any], **kwargs: Any) -> nn.Module:
    """The model that settings describe by `model`, in a masked autoencoder where they say `mae` and it is none itself.

    Args:
        kwargs: Go to `timm.create_model`; `device` is the decoder's too.
    """
    name, autoencoder = settings['model'], autoencoder_arguments(settings)
    if settings.get('mae'):
        kwargs['num_classes'] = 0
    if is_autoencoder(name):
        return create_model(**resolve_model_input_args(name, dict(settings), **kwargs, **autoencoder))
    model = create_model(**resolve_model_input_args(name, dict(settings), **kwargs))
    return as_autoencoder(model, device=kwargs.get('device'), **autoencoder) if settings.get('mae') else model


def check_size(settings: Mapping[str, Any], state: StateDict, what: str = 'the checkpoint') -> None:
    """Refuse settings of a checkpoint that describe a far larger model than it holds, before it is built for minutes.

    Args:
        settings: What `settings_of` returns.
        state: The checkpoint's weights; with its decoder's, where the settings say `mae`.

    Raises:
        CheckpointError: the model has more weights.
    """
    if not is_model(settings.get('model', '')):
        return
    names, numbers = 2 * len(state) + 100, 2 * sum(value.numel() for value in state.values()) + 10_000_000

    def count(module: nn.Module, name: str, parameter: Any) -> None:
        nonlocal names, numbers
        names, numbers = names - 1, numbers - (0 if parameter is None else parameter.numel())
        if names < 0 or numbers < 0:
            raise CheckpointError(f'{what}: its settings describe a larger model than that of its weights')

    hook = register_module_parameter_registration_hook(count)
    try:
        own = {**settings.get('model_kwargs', {}), 'num_classes': settings.get('num_classes'), 'device': 'meta'}
        model_of(settings, **own)
    finally:
        hook.remove()


def check_published(name: str, pretrained: bool = True) -> None:
    """Refuse what a config.json (`hf-hub:...`, `local-dir:...`) says where a checkpoint could not say it either.

    A registered model's name is not looked at.

    Args:
        pretrained: Its weights are wanted; else those of a repository are not downloaded to be compared with.

    Raises:
        UserError: a value is none that its setting could have.
        CheckpointError: the model is far larger than its weights.
    """
    found = described(name)
    if found is None:
        return
    what, (cfg, architecture, arguments) = f'config.json of {name}', found
    args: Dict[str, Any] = {'model': architecture, 'model_kwargs': arguments, 'num_classes': cfg.get('num_classes')}
    args['num_classes'] = args['num_classes'] or None  # 0 is that of an encoder
    settings = settings_of({'args': args, 'data_config': cfg}, what)
    if pretrained or name.startswith('local-dir:'):
        try:
            file = described_weights(name)
        except CheckpointError:
            if pretrained:
                raise
            return
        sizes = {'model': architecture, 'model_kwargs': arguments, 'num_classes': settings.get('num_classes', 0)}
        sizes['num_classes'] = arguments.get('num_classes', sizes['num_classes'])
        check_size(sizes, _shapes(str(file)), what)


def _shapes(path: str) -> StateDict:
    """Weights in a file without their values, where it can be read so."""
    try:
        with safe_open(path, 'pt') as file:
            return {key: torch.empty(file.get_slice(key).get_shape(), device='meta') for key in file.keys()}
    except (SafetensorError, OSError):
        return select_weights(read_checkpoint(path))
