"""Models and optimizers from settings."""

import contextlib
import inspect
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import timm
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from timm.data import ImageNetInfo, resolve_input_data_config
from timm.layers import convert_splitbn_model, convert_sync_batchnorm
from timm.models import get_deprecated_models, get_pretrained_cfg
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers, optimizer_kwargs
from timm.optim.kron import Kron
from timm.task import TrainingTask
from torch.nn.parallel import DistributedDataParallel

from ..errors import UserError, explain, meant
from ..models.load import check_published, classifiers, model_of
from ..models.pretrained import described
from ..settings import Process, Settings
from ..step import batched, fused_arguments
from .checkpoint import load_weights


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Leave out a logger's warnings."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def explain_download(name: str) -> Iterator[None]:
    """Turn a failed download of a model's weights into a UserError that names the ways out.

    The client's lines about each of its attempts are left out: they come before the sentence that says the same.
    """
    try:
        with _quiet('huggingface_hub'):
            yield
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        status = next((e.response.status_code for e in (error, error.__cause__) if isinstance(e, HfHubHTTPError)), 0)
        if status in (401, 403, 404):
            raise UserError(
                f'the Hub has no such weights of {name} for you (status {status}): check the name and the revision, or '
                'log in with `hf auth login` where they are private'
            ) from error
        why = f'status {status}' if status else 'no answer, and they are not in the cache'
        raise UserError(
            f'the weights of {name} cannot be downloaded ({why}): go online, name a mirror in HF_ENDPOINT, copy '
            "another machine's cache (HF_HOME), or name a file: --pretrained --pretrained-path FILE in training, "
            '--checkpoint FILE in an evaluation'
        ) from error


def resolve_images(model: torch.nn.Module, settings: Mapping[str, Any], use_test_size: bool = False) -> dict[str, Any]:
    """timm's settings of a model's images: input_size, mean, std, interpolation, crop_pct, crop_mode.

    Published means and deviations of other channels become their mean, without timm's remark about it.

    Args:
        settings: of the same names, or flags; None where the model's own holds.

    Raises:
        UserError: they contradict the model.
    """
    with explain('images'), _quiet('timm.data.model_config'):
        return resolve_input_data_config(model, dict(settings), use_test_size=use_test_size)


def buffers(keep: bool) -> dict[str, bool]:
    """What DistributedDataParallel is told of buffers: to take rank 0's at each step, or to `keep` each rank's own."""
    known, new = inspect.signature(DistributedDataParallel.__init__).parameters, 'forward_sync_buffers'
    return {new if new in known else 'broadcast_buffers': not keep}  # newer torch deprecates the old name


def current_name(name: str) -> str:
    """The name of a model, where this one is deprecated its current name.

    Raises:
        UserError: there is no such model.
    """
    current = get_deprecated_models().get(name)
    if current:  # timm's shim of a deprecated name would build the model without its configuration
        return current
    known = name.partition('.')[0]
    if ':' not in name and not timm.is_model(known):
        raise UserError(f'there is no model {name!r}{meant(known, timm.list_models(), 3)}')
    return name


def published_cfg(name: str) -> Mapping[str, Any]:
    """What is published with a model of the registry, a repository (hf-hub:...) or a folder (local-dir:...).

    Its `architecture` is a registered name.

    Raises:
        UserError: there is no such repository or folder, or it cannot be read.
    """
    with explain(f'model {name}'), explain_download(name):
        if (found := described(name)) is not None:
            return {**found[0], 'architecture': found[1]}
        known = get_pretrained_cfg(name, allow_unregistered=True)
        return known.to_dict() if known else {}


def registered(args: Settings) -> dict[str, Any]:
    """Settings of the registered model that --model means where it names a repository or a folder; else {}.

    A checkpoint holds them beside the name: whoever reads it asks no address for them.
    """
    with explain(f'model {args.model}'), explain_download(args.model):
        found = described(args.model)
    if found is None:
        return {}
    _, architecture, arguments = found
    own = {name: value for name, value in arguments.items() if name not in ('img_size', 'in_chans', 'num_classes')}
    pool = own.pop('global_pool', None)
    return {'model': architecture, 'model_kwargs': {**own, **args.model_kwargs}, 'gp': args.gp or pool}


def label_names(cfg: Mapping[str, Any], count: int) -> list[str]:
    """The names of `count` classes in a published configuration, by number; [] where it names others or none."""
    names = cfg.get('label_names') or ()
    if isinstance(names, Mapping):  # of a folder saved by timm: place -> name
        with explain('label_names of the configuration'):
            names = [names[key] for key in sorted(names, key=int)]
    return [str(name) for name in names] if len(names) == count else []


def published_classes(name: str) -> tuple[int, list[str], bool]:
    """Classes of published weights: their number (0: no classifier), names by number, whether they are ImageNet's.

    ImageNet's are named by WordNet ids, as its folders are, though data may well name them otherwise.

    Raises:
        UserError: see `published_cfg`.
    """
    cfg = published_cfg(name)
    count = cfg.get('num_classes') or 0
    names, info = label_names(cfg, count), ImageNetInfo()
    usual = not names or set(names) <= {*info.label_names(), *info.label_descriptions()}
    if count == info.num_classes() and 'in1k' in (cfg.get('tag') or '') and usual:
        return count, list(info.label_names()), True
    return count, names, False


def check_teacher(args: Settings, classes: Sequence[str]) -> None:
    """Refuse a teacher that gives a class of the student another number: the student would learn another one's logit.

    Args:
        classes: the student's by number; [] where they have no names.

    Raises:
        UserError: there is such a class.
    """
    if not args.kd_model_name or args.kd_distill_type == 'feature':
        return
    _, known, _ = published_classes(args.kd_model_name)
    numbers = {name: number for number, name in enumerate(known)}
    if len(numbers) < len(known):  # a name of several classes tells nothing
        return
    for number, name in enumerate(classes):
        if numbers.get(name, number) != number:
            raise UserError(
                f'{args.kd_model_name} gives the class {name!r} the number {numbers[name]}, and in this data it is '
                f"{number}: list the teacher's classes in their order with --class-map, or --kd-distill-type feature"
            )


def make_model(args: Settings, **kwargs: Any) -> torch.nn.Module:
    """The model that the flags describe, with its weights; `kwargs` go to `timm.create_model` too.

    Raises:
        UserError: an unknown argument, a size that does not fit, weights that cannot be had or do not fit.
    """
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    with explain(f'model {args.model}'), explain_download(args.model):
        kwargs.update(pretrained=args.pretrained, num_classes=args.num_classes, global_pool=args.gp)
        for name in args.model_kwargs.keys() & {*kwargs, 'device', 'dtype', 'features_only'}:
            raise ValueError(f'--model-kwargs cannot set {name}: a flag of its own does, or the program')
        check_published(args.model, args.pretrained)
        return model_of(vars(args), **kwargs, **args.model_kwargs)


def place_model(
    args: Settings, process: Process, model: torch.nn.Module, input_size: tuple[int, int, int], logits: bool = True
) -> torch.nn.Module:
    """Move the model to the device and try it once, before anything is written or a long run starts.

    Args:
        logits: It has to return logits (B, classes).

    Raises:
        UserError: the model cannot run here, such as a forced scan backend that is not available, or is no classifier.
    """
    model.to(process.device, process.dtype)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    training = model.training
    with explain(f'model {args.model}'), torch.no_grad(), process.autocast():
        output = model.eval()(torch.zeros(1, *input_size, device=process.device, dtype=process.dtype))
        if logits and getattr(output, 'ndim', 0) != 2:
            raise ValueError("it returns no logits, a row of classes an image: is that --gp ''?")
    return model.train(training)


def make_training_model(args: Settings, process: Process) -> torch.nn.Module:
    """`make_model` plus what only training asks of it."""
    if args.pretrained_path and not os.path.isfile(args.pretrained_path):
        raise UserError(f'there is no file {args.pretrained_path}')
    overlay = dict(file=args.pretrained_path, num_classes=-1) if args.pretrained_path else {}
    model = make_model(
        args, drop_rate=args.drop,
        drop_path_rate=args.drop_connect if args.drop_path is None else args.drop_path,
        drop_block_rate=args.drop_block, bn_momentum=args.bn_momentum, bn_eps=args.bn_eps,
        pretrained_cfg_overlay={**overlay, **args.pretrained_cfg_overlay} or None,
    )  # fmt: skip
    if args.initial_checkpoint:
        load_weights(model, args.initial_checkpoint, use_ema=None)
    with explain(f'model {args.model}'), torch.no_grad():
        for layer in _last_layers(model) if {args.head_init_scale, args.head_init_bias} != {None} else ():
            if args.head_init_scale is not None:
                for parameter in layer.parameters():
                    parameter.mul_(args.head_init_scale)
            if args.head_init_bias is not None:
                if layer.bias is None:
                    raise ValueError("--head-init-bias: the classifier's last layer has no bias")
                layer.bias.fill_(args.head_init_bias)
        if args.linear_probe:
            model.requires_grad_(False)
            for head in classifiers(model):
                head.requires_grad_(True)
        if args.grad_checkpointing:
            model.set_grad_checkpointing(enable=True)  # type: ignore[operator]
        if args.split_bn:
            model = convert_splitbn_model(model, max(args.aug_splits, 2))
        if args.sync_bn and process.world_size > 1:
            if process.device.type == 'cpu':
                raise ValueError('--sync-bn: torch synchronizes batch norm on GPUs alone, leave it out')
            model = convert_sync_batchnorm(model)
    return model


def _last_layers(model: Any) -> list[Any]:
    """The layers that make logits: of each classifier the last one with weights."""
    layers = (
        [layer for layer in head.modules() if getattr(layer, 'weight', None) is not None] for head in classifiers(model)
    )
    return [found[-1] for found in layers if found]


def learning_rate(args: Settings, world_size: int) -> float:
    """--lr, or --lr-base scaled by the global batch as timm does."""
    if args.lr is not None:
        return args.lr
    ratio = args.batch_size * world_size * args.grad_accum_steps / args.lr_base_size
    scale = args.lr_base_scale or ('sqrt' if any(name in args.opt.lower() for name in ('ada', 'lamb')) else 'linear')
    return args.lr_base * (ratio**0.5 if scale == 'sqrt' else ratio)


def check_optimizer(name: str, betas: Sequence[float] | None = None) -> None:
    """Refuse an optimizer that timm does not know, or that takes another number of betas, before a model is built.

    Raises:
        UserError: there is none of that name, it needs second derivatives, or the betas are not its own.
    """
    known = [str(name) for name in list_optimizers()]
    plain = name.lower().removeprefix('lookahead_')
    if plain not in known:
        raise UserError(f'--opt {name}: there is no such optimizer{meant(plain, known, 3)}')
    info = get_optimizer_info(plain)
    if info.second_order:
        raise UserError(f'--opt {name} takes second derivatives, which a training step here has not')
    first_alone = plain in ('adafactor', 'cadafactor')  # they take one beta as well as several
    if betas and info.has_betas and len(betas) != info.num_betas and not first_alone:
        raise UserError(f'--opt-betas: {name} has {info.num_betas} of them, not {len(betas)}')


def make_optimizer(args: Settings, process: Process, task: TrainingTask) -> torch.optim.Optimizer:
    """timm's optimizer for the parameters that the task trains, fused or in batches where it can be."""
    options = optimizer_kwargs(cfg=args.replace(lr=learning_rate(args, process.world_size)))
    with explain('optimizer'):
        for name in sorted(args.opt_kwargs.keys() & options.keys()):
            raise ValueError(f'--opt-kwargs cannot set {name}: a flag of its own does')
        options.update(fused_arguments(args.opt, process.device, args.opt_kwargs))
        if process.world_size > 1 and get_optimizer_info(args.opt.lower().rpartition('_')[2]).opt_class is Kron:
            options['deterministic'] = True  # by random vectors of its own each rank would get other weights
        options.update(args.opt_kwargs)
        return batched(create_optimizer_v2(task.get_trainable_module() or task, **options))


def try_compiler(args: Settings, process: Process) -> None:
    """Compile something small with --torchcompile, before anything is written: a compiler may be missing.

    Raises:
        UserError: it cannot be compiled.
    """
    with explain('--torchcompile'):
        compiled = torch.compile(_small, backend=args.torchcompile, mode=args.torchcompile_mode)
        compiled(torch.zeros(8, device=process.device))


def _small(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1
