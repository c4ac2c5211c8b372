"""Train a model: `python -m vim_timm.train --help`. Without arguments it trains a small Vim on handwritten digits."""

if __name__ == '__main__':  # the command line is read before torch is imported
    import sys

    from vim_timm import commands

    sys.exit(commands.main('train'))

import importlib
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import yaml
from timm.utils import random_seed, unwrap_model

from . import data
from .data.images import MODES
from .engine import build
from .engine.checkpoint import Saver
from .engine.folder import in_folder, open_folder, planned_folder
from .engine.loop import Hooks, Trainer
from .engine.process import start_process, usual_defaults
from .errors import Preempted, UserError, explain, run, sentence
from .files import write_atomically
from .models.checkpoint import read_checkpoint, write_safetensors
from .report.curves import write_curves
from .report.reconstruction import Gallery
from .settings import Settings
from .settings.fit import idle_settings, undecayed, with_warmup
from .settings.flags import PRECISION, VALIDATE, Row
from .settings.inherited import settings_of
from .settings.masked import NOT_ENCODERS
from .settings.programs import TRAIN_PROGRAM as PROGRAM
from .settings.programs import VALIDATE_PROGRAM, start
from .settings.programs import check as check
from .settings.programs import train_settings as parse_args
from .step import compile_task, why_not
from .tasks import make_task

# flags that say how an encoder's images were prepared, beside where they lie
IMAGES = (
    '--input-img-mode', '--input-key', '--input-span', '--img-size', '--in-chans', '--input-size', '--crop-pct',
    '--mean', '--std', '--interpolation',
)  # fmt: skip
UNWRITTEN = ('data', 'config', 'recipe', 'overwrite')  # what args.yaml need not say, as it says all the rest


def slow_average(args: Settings, updates: int) -> str:
    """A remark where the moving average still holds much of the first weights after all updates; else ''."""
    if not args.model_ema or args.model_ema_warmup or (1 - args.model_ema_decay) * updates >= 1:
        return ''
    return (
        f'the moving average (--model-ema-decay {args.model_ema_decay:g}) follows slowly for a run of {updates:,} '
        'updates: --model-ema-warmup'
    )


def other_origin(args: Settings, data_config: Mapping[str, Any]) -> str:
    """A remark where the run begins with weights of a run that read or normalized images otherwise, or built its model
    otherwise."""
    path = args.initial_checkpoint or args.pretrained_path
    if not path:
        return ''
    try:
        theirs, flags = settings_of(read_checkpoint(path, mmap=True)), []
    except UserError:  # the model has its weights: a remark refuses nothing
        return ''
    for name in ('mean', 'std') if not {'mean', 'std'} & args.chosen else ():  # arrays' are measured
        values, ours = tuple(theirs.get(name, ())), tuple(data_config[name])
        if len(values) == len(ours) and values != ours:
            flags.append(' '.join([f'--{name}', *(f'{value:g}' for value in values)]))
    channels = data_config['input_size'][0]
    if channels in MODES and channels == theirs.get('input_size', (0,))[0] and args.dataset != 'arrays':
        mode = theirs.get('input_img_mode') or MODES[channels]
        flags += ['--input-img-mode', mode] if mode != (args.input_img_mode or MODES[channels]) else []
    kwargs = [
        f'{name}={value}'
        for name, value in theirs.get('model_kwargs', {}).items()
        if args.model_kwargs.get(name) != value and 'drop' not in name and name not in NOT_ENCODERS
    ]
    flags += ['--model-kwargs', *kwargs] if kwargs else []
    return f'the weights of {path} are of a run with {" ".join(flags)}, and this one has others' if flags else ''


def match_classes(args: Settings, dataset: Any, split: str) -> Settings:
    """The settings with the number of classes of the data set; one that contradicts it is refused."""
    count = len(data.class_names(dataset)) or None
    if None not in (args.num_classes, count) and count != args.num_classes:
        raise UserError(f'--num-classes is {args.num_classes}, but split {split!r} of the data has {count} classes')
    return args if count is None else args.replace(num_classes=count)


def input_channels(args: Settings) -> int:
    """Channels of the images that the model takes."""
    if args.in_chans or args.input_size:
        return args.in_chans or args.input_size[0]
    size = build.published_cfg(args.model).get('input_size')
    return size[0] if size else 3


def checkpoint_to_resume(args: Settings, saver: Saver) -> tuple[str, dict[str, Any]]:
    """The file that --resume means and its content, or '' and {}."""
    if args.resume != 'auto':
        return args.resume, read_checkpoint(args.resume) if args.resume else {}
    if not args.experiment:
        raise UserError('--resume auto looks in the folder of --experiment: name one')
    return saver.newest()


def make_datasets(args: Settings, hooks: Hooks) -> tuple[Settings, list[Any]]:
    """Data sets of the training and the evaluation split, and the settings with what follows from them.

    Classes have the numbers of the training split.
    """
    channels, sets = input_channels(args), []
    share = 0.0 if hooks.dataset else data.held_out_share(args)
    if share:
        whole = data.make_dataset(args, args.train_split, True, channels)
        sets = list(data.hold_out(whole, share, args.seed))
        args = args.replace(val_fraction=share)
    for split, training in () if share else ((args.train_split, True), (args.val_split, False)):
        dataset = hooks.dataset(split, training, args) if hooks.dataset else None
        sets.append(dataset if dataset is not None else data.make_dataset(args, split, training, channels))
    known = data.class_names(sets[0])
    sets[1] = data.renumbered(sets[1], known, f'split {args.val_split!r}', f'split {args.train_split!r}')
    for split, dataset in zip((args.train_split, args.val_split), sets):
        args = match_classes(args, dataset, split)
    if isinstance(sets[0], data.Arrays) and not {'mean', 'std'} <= args.chosen:
        # no model knows those of other channels
        measured = dict(zip(('mean', 'std'), data.channel_statistics(sets[0])))
        args = args.replace(**{name: measured[name] for name in measured if name not in args.chosen})
    return args, sets


@usual_defaults()
def train(args: Settings, hooks: Hooks | None = None) -> Trainer:
    """Run the training that `args` (from `parse_args`) describe, and return its Trainer.

    Raises:
        UserError: the settings, data or files are wrong; nothing was written yet.
        TrainingStopped, Preempted: see their docstrings.
    """
    hooks = hooks or Hooks()
    with explain('--device-modules'):
        for module in args.device_modules or []:
            importlib.import_module(module)
    build.check_optimizer(args.opt, args.opt_betas)
    process = start_process(args)
    random_seed(args.seed)
    args, remark = with_warmup(args)
    constant = undecayed(args)
    args, datasets = make_datasets(args, hooks)
    for dataset in () if args.mae or hooks.task else datasets:
        data.check_labelled(dataset)
    args = args.replace(model=build.current_name(args.model))
    model = build.make_training_model(args, process)
    args = args.replace(num_classes=args.num_classes or model.num_classes or None)
    if args.mae:
        args = args.replace(mask_ratio=model.mask_ratio, mae_loss=args.mae_loss or model.loss)
    data_config = build.resolve_images(model, vars(args))
    origin = other_origin(args, data_config)
    model = build.place_model(args, process, model, data_config['input_size'], not (args.mae or hooks.task))
    of_data = args.replace(num_classes=None) if hooks.task or hooks.loss else args  # whose targets may be anything
    train_data = data.train_loader(of_data, process, datasets[0], data_config)
    loaders = (train_data, data.eval_loader(of_data, process, datasets[1], data_config, train_data.unreadable))
    task = make_task(args, process, model, data_config, hooks.loss, hooks.task)
    if not hooks.task:
        build.check_teacher(args, train_data.classes)
    if 'eval_metric' not in args.chosen:
        args = args.replace(eval_metric=task.create_evaluator().default_metric)
    optimizer = build.make_optimizer(args, process, task)
    if args.model_ema and (process.primary or not args.model_ema_force_cpu):
        task.setup_ema(args.model_ema_decay, args.model_ema_warmup, device='cpu' if args.model_ema_force_cpu else None)  # type: ignore[arg-type]
    compiling, refusal = '', why_not(args, process, task, optimizer)
    if args.cuda_graph and refusal:
        raise UserError(refusal)
    if args.torchcompile and args.torchcompile_mode == 'reduce-overhead' and not refusal:
        args = args.replace(cuda_graph=True, torchcompile_mode=None)  # one graph of all that the compiler makes
    if args.torchcompile:
        build.try_compiler(args, process)
        with explain('--torchcompile'):
            compiling = compile_task(task, args.torchcompile, args.torchcompile_mode)
            if process.device.type == 'cuda':  # a CPU is slower by the compiled augmentation
                train_data.compile(args.torchcompile)
    if process.world_size > 1:
        device_ids = [process.device] if process.device.type == 'cuda' else None
        task.prepare_distributed(device_ids=device_ids, gradient_as_bucket_view=True, **build.buffers(args.no_ddp_bb))
    folder = planned_folder(args, data_config['input_size'][-1])
    trainer = Trainer(args, process, task, optimizer, loaders, folder, hooks)
    resumed, content = checkpoint_to_resume(args, trainer.saver)
    if resumed:
        trainer.resume(resumed, content)
    del content  # its tensors are copied
    goes_on = args.resume == 'auto' or in_folder(resumed, folder)
    if trainer.epoch >= trainer.epochs and not goes_on:
        trainer.progress.say(f'all {trainer.epochs} epochs are done')
        write_encoder(args, trainer)
        return trainer
    with open_folder(folder, process, goes_on, args) as trainer.saver.folder:
        if trainer.primary and trainer.rows and resumed == trainer.saver.path('last') and args.start_epoch is None:
            trainer.saver.tidy(trainer.rows)
        if trainer.epoch >= trainer.epochs:
            trainer.progress.say(f'all {trainer.epochs} epochs are done')
            write_encoder(args, trainer)
            return trainer
        if trainer.folder != folder:
            trainer.progress.say(f'{folder} holds a run already: this one is {os.path.basename(trainer.folder)}')
        for split, dataset in zip((args.train_split, args.val_split), datasets):
            trainer.progress.say(data.describe(dataset, split, args))
        same = args.train_split == args.val_split and not args.val_fraction or data.same_images(*datasets)
        if same and not hooks.dataset:
            trainer.progress.say('both splits are the same: the evaluation is on images that were trained on')
        announce(args, trainer, model, data_config)
        slow = slow_average(args, trainer.updates * trainer.epochs)
        for line in filter(None, (remark, constant, *idle_settings(args), origin, slow, compiling)):
            trainer.progress.say(line)
        if trainer.primary:
            # the next machine has its own device and cores
            left_out = {*UNWRITTEN, *({'device', 'workers', 'log_interval'} - args.chosen)}
            text = yaml.safe_dump({name: value for name, value in vars(args).items() if name not in left_out})
            write_atomically(os.path.join(trainer.folder, 'args.yaml'), text)
        if args.mae and trainer.primary:
            task.gallery = Gallery(process, loaders[1], args.gallery_interval).after_epoch  # type: ignore[assignment]
        trainer.run()
        write_encoder(args, trainer)
    return trainer


def write_encoder(args: Settings, trainer: Trainer) -> None:
    """Write the encoder's weights, of the moving average where there is one, as a safetensors file, if asked to.

    Its metadata say the size of the images, for their shape is that of the grid of positions.
    """
    path, task = args.save_encoder, trainer.task
    if not path or not trainer.primary:
        return
    encoder = unwrap_model(task.get_eval_model(ema=task.has_ema()))
    size = [trainer.eval_data.data_config['input_size'][0], *encoder.patch_embed.img_size]
    write_safetensors(encoder.state_dict(), path, {'input_size': json.dumps(size)})
    trainer.progress.say(f'encoder: {path}')


def announce(args: Settings, trainer: Trainer, model: Any, data_config: dict[str, Any]) -> None:
    """Print what is about to happen, the effective global batch and learning rate among it."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    size = 'x'.join(map(str, data_config['input_size']))
    process = trainer.process
    hidden = f'{model.describe_mask(data_config["input_size"][1:])} hidden' if args.mae else ''
    steps = min(args.grad_accum_steps, trainer.batches)  # of an update
    batch = args.batch_size * process.world_size * steps
    rate = build.learning_rate(args, process.world_size)
    if 'model' not in args.chosen:
        hint = '' if args.pretrained else " from random weights; with few images --pretrained starts from ImageNet's"
        trainer.progress.say(f'no --model was named: {args.model}{hint}')
    trainer.progress.say(
        f'{args.model}: {parameters / 1e6:.2f} M parameters, input {size}, {hidden or f"{args.num_classes} classes"}, '
        f'on {process.world_size} x {process.device}, {process.precision}'
    )
    trainer.progress.say(
        f'global batch {batch} = {args.batch_size} images x {process.world_size} ranks x {steps} '
        f'accumulated; {args.opt}, learning rate {rate:.4g}; {trainer.epochs} epoch{"s" if trainer.epochs > 1 else ""} '
        f'of {trainer.batches} steps; output in {trainer.folder}'
    )


def evaluation_command(args: Settings, checkpoint: str, ema: bool) -> list[str]:
    """The command line that evaluates a checkpoint of this run on its data, and in its precision."""
    split = args.train_split if args.val_fraction else args.val_split
    values = {**vars(args), 'split': split, 'num_samples': args.val_num_samples}
    words = [*start(VALIDATE_PROGRAM), *(['--mae'] if args.mae else []), '--checkpoint', checkpoint]
    words += ['--use-ema'] if ema else []
    words += ['--seed', str(args.seed)] if args.val_fraction else []  # by which images were held out
    return words + _flags((*VALIDATE['data'], *PRECISION), values, ('--dataset-download', '--data-in-memory'))


def _flags(rows: Sequence[Row], values: Mapping[str, Any], left_out: Sequence[str]) -> list[str]:
    """The words of a command line that give what differs from the defaults."""
    words = []
    for names, kind, default, *_ in rows:
        flag = names.split()[0]
        value = values.get(flag[2:].replace('-', '_'), default)
        if value != default and flag not in left_out:
            words += [flag, *([] if kind is bool else map(str, value) if isinstance(value, list) else [str(value)])]
    return words


def fine_tuning_command(args: Settings, checkpoint: str) -> list[str]:
    """The beginning of a command line that trains a classifier from a pretrained encoder, on images prepared alike."""
    words = [*start(PROGRAM), '--model', args.model.removeprefix('mae_'), '--pretrained', '--pretrained-path']
    kwargs = [f'{name}={value}' for name, value in args.model_kwargs.items() if name not in NOT_ENCODERS]
    images = [row for row in (*VALIDATE['data'], *VALIDATE['model']) if row[0] in IMAGES]
    return [*words, checkpoint, *(['--model-kwargs', *kwargs] if kwargs else []), *_flags(images, vars(args), ())]


def farewell(trainer: Trainer) -> None:
    """Print the result and what to try next, and draw the curves."""
    ranking = trainer.saver.kept(trainer.rows) or trainer.saver.ranking(trainer.rows)
    if not ranking:
        return
    best = next(row for row in trainer.rows if row['epoch'] == ranking[0])
    metric = trainer.args.eval_metric
    shown = trainer.task.number(metric, best[trainer.metric])
    trainer.progress.say(f'best {metric}: {shown} in epoch {best["epoch"]}')
    if trainer.primary and os.path.isdir(trainer.folder):
        try:
            trainer.progress.say(f'curves: {write_curves(trainer.folder, trainer.rows)}')
        except (UserError, OSError) as error:  # the run is complete without them
            trainer.progress.say(f'no curves: {sentence(error)}')
    path = trainer.saver.path('model_best')
    if os.path.exists(path) and not trainer.hooks.dataset and not trainer.hooks.task:
        report = os.path.join(trainer.folder, 'report')
        command = evaluation_command(trainer.args, path, trainer.metric.startswith('ema_'))
        trainer.progress.say(f'evaluate it: {shlex.join([*command, "--report", report])}')
        if trainer.args.mae:
            trainer.progress.say(f'fine-tune it: {shlex.join(fine_tuning_command(trainer.args, path))} ...')
    if trainer.args.recipe == 'digits':
        train, look = (' '.join(start(program)) for program in (PROGRAM, 'data.py'))
        trainer.progress.say(
            'next: your own photos, one folder a class in FOLDER (docs/own-photos.md):\n'
            f'  {look} FOLDER\n'
            f'  {train} FOLDER --pretrained --epochs 10 --batch-size 16 --opt adamw --lr 3e-4\n'
            '  (--model vim_nano_patch4_32: small, and nothing to download)\n'
            f'{train} --list-recipes shows settings that are known to work'
        )


def resuming_command(args: Settings, arguments: Sequence[str], folder: str) -> list[str]:
    """The command line that goes on with a run of this process in its folder."""
    words, given = [], iter(arguments)
    for word in given:
        name, has_value, _ = word.partition('=')
        if name in ('--resume', '--experiment'):
            next(given if not has_value else iter(()), None)
        elif name != '--overwrite':
            words.append(word)
    typed = sys.orig_argv
    begins = typed[: len(typed) - len(arguments)] if typed[len(typed) - len(arguments) :] == list(arguments) else []
    begins = begins or ['python', '-m', 'vim_timm.train']
    if [os.path.basename(word) for word in begins[1:]] == start(PROGRAM):  # the console script, of which Python is told
        begins = start(PROGRAM)
    if 'TORCHELASTIC_RUN_ID' in os.environ:  # started by torchrun: python -u train.py, or python -u -m vim_timm.train
        begins = ['torchrun', f'--nproc_per_node={os.environ.get("LOCAL_WORLD_SIZE", 1)}', *begins[1:]]
        begins = [word for word in begins if word != '-u']
    name = os.path.relpath(folder, args.output or os.path.join('.', 'output', 'train'))
    return [*begins, *words, '--experiment', name, '--resume', 'auto']


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""

    def body(arguments: Sequence[str]) -> None:
        args = parse_args(arguments)
        try:
            farewell(train(args))
        except Preempted as error:
            if error.folder and os.environ.get('RANK', '0') == '0':
                print(f'go on with: {shlex.join(resuming_command(args, arguments, error.folder))}', flush=True)
            raise
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()

    return run(body, PROGRAM, argv)
