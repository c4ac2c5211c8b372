"""Settings of train.py and validate.py from their command lines, as far as they go without torch and timm."""

import glob
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError, called, meant
from .fit import with_model
from .flags import TORCH_DATASETS, TRAIN, VALIDATE
from .masked import AUGMENTATION, check_masked, is_autoencoder
from .parse import Settings, build_parser, parse
from .parser import Parser, check_average

STREAMS = ('hfids/', 'tfds/', 'wds/')
KINDS = ('torch/', 'hfds/', *STREAMS)  # of --dataset, before a name
_PACKAGE = Path(__file__).parents[1]
TRAIN_PROGRAM, VALIDATE_PROGRAM = 'train.py', 'validate.py'
TRAIN_TEXT = """Train an image classifier with timm's library; flags have the names, defaults and meanings of timm's
train.py. Without data, recipe or --config it trains on the embedded digits (the recipe `digits`)."""
VALIDATE_TEXT = """Evaluate an image classifier with timm's library; flags have the names, defaults and meanings of
timm's validate.py. Settings that a checkpoint of train.py carries (model, data, size, precision) need not be
repeated."""


def start(program: str) -> list[str]:
    """Words that start a program (train.py, data.py, ...) in the user's way: `vim-timm`, the module, or a script.

    Only train.py and validate.py are scripts, of a checkout; who calls a program from Python is told of those there.
    """
    words = called(program).split()
    if len(words) > 1:
        return words
    folder, name = os.path.split(sys.argv[0])
    if name in (TRAIN_PROGRAM, VALIDATE_PROGRAM):
        script = os.path.join(folder, program)
        by_script = os.path.basename(folder) != _PACKAGE.name and os.path.isfile(script)
    else:
        script, by_script = program, (_PACKAGE.parent / program).is_file()
    return ['python', script] if by_script else ['python', '-m', f'{_PACKAGE.name}.{program.removesuffix(".py")}']


def train_parser() -> Parser:
    """The command line of train.py."""
    return build_parser(TRAIN_PROGRAM, TRAIN, TRAIN_TEXT)


def validate_parser() -> Parser:
    """The command line of validate.py."""
    return build_parser(VALIDATE_PROGRAM, VALIDATE, VALIDATE_TEXT)


def train_settings(argv: Sequence[str]) -> Settings:
    """Settings of a run, checked as far as they can be without a model.

    Raises:
        UserError: one is unknown, out of its range, or contradicts another.
    """
    fallback = 'mae_digits' if '--mae' in argv else 'digits'
    args = parse(TRAIN_PROGRAM, TRAIN, argv, TRAIN_TEXT, fallback_recipe=fallback)
    if args.mae or is_autoencoder(args.model):
        args = parse(TRAIN_PROGRAM, TRAIN, argv, TRAIN_TEXT, ('--mae', AUGMENTATION), fallback).replace(mae=True)
    check(args)
    return with_model(args)


def validate_settings(argv: Sequence[str]) -> Settings:
    """Settings of an evaluation, without what its checkpoint says.

    Raises:
        UserError: one is unknown or out of its range, or no weights are named.
    """
    args = parse(VALIDATE_PROGRAM, VALIDATE, argv, VALIDATE_TEXT)
    if not args.checkpoint and not args.pretrained:
        runs = glob.glob(os.path.join('output', 'train', '*', 'model_best.pth.tar'))
        newest = f' (the newest run here has {max(runs, key=os.path.getmtime)})' if runs else ''
        raise UserError(f'name the weights: --checkpoint FILE, or --model NAME --pretrained{newest}')
    check_average(args)
    if args.results_file and not os.path.isdir(os.path.dirname(args.results_file) or '.'):
        raise UserError(f'--results-file {args.results_file}: there is no such folder')
    if os.path.isdir(args.results_file):
        raise UserError(f'--results-file {args.results_file} is a folder: name a file in it')
    return args


def results_format(args: Settings) -> str:
    """The format of --results-file: as chosen, else as its ending says."""
    by_ending = 'results_format' not in args.chosen and args.results_file.endswith('.json')
    return 'json' if by_ending else args.results_format


def check(args: Settings) -> None:
    """Refuse settings that contradict each other."""
    check_masked(args)
    if args.amp and args.model_dtype not in (None, 'float32'):
        raise UserError(f'--amp needs float32 weights, not --model-dtype {args.model_dtype}')
    if getattr(args, 'pretrained_path', None) and not args.pretrained:
        raise UserError(f'--pretrained-path {args.pretrained_path} is not read without --pretrained: add it')
    if getattr(args, 'real_labels', '') and args.valid_labels:
        raise UserError("--real-labels are numbers of all of ImageNet's classes: leave --valid-labels out")
    if getattr(args, 'lr_base_scale', '') not in ('', 'linear', 'sqrt'):
        raise UserError(f'--lr-base-scale must be linear or sqrt, not {args.lr_base_scale!r}')
    splits = getattr(args, 'aug_splits', 0)
    if 'mixup' in args and (args.mixup or args.cutmix or args.cutmix_minmax):
        if args.batch_size % 2:
            raise UserError(f'mixup and cutmix pair images: --batch-size must be even, not {args.batch_size}')
        if splits > 1:
            raise UserError('--mixup and --cutmix do not go with --aug-splits')
    if 'jsd_loss' in args and (args.jsd_loss or args.loss == 'jsd') and not splits:
        raise UserError('the loss jsd needs --aug-splits of 2 or more')
    if getattr(args, 'layer_decay', None) is not None and args.sched == 'none':
        raise UserError('--layer-decay acts through a schedule, which --sched none has not: --sched constant')
    if getattr(args, 'split_bn', False) and not (splits or args.resplit):
        raise UserError('--split-bn splits batches as --aug-splits does: give it, or leave --split-bn out')
    losses = [args.loss, args.bce_loss and 'bce', args.jsd_loss and 'jsd'] if 'jsd_loss' in args else []
    if len(named := {*filter(None, losses)}) > 1:
        raise UserError(f'{" and ".join(sorted(named))} are two losses (--loss, --bce-loss, --jsd-loss): give one')
    if 'aug_repeats' in args and args.aug_repeats and args.epoch_repeats > 1:
        raise UserError('--aug-repeats draws as many images an epoch as there are: leave --epoch-repeats out')
    if 'scale' in args and args.scale[1] > 1 and args.train_crop_mode in (None, 'rrc'):
        raise UserError(f'--scale: a crop has at most the area of its image, which is 1, not {args.scale[1]:g}')


def check_data(args: Settings) -> None:
    """Refuse data that cannot be, by its names.

    Raises:
        UserError: --dataset is of no kind, or the folder is not named or not there.
    """
    name = args.dataset.lower()
    torchs = [f'torch/{known}' for known in TORCH_DATASETS]
    if name.startswith('torch/') and name not in torchs:
        raise UserError(f'--dataset {args.dataset}: there is no such data set of torchvision here{meant(name, torchs)}')
    if name not in ('', 'arrays', 'digits') and not name.startswith(KINDS):  # timm would take it for a folder of images
        if os.path.isdir(args.dataset):
            raise UserError(f'--dataset {args.dataset} is a folder: --data-dir {args.dataset} reads it')
        known = [f'torch/{name}'] if f'torch/{name}' in torchs else ['digits', 'arrays', *torchs]
        raise UserError(
            f'--dataset takes digits, nothing or arrays for a folder or tar, or {"NAME, ".join(KINDS)}NAME, '
            f'not {args.dataset!r}{meant(name, known)}'
        )
    if not name.startswith(STREAMS):
        for flag in ('train_num_samples', 'num_samples', 'val_num_samples'):
            if getattr(args, flag, None):
                raise UserError(
                    f'--{flag.replace("_", "-")} counts the images of a stream ({"NAME, ".join(STREAMS)}NAME), '
                    'and takes no part of other data: leave it out'
                )
    if name in ('', 'arrays', *torchs):
        if not args.data_dir:
            raise UserError('no data: give --data-dir, or --dataset digits for the embedded digits')
        if not os.path.exists(args.data_dir) and not args.dataset_download:
            raise UserError(f'there is no data folder {args.data_dir}')
