"""What masked pretraining brings on CIFAR-10, at equal budgets: the runs behind docs/masked-autoencoding.md.

    python -m benchmarks.masked_autoencoding STAGE --data-dir CIFAR10 [--model vim_tiny_patch4_32] [--seed 0] [--jobs 1]

`CIFAR10` is a folder of images, train/CLASS/*.png and validation/CLASS/*.png. Stages use the files of those before:

    pretrain   the encoder, --epochs-pretrain without labels, and its report
    finetune   --epochs-finetune from it and from scratch, and from scratch for as long as both took together
    few        the same with a tenth of the labels, --epochs-few
    probe      a linear classifier on its features and on random ones, --epochs-probe
    ablate     pretraining of --epochs-ablate and tuning of half as many, with mask ratios, patch sizes, orders of
               tokens, decays, decoders; --cases names some
    bands      mae_favit on 13 bands made from the images, and its report with missing bands

Every command is printed, and its seconds. The last lines are a table in Markdown: a row a run, top-1 after the last
epoch, which nobody chose, and seconds of the log, those of the process's start left out. `--jobs N` runs N commands
side by side, dealt to the GPUs there are; what later budgets depend on runs alone: the pretraining and the fine-tuning
from it, whose step is that of training from scratch. A run that fails is named, and what does not need it goes on; the
exit status is 1 then. Finished runs are not repeated; a folder with the result of another command line ends the
program. Options after `--` go to every training.
"""

import argparse
import contextlib
import itertools
import json
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

TENTH = 'tenth'
# name of an ablation -> options of its pretraining, and of both
ABLATIONS = {
    'ratio 0.5': (['--mask-ratio', '0.5'], []),
    'ratio 0.6': ([], []),
    'ratio 0.75': (['--mask-ratio', '0.75'], []),
    'decoder depth 1': (['--decoder-depth', '1'], []),
    'decoder depth 8': (['--decoder-depth', '8'], []),
    'decoder of Vim blocks': (['--decoder', 'vim'], []),
    'decoder of Vision Mamba 2 blocks': (['--decoder', 'vim2'], []),
    'patch 2, ratio 0.6': ([], ['--model-kwargs', 'patch_size=2']),
    'patch 2, ratio 0.75': (['--mask-ratio', '0.75'], ['--model-kwargs', 'patch_size=2']),
}
# of the models that have it
OF_FAMILY = {
    'vim': {'shuffled tokens': (['--model-kwargs', 'random_token_order=True'], [])},
    'vim2': {'decay over gaps': (['--model-kwargs', 'gap_decay=True'], [])},
}

BANDS = """--model mae_favit_small_patch16_224 --img-size 32 --model-kwargs patch_size=4 --dataset arrays
--channel-drop 0.25 --batch-size 128 --epochs 40 --warmup-epochs 4 --opt adamw --lr 5e-4 --weight-decay 0.05
--opt-betas 0.9 0.95 --clip-grad 1 --sched-on-updates --amp --amp-dtype bfloat16 --scale 0.5 1 --val-interval 10
--checkpoint-hist 1 --workers 12"""


class Runs:
    """Training runs in a folder, each a process, and what they came to."""

    def __init__(self, args: argparse.Namespace, more: list[str]):
        self.args, self.more, self.pool = args, more, ThreadPoolExecutor(args.jobs)
        self.failed = False
        numbers = os.environ.get('CUDA_VISIBLE_DEVICES') or ','.join(map(str, range(torch.cuda.device_count()))) or '0'
        self.devices = itertools.cycle(numbers.split(','))

    def path(self, name: str) -> Path:
        """Folder of a run of this model and seed."""
        return self.args.output / f'{self.args.model}-seed{self.args.seed}-{name.replace(" ", "-").replace(",", "")}'

    def encoder(self, name: str) -> list[str]:
        """Options that start from the encoder of a pretraining."""
        return ['--pretrained', '--pretrained-path', str(self.path(name) / 'last.pth.tar')]

    def start(self, *words: str, data: Path | None = None):
        """`train` in the background; the result says whether that succeeded."""
        return self.pool.submit(self.train, *words, data=data)

    def train(self, name: str, recipe: str, *options: str, data: Path | None = None) -> bool:
        """Train by a recipe unless that was done, and say whether it succeeded."""
        words = ['train.py', '--recipe', recipe, '--dataset', '', '--data-dir', str(data or self.args.data_dir)]
        words += ['--model', self.args.model, *options, '--seed', str(self.args.seed), *self.more]
        return self.run(words, self.path(name))

    def run(self, words: list[str], folder: Path) -> bool:
        """Run a command line unless its folder has its result, and say whether there is one."""
        done, line = folder / 'done.txt', shlex.join(['python', *words])
        if done.exists():
            if done.read_text(encoding='utf-8').splitlines()[:1] != [line]:
                sys.exit(f'{folder} has the result of another command line: name another --output, or remove it')
            return True
        device = next(self.devices)
        print(line, flush=True)
        command = [sys.executable, *words, '--output', str(folder.parent), '--experiment', folder.name, '--overwrite']
        start = time.perf_counter()
        environment = {**os.environ, 'CUDA_VISIBLE_DEVICES': device}
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.parent / f'{folder.name}.log', 'w', encoding='utf-8') as log:
            status = subprocess.run(command, stdout=log, stderr=log, env=environment).returncode
        seconds = time.perf_counter() - start
        if status:
            self.failed = True
            print(f'{folder.name}: failed after {seconds:.0f} s, see {log.name}', flush=True)
            return False
        done.write_text(f'{line}\n{seconds:.1f} s with the start\n', encoding='utf-8')
        print(f'{folder.name}: {seconds:.0f} s', flush=True)
        return True

    def row(self, name: str) -> dict:
        """The last row of a run's log."""
        return json.loads((self.path(name) / 'summary.json').read_text())[-1]

    def table(self, names: list[str]) -> None:
        """Print the runs as Markdown."""
        print('\n| run | epochs | seconds | top-1 | loss |\n|---|---|---|---|---|')
        for name in names:
            if not (self.path(name) / 'done.txt').exists():
                continue
            row = self.row(name)
            top1 = f'{row["eval_top1"]:.2f}' if 'eval_top1' in row else ''
            loss = 'not finite' if row['eval_loss'] is None else f'{row["eval_loss"]:.4f}'  # JSON has null for it
            print(f'| {name} | {row["epoch"] + 1} | {row["time"]:.0f} | {top1} | {loss} |')


def length(epochs: int) -> list[str]:
    """Options of so many epochs, a tenth of them warm-up."""
    return ['--epochs', str(epochs), '--warmup-epochs', str(max(1, round(epochs / 10)))]


def pretrain(runs: Runs) -> list[str]:
    options = [*length(runs.args.epochs_pretrain), '--gallery-interval', '20']
    if runs.start('mae', 'cifar10_tiny_mae', *options).result():
        report(runs, 'mae')
    return ['mae']


def report(runs: Runs, name: str) -> None:
    """Write the report of a masked autoencoder into its folder."""
    folder = runs.path(name)
    words = ['validate.py', '--mae', '--checkpoint', str(folder / 'last.pth.tar'), '--report', str(folder / 'report')]
    print(shlex.join(['python', *words]), flush=True)
    if subprocess.run([sys.executable, *words]).returncode:
        runs.failed = True
        print(f'{folder.name}: no report', flush=True)


def finetune(runs: Runs) -> list[str]:
    names, epochs = ['from mae', 'from scratch', 'from scratch, total budget'], runs.args.epochs_finetune
    recipe = 'cifar10_tiny_finetune'
    budgets = {names[1]: epochs}
    if runs.start(names[0], recipe, *length(epochs), *runs.encoder('mae')).result():
        share = runs.row('mae')['time'] / runs.row(names[0])['time']
        budgets = {names[2]: round(epochs * (1 + share)), **budgets}  # the longer one first
    started = [runs.start(name, recipe, *length(budget), '--layer-decay', '1') for name, budget in budgets.items()]
    for run in started:
        run.result()
    return names


def few(runs: Runs) -> list[str]:
    names, data = ['few labels, from mae', 'few labels, from scratch'], tenth(runs)
    settings = ['cifar10_tiny_finetune', *length(runs.args.epochs_few), '--batch-size', '256', '--lr', '1e-3']
    started = [
        runs.start(names[0], *settings, *runs.encoder('mae'), data=data),
        runs.start(names[1], *settings, '--layer-decay', '1', data=data),
    ]
    for run in started:
        run.result()
    return names


def tenth(runs: Runs) -> Path:
    """A folder with a tenth of the training images of each class, and all others, as links."""
    target = runs.args.output / TENTH
    for split, step in (('train', 10), ('validation', 1)):
        for source in sorted((runs.args.data_dir / split).iterdir()):
            folder = target / split / source.name
            folder.mkdir(parents=True, exist_ok=True)
            for file in sorted(source.iterdir())[::step]:
                with contextlib.suppress(FileExistsError):  # of an earlier run, or of another at the same time
                    (folder / file.name).symlink_to(file.resolve())
    return target


def probe(runs: Runs) -> list[str]:
    names = ['probe of mae', 'probe of random features']
    settings = ['cifar10_tiny_probe', *length(runs.args.epochs_probe)]
    for run in [runs.start(names[0], *settings, *runs.encoder('mae')), runs.start(names[1], *settings)]:
        run.result()
    return names


def ablate(runs: Runs) -> list[str]:
    cases = {**ABLATIONS, **OF_FAMILY.get(runs.args.model.split('_')[0], {})}
    if absent := set(runs.args.cases or ()) - cases.keys():
        sys.exit(f'{runs.args.model} has no {", no ".join(sorted(absent))}')
    cases = {name: case for name, case in cases.items() if not runs.args.cases or name in runs.args.cases}
    short, tuning = length(runs.args.epochs_ablate), length(runs.args.epochs_ablate // 2)

    def tuned(name: str) -> None:
        own, both = cases[name]
        if runs.train(f'mae, {name}', 'cifar10_tiny_mae', *short, *own, *both):
            encoder = runs.encoder(f'mae, {name}')
            runs.train(f'tuned, {name}', 'cifar10_tiny_finetune', *tuning, *both, *encoder)

    baselines = [case for case in ('ratio 0.6', 'patch 2, ratio 0.6') if case in cases]
    started = [runs.pool.submit(tuned, name) for name in cases]
    for name in baselines:
        both = cases[name][1]
        started.append(runs.start(f'scratch, {name}', 'cifar10_tiny_finetune', *tuning, '--layer-decay', '1', *both))
    for run in started:
        run.result()
    return [*(f'tuned, {name}' for name in cases), *(f'scratch, {name}' for name in baselines)]


def bands(runs: Runs) -> list[str]:
    folder = runs.args.output / 'bands'
    if not folder.exists():
        subprocess.run([sys.executable, '-m', 'benchmarks.bands', str(runs.args.data_dir), str(folder)], check=True)
    words = ['train.py', '--data-dir', str(folder), *BANDS.split(), '--seed', str(runs.args.seed), *runs.more]
    runs.args.model = 'favit'
    if runs.run(words, runs.path('mae')):
        report(runs, 'mae')
    return ['mae']


STAGES = {stage.__name__: stage for stage in (pretrain, finetune, few, probe, ablate, bands)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('stage', choices=STAGES)
    parser.add_argument('--data-dir', type=Path, required=True)
    parser.add_argument('--output', type=Path, default=Path('output/mae'))
    parser.add_argument('--model', default='vim_tiny_patch4_32')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--jobs', type=int, default=1)
    for stage, epochs in (('pretrain', 60), ('finetune', 30), ('few', 150), ('probe', 20), ('ablate', 30)):
        parser.add_argument(f'--epochs-{stage}', type=int, default=epochs)
    parser.add_argument('--cases', nargs='+', choices=[*ABLATIONS, *(c for own in OF_FAMILY.values() for c in own)])
    words = sys.argv[1:]
    split = words.index('--') if '--' in words else len(words)
    runs = Runs(parser.parse_args(words[:split]), words[split + 1 :])
    runs.table(STAGES[runs.args.stage](runs))
    sys.exit(int(runs.failed))


if __name__ == '__main__':
    main()
