"""Devices, processes, models, tasks and optimizers from settings."""

import argparse
import contextlib
import datetime
import difflib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import timm
import timm.task as tasks
import torch
import torch.distributed as dist
from timm.data import Mixup
from timm.data.loader import adapt_to_chs
from timm.layers import convert_splitbn_model, convert_sync_batchnorm, set_fast_norm
from timm.loss import create_classification_loss
from timm.models import create_model, get_deprecated_models, resolve_model_input_args
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.utils import is_distributed_env, world_info_from_env

from ..errors import UserError, explain
from .checkpoint import load_weights


def start_process(args: argparse.Namespace, chosen: set[str]) -> None:
    """Choose the device, join the process group, and put what follows from both into `args`.

    Adds torch_device, dtype (of images and weights), autocast_dtype (None: no AMP), rank, local_rank, world_size.
    """
    kind = args.device.partition(':')[0]
    if kind == 'cuda' and not torch.cuda.is_available():
        if 'device' in chosen:
            raise UserError('there is no CUDA device here: leave --device out, or give --device cpu')
        args.device = kind = 'cpu'
    args.local_rank, args.rank, args.world_size = world_info_from_env() if is_distributed_env() else (0, 0, 1)
    if args.world_size > 1:
        for name in ('rank', 'world_size', 'local_rank'):
            os.environ[name.upper()] = str(getattr(args, name))  # SLURM sets none of these
        with explain('cannot join the other processes'):
            timeout = datetime.timedelta(seconds=args.dist_timeout)
            # Else NCCL's watchdog keeps the process for a minute more, for a dump that nobody asked for.
            os.environ.setdefault('TORCH_NCCL_DUMP_ON_TIMEOUT', '0')
            os.environ.setdefault('TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC', '1000')
            dist.init_process_group('nccl' if kind == 'cuda' else 'gloo', timeout=timeout)
        if kind == 'cuda':
            args.device = f'cuda:{args.local_rank}'
    with explain(f'--device {args.device}'):
        args.torch_device = torch.device(args.device)
        torch.empty(0, device=args.torch_device)
    if args.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.use_deterministic_algorithms(True)
    if args.torch_device.type == 'cuda':
        torch.cuda.set_device(args.torch_device.index or 0)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    args.dtype = getattr(torch, args.model_dtype or 'float32')
    args.autocast_dtype = getattr(torch, args.amp_dtype) if args.amp else None
    if args.fast_norm:
        set_fast_norm()


@contextlib.contextmanager
def catch_signals() -> Iterator[list[int]]:
    """SIGTERM and SIGUSR1, by which schedulers announce the end of a job, land in the list and kill nobody."""
    caught: list[int] = []
    numbers = [getattr(signal, name) for name in ('SIGTERM', 'SIGUSR1') if hasattr(signal, name)]
    main = threading.current_thread() is threading.main_thread()  # no other may handle them
    before = {number: signal.signal(number, lambda number, _: caught.append(number)) for number in numbers if main}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def any_rank(flag: bool, args: argparse.Namespace) -> bool:
    """Whether the flag is set on any rank; every rank must ask."""
    flags = torch.tensor(int(flag), device=args.torch_device)
    if args.world_size > 1:
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags)


def autocast(args: argparse.Namespace) -> contextlib.AbstractContextManager:
    """The context of every forward pass."""
    if args.autocast_dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(args.torch_device.type, args.autocast_dtype)


def make_model(args: argparse.Namespace, **kwargs: Any) -> torch.nn.Module:
    """The model that the flags describe, with its weights, on the device; `kwargs` go to `timm.create_model` too.

    Raises:
        UserError: unknown model or argument, a size that does not fit, weights that cannot be had or do not fit.
    """
    current = get_deprecated_models().get(args.model)
    if current:  # timm's shim of a deprecated name would build the model without its configuration
        if args.rank == 0:
            print(f'warning: --model {args.model} is a deprecated name of {current}, which is used', flush=True)
        args.model = current
    name = args.model.partition('.')[0]
    if ':' not in args.model and not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise UserError(f'there is no model {args.model!r}' + (f'; did you mean {" or ".join(near)}?' if near else ''))
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    with explain(f'model {args.model}'):
        kwargs.update(pretrained=args.pretrained, num_classes=args.num_classes, global_pool=args.gp)
        return create_model(**resolve_model_input_args(args.model, vars(args), **kwargs, **args.model_kwargs))


def place_model(args: argparse.Namespace, model: torch.nn.Module, input_size: tuple[int, int, int]) -> torch.nn.Module:
    """Move the model to the device and try it once, before anything is written or a long run starts.

    Raises:
        UserError: the model cannot run here, such as a forced scan backend that is not available.
    """
    model.to(args.torch_device, args.dtype)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    training = model.training
    with explain(f'model {args.model}'), torch.no_grad(), autocast(args):
        model.eval()(torch.zeros(1, *input_size, device=args.torch_device, dtype=args.dtype))
    return model.train(training)


def make_training_model(args: argparse.Namespace) -> torch.nn.Module:
    """`make_model` plus what only training asks of it."""
    if args.pretrained_path and not os.path.isfile(args.pretrained_path):
        raise UserError(f'there is no file {args.pretrained_path}')
    overlay = dict(file=args.pretrained_path, num_classes=-1) if args.pretrained_path else {}
    model = make_model(
        args, drop_rate=args.drop, drop_path_rate=args.drop_connect if args.drop_path is None else args.drop_path,
        drop_block_rate=args.drop_block, bn_momentum=args.bn_momentum, bn_eps=args.bn_eps,
        pretrained_cfg_overlay={**overlay, **args.pretrained_cfg_overlay} or None,
    )  # fmt: skip
    if args.initial_checkpoint:
        load_weights(model, args.initial_checkpoint, use_ema=None)
    with explain(f'model {args.model}'), torch.no_grad():
        if args.head_init_scale is not None:
            for parameter in model.get_classifier().parameters():  # type: ignore[operator]
                parameter.mul_(args.head_init_scale)
        if args.head_init_bias is not None:
            model.get_classifier().bias.fill_(args.head_init_bias)  # type: ignore[operator]
        if args.grad_checkpointing:
            model.set_grad_checkpointing(enable=True)  # type: ignore[operator]
        if args.split_bn:
            model = convert_splitbn_model(model, max(args.aug_splits, 2))
        if args.sync_bn and args.world_size > 1:
            model = convert_sync_batchnorm(model)
    return model


def make_mixup(args: argparse.Namespace) -> Mixup | None:
    """timm's mixup and cutmix for the flags, or None."""
    if not (args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax):
        return None
    return Mixup(
        mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, cutmix_minmax=args.cutmix_minmax, prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob, mode=args.mixup_mode, label_smoothing=args.smoothing,
        num_classes=args.num_classes,
    )  # fmt: skip


def make_task(
    args: argparse.Namespace, model: torch.nn.Module, loss: torch.nn.Module | None, data_config: dict[str, Any]
) -> tasks.TrainingTask:
    """timm's task for the flags: classification, or distillation with --kd-*. `loss(output, target)` replaces it."""
    kind = 'jsd' if args.jsd_loss else 'bce' if args.bce_loss else args.loss or 'ce'
    options = {
        'bce': dict(bce_target_thresh=args.bce_target_thresh, bce_sum=args.bce_sum, pos_weight=args.bce_pos_weight),
        'asl': dict(asl_gamma_pos=args.asl_gamma_pos, asl_gamma_neg=args.asl_gamma_neg),
        'poly': dict(poly_epsilon=args.poly_epsilon),
        'jsd': dict(jsd_splits=args.aug_splits),
    }.get(kind, {})
    with explain('loss'):
        soft = bool(args.mixup or args.cutmix or args.cutmix_minmax)
        loss = loss or create_classification_loss(kind, smoothing=args.smoothing, soft_targets=soft, **options)
    common: dict[str, Any] = dict(device=args.torch_device, dtype=args.dtype, verbose=False)
    if not args.kd_model_name:
        return tasks.ClassificationTask(model, loss, **common)
    common.update(distill_loss_weight=args.distill_loss_weight, task_loss_weight=args.task_loss_weight)
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        'feature': (
            tasks.FeatureDistillationTask,
            dict(student_feature_dim=args.kd_student_feature_dim, teacher_feature_dim=args.kd_teacher_feature_dim),
        ),
        'token': (
            tasks.TokenDistillationTask,
            dict(distill_type=args.kd_token_distill_type, temperature=args.kd_temperature),
        ),
        'logit': (tasks.LogitDistillationTask, dict(loss_type=args.kd_loss_type, temperature=args.kd_temperature)),
    }
    create, more = kinds[args.kd_distill_type]
    with explain('knowledge distillation'):
        task = create(model, args.kd_model_name, loss, **more, **common)
        # timm normalizes the teacher's images anew, from what it takes for the student's normalization
        for owner, names, values in (
            (task, ('student_mean', 'student_std'), data_config),
            (task.teacher, ('mean_kd', 'std_kd'), task.teacher.model.pretrained_cfg),
        ):
            for name, key in zip(names, ('mean', 'std')):
                buffer = getattr(owner, name)
                adapted = adapt_to_chs(values[key], data_config['input_size'][0])
                setattr(owner, name, buffer.new_tensor(adapted).view(1, -1, 1, 1))
        return task


def learning_rate(args: argparse.Namespace) -> float:
    """--lr, or --lr-base scaled by the global batch as timm does."""
    if args.lr:
        return args.lr
    ratio = args.batch_size * args.world_size * args.grad_accum_steps / args.lr_base_size
    scale = args.lr_base_scale or ('sqrt' if any(name in args.opt.lower() for name in ('ada', 'lamb')) else 'linear')
    return args.lr_base * (ratio**0.5 if scale == 'sqrt' else ratio)


def make_optimizer(args: argparse.Namespace, task: tasks.TrainingTask) -> torch.optim.Optimizer:
    """timm's optimizer for the parameters that the task trains."""
    args.lr = learning_rate(args)
    with explain('optimizer'):
        return create_optimizer_v2(task.get_trainable_module() or task, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
