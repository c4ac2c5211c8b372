"""Run a command line of the original Vim code's `main.py` here, unchanged.

    python -m vim_timm.original ARGS...                          one process
    torchrun --nproc_per_node=8 -m vim_timm.original ARGS...     in place of `torch.distributed.launch ... main.py`

Every flag of hustvl/Vim's `main.py` (HEAD) is translated with that script's default, the equivalent line of our train
or validate is printed, and it runs; `--dry-run` only prints. A flag that cannot be honoured is refused by name.

Three things differ: the learning rate schedule moves one epoch earlier (the original starts each epoch with the rate of
the one before), the EMA weights decide which checkpoint is best, and `--eval` reports the trained weights only.
"""

import argparse
import os
import shlex
import sys
from dataclasses import dataclass, field
from typing import Any, NoReturn, Optional, Sequence

from timm.models import get_deprecated_models, is_model_in_modules

from vim_timm.data.folder import top_folders
from vim_timm.errors import UserError, explain, run

PROGRAM = 'python -m vim_timm.original'


@dataclass(frozen=True)
class Flag:
    """One flag of the original.

    Attributes:
        options: what argparse is told about it.
        train: the flag of train.py that takes its value.
        validate: the flag of validate.py that takes its value; without one, it changes nothing in an evaluation.
        refusal: why a value other than the default cannot be honoured in training.
        note: why it changes nothing; said when it is given.
    """

    options: dict[str, Any]
    train: str = ''
    validate: str = ''
    refusal: str = ''
    note: str = ''


def _value(kind: type, default: Any, train: str = '', validate: str = '', **more: str) -> Flag:
    return Flag({'type': kind, 'default': default}, train, validate, **more)


def _values(kind: type, train: str) -> Flag:
    return Flag({'type': kind, 'nargs': '+', 'default': None}, train)


def _on(train: str = '', validate: str = '', default: bool = False, **more: str) -> Flag:
    return Flag({'action': 'store_true', 'default': default}, train, validate, **more)


def _off(name: str, default: bool = False, refusal: str = '') -> Flag:
    """The negative of another flag, which carries the translation."""
    return Flag({'action': 'store_false', 'dest': name, 'default': default}, refusal=refusal)


_NO_DISTILLATION = 'distillation needs two outputs, which no Vim has, so the original fails on it as well'
_NO_TEACHER = 'it changes nothing without distillation'
_DISTRIBUTED = 'processes are found from the environment that torchrun sets'
_GPU = (
    'it only chose the logging process, CUDA_VISIBLE_DEVICES and --device choose the device '
    '(the fork that has it also trains in mixed precision by default: --if_amp)'
)

# flag of the original -> its translation; flags without one are combined in `_combined`
FLAGS: dict[str, Flag] = {
    '--batch-size': _value(int, 64, '--batch-size', '--batch-size'),
    '--epochs': _value(int, 300, '--epochs'),
    '--bce-loss': _on(),
    '--unscale-lr': _on(),
    '--model': _value(str, 'deit_base_patch16_224'),
    '--input-size': _value(int, 224, '--img-size', '--img-size'),
    '--drop': _value(float, 0.0),
    '--drop-path': _value(float, 0.1, '--drop-path'),
    '--model-ema': _on('--model-ema', default=True),
    '--no-model-ema': _off('model_ema', default=True),
    '--model-ema-decay': _value(float, 0.99996, '--model-ema-decay'),
    '--model-ema-force-cpu': _on('--model-ema-force-cpu'),
    '--opt': _value(str, 'adamw', '--opt'),
    '--opt-eps': _value(float, 1e-8, '--opt-eps'),
    '--opt-betas': _values(float, '--opt-betas'),
    '--clip-grad': _value(float, None, '--clip-grad'),
    '--momentum': _value(float, 0.9, '--momentum'),
    '--weight-decay': _value(float, 0.05, '--weight-decay'),
    '--sched': _value(str, 'cosine', '--sched'),
    '--lr': _value(float, 5e-4),
    '--lr-noise': _values(float, '--lr-noise'),
    '--lr-noise-pct': _value(float, 0.67, '--lr-noise-pct'),
    '--lr-noise-std': _value(float, 1.0, '--lr-noise-std'),
    '--warmup-lr': _value(float, 1e-6, '--warmup-lr'),
    '--min-lr': _value(float, 1e-5, '--min-lr'),
    '--decay-epochs': _value(float, 30, '--decay-epochs'),
    '--warmup-epochs': _value(int, 5, '--warmup-epochs'),
    '--cooldown-epochs': _value(int, 10, note='the original trains --epochs epochs, cooldown or not'),
    '--patience-epochs': _value(int, 10, '--patience-epochs'),
    '--decay-rate': _value(float, 0.1, '--decay-rate'),
    '--color-jitter': _value(float, 0.3, '--color-jitter'),
    '--aa': _value(str, 'rand-m9-mstd0.5-inc1'),
    '--smoothing': _value(float, 0.1, '--smoothing'),
    '--train-interpolation': _value(str, 'bicubic', '--train-interpolation'),
    '--repeated-aug': _on(default=True),
    '--no-repeated-aug': _off('repeated_aug', default=True),
    '--train-mode': _on(default=True),
    '--no-train-mode': _off('train_mode', default=True, refusal='training in eval mode has no equivalent'),
    '--ThreeAugment': _on(),
    '--src': _on(),
    '--reprob': _value(float, 0.25),
    '--remode': _value(str, 'pixel', '--remode'),
    '--recount': _value(int, 1, '--recount'),
    '--resplit': _on(note='the original reads it and never uses it'),
    '--mixup': _value(float, 0.8, '--mixup'),
    '--cutmix': _value(float, 1.0, '--cutmix'),
    '--cutmix-minmax': _values(float, '--cutmix-minmax'),
    '--mixup-prob': _value(float, 1.0, '--mixup-prob'),
    '--mixup-switch-prob': _value(float, 0.5, '--mixup-switch-prob'),
    '--mixup-mode': _value(str, 'batch', '--mixup-mode'),
    '--teacher-model': _value(str, 'regnety_160', note=_NO_TEACHER),
    '--teacher-path': _value(str, '', note=_NO_TEACHER),
    '--distillation-type': Flag({'choices': ('none', 'soft', 'hard'), 'default': 'none'}, refusal=_NO_DISTILLATION),
    '--distillation-alpha': _value(float, 0.5, note=_NO_TEACHER),
    '--distillation-tau': _value(float, 1.0, note=_NO_TEACHER),
    '--cosub': _on(refusal='co-training of submodels has no equivalent'),
    '--finetune': _value(str, ''),
    '--attn-only': _on(refusal='a Vim has no attention to train alone'),
    '--data-path': _value(str, '/datasets01/imagenet_full_size/061417/', '--data-dir', '--data-dir'),
    '--data-set': Flag({'choices': ('CIFAR', 'IMNET', 'INAT', 'INAT19'), 'default': 'IMNET'}),
    '--inat-category': _value(str, 'name', note='it belongs to --data-set INAT and INAT19'),
    '--output_dir': _value(str, ''),
    '--device': _value(str, None, '--device', '--device'),
    '--seed': _value(int, 0, '--seed'),
    '--resume': _value(str, ''),
    '--start_epoch': _value(int, None, '--start-epoch'),
    '--eval': _on(),
    '--eval-crop-ratio': _value(float, 0.875),
    '--dist-eval': _on(note='distributed runs always share the evaluation'),
    '--num_workers': _value(int, 10, '--workers', '--workers'),
    '--pin-mem': _on('--pin-mem', '--pin-mem', default=True),
    '--no-pin-mem': _off('pin_mem', default=True),
    '--distributed': _on(note=_DISTRIBUTED),
    '--world_size': _value(int, 1, note=_DISTRIBUTED),
    '--dist_url': _value(str, 'env://', refusal=_DISTRIBUTED),
    '--if_amp': _on('--amp', '--amp'),
    '--no_amp': _off('if_amp'),
    '--if_continue_inf': _on(),
    '--no_continue_inf': _off('if_continue_inf'),
    '--if_nan2num': _on(refusal='a loss that is not finite is never replaced by a number'),
    '--no_nan2num': _off('if_nan2num'),
    '--if_random_cls_token_position': _on(),
    '--no_random_cls_token_position': _off('if_random_cls_token_position'),
    '--if_random_token_rank': _on(),
    '--no_random_token_rank': _off('if_random_token_rank'),
    '--local-rank': _value(int, 0, note=_DISTRIBUTED),
    '--local_rank': _value(int, 0, note=_DISTRIBUTED),
    # not in the original's main.py: the CIFAR-10 fork's, and one that a guide to the original names
    '--gpu': _value(int, 0, note=_GPU),
    '--use-checkpoint': _on('--grad-checkpointing'),
}


@dataclass
class Translation:
    """An equivalent command line: `script` ('train' or 'validate'), its arguments, and remarks to print."""

    script: str
    arguments: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def command(self, world_size: int = 1) -> str:
        launcher = ['python'] if world_size == 1 else ['torchrun', f'--nproc_per_node={world_size}']
        return shlex.join([*launcher, '-m', f'vim_timm.{self.script}', *self.arguments])


class _Parser(argparse.ArgumentParser):
    """A parser whose mistakes are sentences."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f'{message} (--help lists the flags)')


class Refusal(UserError):
    """A flag that cannot be honoured; the message names it."""


def build_parser() -> argparse.ArgumentParser:
    """The original's command line, plus `--dry-run`."""
    parser = _Parser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, flag in FLAGS.items():
        names = (name, '--dr') if name == '--decay-rate' else (name,)
        parser.add_argument(*names, **flag.options)
    parser.add_argument('--dry-run', action='store_true', help='print the equivalent line and stop (ours)')
    return parser


def translate(args: argparse.Namespace, given: set[str], world_size: int = 1) -> Translation:
    """Translate a parsed command line of the original.

    Args:
        args: what `build_parser` parsed.
        given: the flags that the user spelled out.
        world_size: number of processes; repeated augmentation exists only among several, there as here.

    Raises:
        Refusal: a flag cannot be honoured.
    """
    script = 'validate' if args.eval else 'train'
    result = Translation(script)
    args.model = get_deprecated_models().get(args.model) or args.model
    result.arguments += ['--model', args.model]
    for name, flag in FLAGS.items():
        value = getattr(args, flag.options.get('dest', name.lstrip('-').replace('-', '_')))
        if flag.refusal and value != flag.options['default'] and script == 'train':
            raise Refusal(f'{name}: {flag.refusal}')
        if flag.note and name in given:
            result.notes.append(f'{name} changes nothing: {flag.note}')
        result.arguments += _forward(getattr(flag, script), value)
    result.arguments += _data(args, script, result.notes)
    result.arguments += _combined_eval(args) if args.eval else _combined_train(args, world_size, result.notes)
    return result


def _forward(name: str, value: Any) -> list[str]:
    if not name or value is None or value is False:
        return []
    values = value if isinstance(value, list) else [] if value is True else [value]
    return [name, *(str(v) for v in values)]


def _data(args: argparse.Namespace, script: str, notes: list[str]) -> list[str]:
    """The data set, its class count, and how evaluation crops: whole images at 32 pixels and below."""
    crop = ['--crop-pct', str(args.eval_crop_ratio if args.input_size > 32 else 1.0), '--interpolation', 'bicubic']
    if args.data_set == 'IMNET':
        splits = ['--train-split', 'train', '--val-split', 'val'] if script == 'train' else ['--split', 'val']
        classes = _image_folder_classes(args.data_path, splits[1], notes)
        return ['--dataset', 'torch/image_folder', *splits, '--num-classes', str(classes), *crop]
    if args.data_set == 'CIFAR':
        notes.append(
            '--data-set CIFAR is CIFAR-100 in the original; for CIFAR-10, run the line below with '
            '--dataset torch/cifar10 --num-classes 10'
        )
        return ['--dataset', 'torch/cifar100', '--num-classes', '100', *crop]
    raise Refusal(f'--data-set {args.data_set}: the 2018 and 2019 iNaturalist index files are not supported')


def _image_folder_classes(folder: str, split: str, notes: list[str]) -> int:
    """1000 as in the original, which gives every image folder an ImageNet head, unless this one has other classes."""
    split_folder = os.path.join(folder, split)
    found = len(top_folders(split_folder)) if os.path.isdir(split_folder) else 0
    if found in (0, 1000):
        return 1000
    notes.append(f'{split_folder} has {found} classes, so the model has {found} outputs; the original always has 1000')
    return found


def _model_kwargs(args: argparse.Namespace, notes: list[str]) -> list[str]:
    """What the original sets inside its Vim, and other models do not know."""
    if not is_model_in_modules(args.model, ['vision_mamba']):
        return _forward('--drop', args.drop)
    kwargs = ['decay_state=True']  # the original's optimizer decays A_log, for it is a matrix
    if args.drop:
        kwargs.append(f'pos_drop_rate={args.drop}')
    if args.if_random_token_rank:
        kwargs.append('random_token_order=True')
    if args.if_random_cls_token_position:
        if args.model.endswith('rope_ape_224'):
            kwargs.append('random_class_position=True')
        else:
            notes.append('--if_random_cls_token_position changes nothing: it moves leading class tokens only')
    return ['--model-kwargs', *kwargs]


def _combined_eval(args: argparse.Namespace) -> list[str]:
    if not args.resume:
        raise Refusal('--eval: needs --resume with the checkpoint to evaluate')
    return ['--checkpoint', _local('--resume', args.resume)]


def _combined_train(args: argparse.Namespace, world_size: int, notes: list[str]) -> list[str]:
    """The flags of training whose meaning depends on one another or on the number of processes."""
    arguments = ['--lr', str(args.lr)] if args.unscale_lr else _scaled_lr(args.lr)
    arguments += _augmentation(args, notes)
    if args.repeated_aug and world_size > 1:
        arguments += ['--aug-repeats', '3']
    if args.if_continue_inf:
        arguments += ['--max-nonfinite', '1000000000']
    elif not args.if_amp:
        arguments += ['--max-nonfinite', '1']  # the original ends there; under fp16 its loss scaler skips overflows
    if args.bce_loss:
        arguments += ['--bce-loss', '--bce-target-thresh', '0.0']
    if args.finetune:
        arguments += ['--pretrained', '--pretrained-path', _local('--finetune', args.finetune)]
    if args.resume:
        arguments += ['--resume', _resumable(args.resume)]
    if args.output_dir:
        folder, name = os.path.split(args.output_dir.rstrip('/'))
        arguments += ['--output', folder or '.', '--experiment', name]
    else:
        notes.append('without --output_dir the original saves nothing; here checkpoints go to ./output/train')
    return arguments + _model_kwargs(args, notes)


def _scaled_lr(lr: float) -> list[str]:
    """The original's rule: lr x global batch / 512."""
    return ['--lr-base', str(lr), '--lr-base-size', '512', '--lr-base-scale', 'linear']


def _augmentation(args: argparse.Namespace, notes: list[str]) -> list[str]:
    if args.ThreeAugment:
        if args.src:
            raise Refusal('--src: the simple random crop has no equivalent')
        return ['--aa', '3a', '--reprob', '0.0']  # 3-Augment replaces AutoAugment and never erases
    if args.src:
        notes.append('--src changes nothing: it belongs to --ThreeAugment')
    arguments = ['--aa', args.aa, '--reprob', str(args.reprob)]
    if args.input_size <= 32:
        notes.append(
            f'--input-size {args.input_size}: the original crops small images after padding them by 4 pixels; '
            'a square crop of at least 7/8 of the side stands in'
        )
        arguments += ['--scale', '0.766', '1.0', '--ratio', '1.0', '1.0']
    return arguments


def _local(name: str, path: str) -> str:
    if path.startswith('https'):
        raise Refusal(f'{name}: download {path} first and give the file')
    return path


def _resumable(path: str) -> str:
    """Refuse to resume the original's own training files: optimizer states do not carry over."""
    from vim_timm.models.checkpoint import read_checkpoint

    path = _local('--resume', path)
    with explain('--resume'):
        original = os.path.isfile(path) and {'model', 'lr_scheduler'} <= read_checkpoint(path).keys()
    if original:
        raise Refusal(f"--resume: the optimizer state in {path} is the original code's; --finetune takes its weights")
    return path


def _given(words: Sequence[str]) -> set[str]:
    """The flags spelled out in a command line, abbreviations resolved as argparse does."""
    names = [word.split('=')[0] for word in words if word.startswith('--')]
    return {full for name in names for full in FLAGS if full == name or (name not in FLAGS and full.startswith(name))}


def _main(argv: Sequence[str]) -> None:
    words = list(argv[1:] if argv and argv[0].endswith('main.py') else argv)
    parser = build_parser()
    args = parser.parse_args(words)
    world_size = int(os.environ.get('WORLD_SIZE', 1))
    translation = translate(args, _given(words), world_size)
    if int(os.environ.get('RANK', 0)) == 0:
        for note in translation.notes:
            print(f'note: {note}')
        print(translation.command(world_size), flush=True)
    if args.dry_run:
        return
    from vim_timm import train, validate  # only now: they bring torchvision and the data sets

    status = (validate if args.eval else train).main(translation.arguments)
    if status:
        sys.exit(status)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Translate and run; returns the exit status."""
    return run(_main, 'original', argv)


if __name__ == '__main__':
    sys.exit(main())
