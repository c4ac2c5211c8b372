"""Evaluate a checkpoint or published weights: `python -m vim_timm.validate --help`."""

if __name__ == '__main__':  # the command line is read before torch is imported
    import sys

    from vim_timm import commands

    sys.exit(commands.main('validate'))

import functools
import glob
import itertools
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from timm.layers import apply_test_time_pool
from timm.models import safe_model_name
from timm.task import ClassificationTask
from timm.utils import decay_batch_step, natural_key, reparameterize_model

from . import data
from .data.classes import is_wordnet_id, read_valid_labels
from .data.real_labels import read_real_labels, real_accuracy
from .engine import build
from .engine.eval_batch import fit_batch
from .engine.evaluate import Metric, Predicted, Watch, evaluate
from .engine.log import Progress, Speed
from .engine.process import catch_signals, in_precision, start_process, usual_defaults
from .engine.record import held_out_of, history_of
from .errors import Preempted, UserError, explain, out_of_memory, run, sentence, shown
from .files import table, to_json, write_atomically
from .layers.masking import num_kept
from .models.checkpoint import class_names_in, read_checkpoint, select_weights
from .models.load import check_size, load_content
from .models.masked_autoencoder import autoencoder_weights
from .report import reconstruction
from .report.evaluation import Evaluation, open_folder, write_report
from .report.extras import require
from .report.facts import facts
from .report.metrics import best_classes, measure
from .report.names import words
from .settings import Process, Settings
from .settings.flags import AUTO, VALIDATE
from .settings.inherited import data_of, settings_of, without_size
from .settings.masked import AUTOENCODER, check_target, is_autoencoder
from .settings.parse import parse
from .settings.programs import VALIDATE_PROGRAM as PROGRAM
from .settings.programs import check, results_format, validate_settings
from .tasks import adopt, make_task
from .train import input_channels, match_classes

USUAL_BATCH = 256  # images; --batch-size, where it is auto and nothing has been chosen
ENDINGS = ('.pth.tar', '.pth', '.safetensors')  # of checkpoints in a folder


def parse_args(argv: Sequence[str]) -> Settings:
    """Settings of an evaluation: defaults, what the checkpoint says, --config, flags."""
    return read_args(argv)[0]


def read_args(argv: Sequence[str]) -> tuple[Settings, dict[str, Any]]:
    """`parse_args`, and the content of the checkpoint that they name."""
    first = validate_settings(argv)
    what, content, layer = f'checkpoint {first.checkpoint}', {}, {}
    if first.checkpoint and os.path.isfile(first.checkpoint):
        content = read_checkpoint(first.checkpoint)
        content.pop('optimizer', None)  # large, and nobody's here
        layer = without_size(settings_of(content, what), first.chosen)
        check_target(first, layer, what)
        found = _data_of(content, what, first)
        if (
            'seed' in first.chosen
            and 'val_fraction' not in first.chosen
            and first.seed != found.get('seed', first.seed)
        ):
            raise UserError(
                f'--seed {first.seed} would pick other images than those that the run held out by --seed '
                f'{found["seed"]}: leave it out, or name the share too (--val-fraction)'
            )
        layer.update(found)
    args = parse(PROGRAM, VALIDATE, argv, layer=(what, layer))
    args = Settings({**vars(args), 'mae': args.mae or is_autoencoder(args.model)}, first.chosen)
    if layer or (args.mae and content):
        with explain(what):
            weights = autoencoder_weights(content) if args.mae else select_weights(content, what=what)
            if layer:
                sizes = ('img_size', 'input_size') if not {'img_size', 'input_size'} & args.chosen else ()
                names = ('model', 'model_kwargs', 'num_classes', 'in_chans', 'mae', *AUTOENCODER, *sizes)
                check_size({name: v for name in names if (v := getattr(args, name)) is not None}, weights, what)
    if not args.data_dir and not args.dataset:
        args = args.replace(dataset='digits')
    check(args)
    args = args.replace(val_num_samples=args.num_samples, validation_batch_size=None)
    if args.batch_size == AUTO:  # until it has been chosen
        args = args.replace(batch_size=USUAL_BATCH, validation_batch_size=AUTO)
    return args, content


def _data_of(content: Mapping[str, Any], what: str, first: Settings) -> dict[str, Any]:
    """The data settings that an evaluation takes from its checkpoint: all, none, or which part of the folder it is.

    Of the run's own folder the part that it held out is evaluated, whoever names the folder.
    """
    if not first.chosen & {'data_dir', 'dataset'}:
        return data_of(content, what, first.chosen)
    run = content.get('args')
    if not isinstance(run, dict) or not first.data_dir or first.chosen & {'split', 'val_fraction'}:
        return {}
    theirs = run.get('data_dir')
    if isinstance(theirs, str) and theirs and os.path.realpath(first.data_dir) == os.path.realpath(theirs):
        return data_of(content, what, first.chosen)
    if run.get('val_fraction') and os.environ.get('RANK', '0') == '0':
        print(
            f'{what} is of a run that held out a share of its own images: where {first.data_dir} has the same ones, '
            + ' '.join(
                f'--{flag} {shlex.quote(shown(str(run.get(name))))}'
                for flag, name in (('split', 'train_split'), ('val-fraction', 'val_fraction'), ('seed', 'seed'))
            )
            + ' evaluates what it was not trained on',
            flush=True,
        )
    return {}


def make_dataset(args: Settings, content: Mapping[str, Any]) -> Any:
    """The data set that the settings name, or what the run of the checkpoint held out of it."""
    dataset = data.make_dataset(args, args.split, False, input_channels(args))
    if not args.val_fraction:
        return dataset
    return data.hold_out(dataset, args.val_fraction, args.seed, held_out_of(content, args, args.checkpoint))[1]


@usual_defaults()
def validate(
    args: Settings,
    process: Process,
    metrics: Mapping[str, Metric] | None = None,
    content: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Evaluate one model, and return timm's result row: top1, top1_err, top5, top5_err, param_count, img_size, ...

    Args:
        content: of the checkpoint, where it has been read.

    Raises:
        UserError: the settings, data or files are wrong.
    """
    content = content or (read_checkpoint(args.checkpoint) if args.checkpoint else {})
    if args.mae:
        return validate_masked(args, process, content)
    history: list[dict[str, Any]] = []
    if args.report:
        require()
        open_folder(args.report)
        history = history_of(content, args.checkpoint)
    dataset = make_dataset(args, content)
    if args.report or args.metrics_avg or not args.real_labels:
        data.check_labelled(dataset)
    labels = read_valid_labels(args.valid_labels) if args.valid_labels else None
    args = args.replace(model=build.current_name(args.model))
    args, dataset, names = _name_classes(args, dataset, labels, content)
    real = read_real_labels(args.real_labels, dataset, names, args.num_classes) if args.real_labels else None
    model, parameters, data_config = _ready_model(args, process, labels, content)
    loader = data.eval_loader(args, process, dataset, data_config)
    task = adopt(ClassificationTask(model, device=process.device, dtype=process.dtype, verbose=False))
    progress = Progress(process.primary, args.log_freq if 'log_freq' in args.chosen else None)
    progress.say(data.describe(dataset, args.split, args))
    if args.validation_batch_size == AUTO:
        args = args.replace(batch_size=fit_batch(task, loader, process, progress))
    speed = Speed(process, len(loader))
    outputs: list[Predicted] = []
    on_all = outputs.append if args.report or real else None
    with catch_signals() as signals, progress:
        watch = Watch(progress, speed, signals)
        result = evaluate(task, loader, process, False, _more_metrics(args, metrics), on_all, watch)
    rate = speed.rate()
    if real:
        result.update(real_accuracy(real, outputs[0][0], outputs[0][2]))
        result = result if data.is_labelled(dataset) else {name: result[name] for name in result if name != 'loss'}
    row: dict[str, Any] = {'model': args.model}
    for name in ('top1', 'top5'):
        row.update({name: round(result[name], 4), f'{name}_err': round(100 - result[name], 4)})
    row.update({name: round(value, 4) for name, value in result.items() if name not in row and name != 'count'})
    row.update(count=result['count'], param_count=round(parameters / 1e6, 2), img_size=data_config['input_size'][-1])
    row.update(crop_pct=data_config['crop_pct'], interpolation=data_config['interpolation'])
    progress.say(f' * Acc@1 {row["top1"]:.3f} ({row["top1_err"]:.3f}) Acc@5 {row["top5"]:.3f} ({row["top5_err"]:.3f})')
    if args.report and process.primary:
        scores = measure(*outputs[0], words(names))
        write_report(args.report, Evaluation(row, facts(args, process, rate), scores, dataset, history))
        progress.say(f'report: {os.path.join(args.report, "report.html")}')
    return row


def validate_masked(args: Settings, process: Process, content: Mapping[str, Any]) -> dict[str, Any]:
    """Evaluate one masked autoencoder, and return its result row: mse, mae, mean_psnr, ..., param_count, img_size.

    Raises:
        UserError: the settings, data or files are wrong.
    """
    require(['torchmetrics'])
    if args.report:
        require()
        open_folder(args.report)
    dataset = make_dataset(args, content)
    args = args.replace(model=build.current_name(args.model))
    model: Any
    model, parameters, data_config = _ready_model(args, process, None, content)
    loader = data.eval_loader(args, process, dataset, data_config)
    task: Any = make_task(args, process, model, data_config)
    progress = Progress(process.primary, args.log_freq if 'log_freq' in args.chosen else None)
    autoencoder, size = task.autoencoder(), data_config['input_size'][1:]
    own = autoencoder.mask_ratio
    ratios = [own]
    if args.report:
        ratios = sorted({own, *_mask_ratios(args, autoencoder.patches_of_mask(size))})
        if left_out := [f'{100 * ratio:g} %' for ratio in args.mask_ratios if ratio not in ratios]:
            progress.say(f'not compared: {", ".join(left_out)} hidden, which leaves no patch visible')
    progress.say(data.describe(dataset, args.split, args))
    if args.validation_batch_size == AUTO:
        compute = functools.partial(reconstruction.scores, task, process)
        with reconstruction.hiding(task, min(ratios)):  # the most visible patches take the most memory
            args = args.replace(batch_size=fit_batch(task, loader, process, progress, compute))
    steps = len(loader) * (len(ratios) + (len(reconstruction.missing_numbers(task)) if args.report else 0))
    with catch_signals() as signals, progress:
        watch = Watch(progress, Speed(process, steps), signals)
        scores = {ratio: reconstruction.measure(task, loader, process, ratio, watch=watch) for ratio in ratios}
        rate = watch.speed.rate()
        row: dict[str, Any] = {'model': args.model, **_rounded(scores[own])}
        row.update(param_count=round(parameters / 1e6, 2), img_size=data_config['input_size'][-1])
        progress.say(
            f' * {autoencoder.describe_mask(size)} hidden: MSE {row["mse"]:.4g}  MAE {row["mae"]:.4g}  mean of PSNR '
            f'{row["mean_psnr"]:.2f} dB  PSNR of mean MSE {row["psnr_of_mean_mse"]:.2f} dB'
        )
        bands = reconstruction.measure_bands(task, loader, process, watch) if args.report else []
    if args.report and process.primary:
        reconstruction.write_report(
            args.report,
            reconstruction.ReconstructionReport(
                row, facts(args, process, rate), [_rounded(scores[ratio]) for ratio in ratios],
                [_rounded(band) for band in bands], reconstruction.galleries(task, loader, process, ratios),
                reconstruction.notes(task),
            ),
        )  # fmt: skip
        progress.say(f'report: {os.path.join(args.report, "report.html")}')
    return row


def _mask_ratios(args: Settings, patches: int) -> list[float]:
    """Those of --mask-ratios that leave one of so many patches visible; of chosen ones each has to."""
    if 'mask_ratios' in args.chosen:
        with explain('--mask-ratios'):
            return [ratio for ratio in args.mask_ratios if num_kept(patches, ratio)]
    return [ratio for ratio in args.mask_ratios if int(patches * (1 - ratio)) >= 1]


def _rounded(row: Mapping[str, float]) -> dict[str, float]:
    """Numbers with six significant digits."""
    return {name: value if isinstance(value, int) else float(f'{value:.6g}') for name, value in row.items()}


def _ready_model(
    args: Settings, process: Process, labels: list[int] | None, content: Mapping[str, Any]
) -> tuple[torch.nn.Module, int, dict[str, Any]]:
    """The model with its weights on its device, the number of its parameters, and its data settings."""
    model: Any = build.make_model(args.replace(pretrained=False) if args.checkpoint else args)
    if args.checkpoint:
        with explain(f'checkpoint {args.checkpoint}'):
            load_content(model, content, args.use_ema, f'checkpoint {args.checkpoint}')
    elif not args.mae and model.pretrained_cfg.get('num_classes') == 0:
        raise UserError(
            f'the weights of {args.model} are an encoder without a classifier, which has no accuracy: fine-tune it '
            'first (train.py --pretrained)'
        )
    if labels is not None:
        with explain(f'--valid-labels {args.valid_labels}'):
            if not 0 <= min(labels) <= max(labels) < model.num_classes:
                raise ValueError(f'the model has classes 0 to {model.num_classes - 1}')
    if args.reparam:
        model = reparameterize_model(model)
    data_config = build.resolve_images(model, vars(args), use_test_size=not args.use_train_size)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if args.test_pool:
        if not model.default_cfg.get('pool_size'):
            raise UserError(
                f'--test-pool averages over a map of features, and {args.model} is a token model without one: leave it '
                'out; --img-size evaluates at another size'
            )
        model, pooled = apply_test_time_pool(model, data_config)
        data_config['crop_pct'] = 1.0 if pooled else data_config['crop_pct']
    model = build.place_model(args, process, model, data_config['input_size'], not args.mae)
    if labels is not None:
        model = torch.nn.Sequential(model, _Select(labels))
    if args.torchcompile:
        build.try_compiler(args, process)
        with explain('--torchcompile'):
            model = torch.compile(model, backend=args.torchcompile, mode=args.torchcompile_mode)
    return model, parameters, data_config


def _name_classes(
    args: Settings, dataset: Any, labels: list[int] | None, content: Mapping[str, Any]
) -> tuple[Settings, Any, list[str]]:
    """The settings with the number of classes, the data set with the model's class numbers, and the classes' names.

    Names that a checkpoint or published weights know are the model's, and numbers follow from them; a --class-map says
    the numbers of other names. Published weights keep their head, whatever classes the data has.
    """
    where, here = args.checkpoint or args.model, data.class_names(dataset)
    known, count = class_names_in(content, args.checkpoint), 0
    if args.pretrained and not args.checkpoint:
        count, known, imagenet = build.published_classes(args.model)
        if count and args.num_classes not in (None, count):
            raise UserError(
                f'the weights of {where} have {count} classes, and a head of --num-classes {args.num_classes} has '
                'learned nothing: leave that out'
            )
        if imagenet and not all(is_wordnet_id(name) for name in here):
            known = []  # data with other names for the same classes
    if labels is not None and (known or count):
        with explain(f'--valid-labels {args.valid_labels}'):
            if not 0 <= min(labels) <= max(labels) < (len(known) or count):
                raise ValueError(f'the model has classes 0 to {(len(known) or count) - 1}')
            known = [known[label] for label in labels] if known else []
    dataset, by_name = _by_name(dataset, known, args, where)
    if labels is None and count:
        args = args.replace(num_classes=count)
        if not by_name and (len(here) > count or len(here) not in (0, count) and 'class_map' not in args.chosen):
            raise UserError(
                f'{where} has {count} classes, and split {args.split!r} of the data has {len(here)}, without names '
                'that tell which of them: say it with --valid-labels or --class-map'
            )
    elif labels is not None and not by_name and len(here) not in (0, len(labels)):
        raise UserError(
            f'--valid-labels {args.valid_labels} names {len(labels)} classes, and split {args.split!r} of the data has '
            f'{len(here)}: it takes a line for each'
        )
    elif labels is None:
        args = match_classes(args.replace(num_classes=args.num_classes or len(known) or None), dataset, args.split)
    names = known or data.class_names(dataset)
    names = names if labels is None or len(names) <= max([len(labels), *labels]) else [names[label] for label in labels]
    return args, dataset, names


def _by_name(dataset: Any, known: list[str], args: Settings, where: str) -> tuple[Any, bool]:
    """The data set with the numbers of classes in `known`, and whether its names say them, not its --class-map."""
    names = data.class_names(dataset)
    if not names or not known:
        return dataset, False
    numbers = {name: number for number, name in enumerate(known)}
    if 'class_map' not in args.chosen or set(names) <= set(numbers):
        return data.renumbered(dataset, known, f'split {args.split!r}', where), True
    for number, name in enumerate(names):
        if numbers.get(name, number) != number:
            raise UserError(
                f'--class-map {args.class_map} gives the class {name!r} the number {number}, and in {where} it is '
                f'{numbers[name]}'
            )
    return dataset, False


class _Select(torch.nn.Module):
    """Keeps the logits of some classes."""

    def __init__(self, labels: list[int]):
        super().__init__()
        self.labels = labels

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return logits[:, self.labels]


def _more_metrics(args: Settings, metrics: Mapping[str, Metric] | None) -> dict[str, Metric]:
    """The caller's metrics and --metrics-avg's."""
    more = dict(metrics or {})
    if args.metrics_avg:
        with explain('--metrics-avg needs `pip install scikit-learn`'):
            from sklearn.metrics import precision_recall_fscore_support
        for place, name in enumerate(('precision', 'recall', 'f1_score')):

            def metric(logits, targets, place=place):
                scores = precision_recall_fscore_support(
                    targets, best_classes(logits)[:, 0], average=args.metrics_avg, zero_division=0
                )
                return 100 * scores[place]

            more[f'{args.metrics_avg}_{name}'] = metric
    return more


def validate_with_retry(args: Settings, process: Process, content: Mapping[str, Any]) -> dict[str, Any]:
    """`validate`, with half the batch as long as --retry is given and memory runs out."""
    while True:
        try:
            return validate(args, process, content=content)
        except Exception as error:
            auto = args.validation_batch_size == AUTO
            size, smaller = (AUTO, USUAL_BATCH) if auto else (args.batch_size, decay_batch_step(args.batch_size))
            if not args.retry or not out_of_memory(error) or smaller < 1:
                raise
            print(f'batch size {size} does not fit ({sentence(error)}); trying {smaller}', flush=True)
            args = args.replace(batch_size=smaller, validation_batch_size=None)


def candidates(args: Settings) -> list[dict[str, Any]]:
    """What to evaluate: a folder of checkpoints, a file with model names, a pattern, or the one model."""
    if args.checkpoint and os.path.isdir(args.checkpoint):
        folder = glob.escape(args.checkpoint)
        files = [file for ending in ENDINGS for file in glob.glob(f'{folder}/*{ending}')]
        return [dict(checkpoint=file) for file in sorted(files, key=natural_key)]
    if os.path.isfile(args.model):
        with open(args.model, encoding='utf-8-sig') as file:
            return [dict(model=line.strip()) for line in file if line.strip()]
    if not args.checkpoint and (args.model == 'all' or '*' in args.model):
        pattern = '' if args.model == 'all' else args.model
        return [dict(model=name) for name in timm.list_models(pattern, pretrained=True)]
    return [{}]


def report_folders(choices: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each candidate's folder in that of --report, each another one; '' for the only one."""
    if len(choices) == 1:
        return ['']
    names: list[str] = []
    for choice in choices:
        file = os.path.basename(choice.get('checkpoint', ''))
        ending = next((ending for ending in ENDINGS if file.endswith(ending)), '')
        name = file.removesuffix(ending) or safe_model_name(choice['model'])
        again = (f'{name}-{number}' for number in itertools.count(2))
        names.append(name if name not in names else next(other for other in again if other not in names))
    return names


def _evaluate_choice(
    args: Settings, process: Process, choice: Mapping[str, Any], folder: str, content: Mapping[str, Any],
    argv: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """The result row of one of the candidates.

    Args:
        folder: its name in the folder of --report.
        content: of the one checkpoint that `args` name.
        argv: the command line, which each checkpoint of a folder completes for itself.
    """
    if 'checkpoint' in choice:
        args, content = read_args([*argv, '--checkpoint', choice['checkpoint']])
        process = in_precision(process, args)
    report = args.report and os.path.join(args.report, folder) if folder else args.report
    row = validate_with_retry(args.replace(**choice, report=report), process, content)
    return {**row, **({'checkpoint': choice['checkpoint']} if 'checkpoint' in choice else {})}


def write_results(path: str, rows: list[dict[str, Any]], kind: str) -> None:
    """Write result rows as CSV or JSON."""
    text = to_json(rows if len(rows) != 1 else rows[0], indent=4) if kind == 'json' else table(rows)
    write_atomically(path, text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status. The results are also printed as JSON after `--result`."""

    def body(arguments: Sequence[str]) -> None:
        args, content = read_args(arguments)
        process = start_process(args)
        try:
            choices = candidates(args)
            if not choices and os.path.isdir(args.checkpoint):
                raise UserError(f'there is no checkpoint in {args.checkpoint}')
            if not choices:
                raise UserError(f'nothing matches --model {args.model!r} --checkpoint {args.checkpoint!r}')
            rows, failures = [], []
            for choice, folder in zip(choices, report_folders(choices)):
                try:
                    rows.append(_evaluate_choice(args, process, choice, folder, content, arguments))
                except Preempted:
                    raise
                except UserError as error:  # the others may do; those done are not lost
                    if len(choices) == 1:
                        raise
                    failures.append(f'{choice.get("checkpoint") or choice.get("model")}: {error}')
                    if process.primary:
                        print(failures[-1], flush=True)
                rows.sort(key=lambda row: max(-math.inf, row.get('top1', -row.get('mse', 0))), reverse=True)  # NaN last
                if rows and process.primary and args.results_file:
                    write_results(args.results_file, rows, results_format(args))
            if rows and process.primary:
                print(f'--result\n{to_json(rows if len(choices) > 1 else rows[0], indent=4)}', end='')
            if failures:
                raise UserError(f'{len(failures)} of {len(choices)} failed')
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()

    return run(body, PROGRAM, argv)
