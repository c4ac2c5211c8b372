"""One label an image: timm's losses, mixup and cutmix, and distillation from a teacher."""

from typing import Any

import timm.task
import torch
from timm.data import Mixup
from timm.data.loader import adapt_to_chs
from timm.loss import create_classification_loss

from ..errors import explain
from ..settings import Process, Settings
from .base import Task, adopt


def make_task(
    settings: Settings, process: Process, model: torch.nn.Module, data_config: dict[str, Any],
    loss: torch.nn.Module | None = None,
) -> Task:  # fmt: skip
    """timm's task for the flags: classification, or distillation with --kd-*.

    Args:
        data_config: input_size, mean and std of the images.
        loss: called with (output, target), in place of the one that the flags name.
    """
    loss = loss or _make_loss(settings)
    if settings.kd_model_name:
        return adopt(_distillation(settings, process, model, loss, data_config))
    return adopt(timm.task.ClassificationTask(model, loss, device=process.device, dtype=process.dtype, verbose=False))


def _make_loss(settings: Settings) -> torch.nn.Module:
    kind = 'jsd' if settings.jsd_loss else 'bce' if settings.bce_loss else settings.loss or 'ce'
    options = {
        'bce': dict(
            bce_target_thresh=settings.bce_target_thresh,
            bce_sum=settings.bce_sum,
            pos_weight=settings.bce_pos_weight,
        ),
        'asl': dict(asl_gamma_pos=settings.asl_gamma_pos, asl_gamma_neg=settings.asl_gamma_neg),
        'poly': dict(poly_epsilon=settings.poly_epsilon),
        'jsd': dict(jsd_splits=settings.aug_splits),
    }.get(kind, {})
    with explain('loss'):
        return create_classification_loss(kind, smoothing=settings.smoothing, soft_targets=_mixes(settings), **options)


def _mixes(settings: Settings) -> bool:
    return bool(settings.mixup > 0 or settings.cutmix > 0 or settings.cutmix_minmax)


def make_mixup(settings: Settings, multi_label: bool = False) -> Mixup | None:
    """timm's mixup and cutmix for the flags, or None."""
    if not _mixes(settings):
        return None
    return Mixup(
        mixup_alpha=settings.mixup, cutmix_alpha=settings.cutmix, cutmix_minmax=settings.cutmix_minmax,
        prob=settings.mixup_prob, switch_prob=settings.mixup_switch_prob, mode=settings.mixup_mode,
        label_smoothing=settings.smoothing, num_classes=settings.num_classes, multi_label=multi_label,
    )  # fmt: skip


def _distillation(
    settings: Settings, process: Process, model: torch.nn.Module, loss: torch.nn.Module, data_config: dict[str, Any]
) -> timm.task.TrainingTask:
    common: dict[str, Any] = dict(device=process.device, dtype=process.dtype, verbose=False)
    weights = dict(distill_loss_weight=settings.distill_loss_weight, task_loss_weight=settings.task_loss_weight)
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        'feature': (
            timm.task.FeatureDistillationTask,
            dict(
                student_feature_dim=settings.kd_student_feature_dim, teacher_feature_dim=settings.kd_teacher_feature_dim
            ),
        ),
        'token': (
            timm.task.TokenDistillationTask,
            dict(distill_type=settings.kd_token_distill_type, temperature=settings.kd_temperature),
        ),
        'logit': (
            timm.task.LogitDistillationTask,
            dict(loss_type=settings.kd_loss_type, temperature=settings.kd_temperature),
        ),
    }
    create, more = kinds[settings.kd_distill_type]
    with explain('knowledge distillation'):
        task = create(model, settings.kd_model_name, loss, **more, **weights, **common)
        taught = task.teacher.model.pretrained_cfg.get('num_classes')
        if settings.kd_distill_type != 'feature' and taught != settings.num_classes:  # timm gave it a random classifier
            raise ValueError(
                f'{settings.kd_model_name} knows {taught} classes, and the student learns {settings.num_classes}: '
                '--kd-distill-type feature, or a teacher of the same classes'
            )
        # timm normalizes the teacher's images anew, from what it takes for the student's normalization
        for owner, names, values in (
            (task, ('student_mean', 'student_std'), data_config),
            (task.teacher, ('mean_kd', 'std_kd'), task.teacher.model.pretrained_cfg),
        ):
            for name, key in zip(names, ('mean', 'std')):
                buffer = getattr(owner, name)
                adapted = adapt_to_chs(values[key], data_config['input_size'][0])
                setattr(owner, name, buffer.new_tensor(adapted).view(1, -1, 1, 1))
        _try_teacher(task, data_config['input_size'], process)
        return task


@torch.no_grad()
def _try_teacher(task: Any, size: tuple[int, int, int], process: Process) -> None:
    """Let the teacher see images of the student's size, before anything is written; some take their own size alone."""
    images = torch.zeros(1, *size, device=process.device, dtype=process.dtype)
    features = isinstance(task, timm.task.FeatureDistillationTask)
    task.eval()
    with process.autocast():
        taught = task.teacher(images, return_features=features)
        if features and task.trainable_module(images)[1].shape != taught.shape:
            raise ValueError(
                f'--kd-teacher-feature-dim is not the {taught.shape[1]} that the teacher has: leave it out'
            )
    task.train()
