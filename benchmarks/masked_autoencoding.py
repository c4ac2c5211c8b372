"""What masked pretraining brings on CIFAR-10, at equal budgets: the runs behind docs/masked-autoencoding.md.

    python -m benchmarks.masked_autoencoding STAGE --data-dir CIFAR10 [--model vim_tiny_patch4_32] [--seed 0] [--jobs 1]

`CIFAR10` is a folder of images, train/CLASS/*.png and validation/CLASS/*.png. Stages use the files of those before:

    pretrain   the encoder, 60 epochs without labels, and its report
    finetune   30 epochs from it and from scratch, and from scratch for as long as both took together
    few        the same with a tenth of the labels, 150 epochs
    probe      a linear classifier on its features and on random ones, 20 epochs
    ablate     short pretraining (30 epochs) and tuning (15) with mask ratios, patch sizes, orders of tokens, decoders
    bands      mae_favit on 13 bands made from the images, and its report with missing bands

Every command is printed, and its seconds. The last lines are a table in Markdown: a row a run, top-1 after the last
epoch, which nobody chose. `--jobs N` runs N commands side by side, dealt to the GPUs there are. Finished runs are not
repeated. Options after `--` go to every training.
"""

import argparse
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
PRETRAIN, FINETUNE, FEW, PROBE = 60, 30, 150, 20
# name of an ablation -> options of its pretraining, and of both
ABLATIONS = {
    'ratio 0.5': (['--mask-ratio', '0.5'], []),
    'ratio 0.6': ([], []),
    'ratio 0.75': (['--mask-ratio', '0.75'], []),
    'patch 2, ratio 0.6': ([], ['--model-kwargs', 'patch_size=2']),
    'patch 2, ratio 0.75': (['--mask-ratio', '0.75'], ['--model-kwargs', 'patch_size=2']),
    'decoder depth 1': (['--decoder-depth', '1'], []),
    'decoder depth 8': (['--decoder-depth', '8'], []),
    'decoder of Vim blocks': (['--decoder', 'vim'], []),
    'decoder of Vision Mamba 2 blocks': (['--decoder', 'vim2'], []),
}
SHUFFLED = {'shuffled tokens': (['--model-kwargs', 'random_token_order=True'], [])}  # of the models that have it

BANDS = """--model mae_favit_small_patch16_224 --img-size 32 --model-kwargs patch_size=4 --dataset arrays
--channel-drop 0.25 --batch-size 128 --epochs 40 --warmup-epochs 4 --opt adamw --lr 5e-4 --weight-decay 0.05
--opt-betas 0.9 0.95 --clip-grad 1 --sched-on-updates --amp --amp-dtype bfloat16 --scale 0.5 1 --val-interval 10
--checkpoint-hist 1 --workers 12"""


class Runs:
    """Training runs in a folder, each a process, and what they came to."""

    def __init__(self, args: argparse.Namespace, more: list[str]):
        self.args, self.more, self.pool = args, more, ThreadPoolExecutor(args.jobs)
        numbers = os.environ.get('CUDA_VISIBLE_DEVICES') or ','.join(map(str, range(torch.cuda.device_count()))) or '0'
        self.devices = itertools.cycle(numbers.split(','))

    def path(self, name: str) -> Path:
        """Folder of a run of this model and seed."""
        return self.args.output / f'{self.args.model}-seed{self.args.seed}-{name.replace(" ", "-").replace(",", "")}'

    def encoder(self, name: str) -> list[str]:
        """Options that start from the encoder of a pretraining."""
        return ['--pretrained', '--pretrained-path', str(self.path(name) / 'last.pth.tar')]

    def start(self, name: str, recipe: str, *options: str, data: Path | None = None, autoencoder: bool = False):
        """Train in the background; the result is the run's seconds."""
        model = f'{"mae_" if autoencoder else ""}{self.args.model}'
        words = ['train.py', '--recipe', recipe, '--dataset', '', '--data-dir', str(data or self.args.data_dir)]
        words += ['--model', model, *options, '--seed', str(self.args.seed), *self.more]
        return self.pool.submit(self.run, words, self.path(name))

    def run(self, words: list[str], folder: Path) -> float:
        """Run a command line unless its folder has a result."""
        done = folder / 'seconds.txt'
        if not done.exists():
            device = next(self.devices)
            print(shlex.join(['python', *words]), flush=True)
            command = [sys.executable, *words, '--output', str(folder.parent), '--experiment', folder.name]
            start = time.perf_counter()
            environment = {**os.environ, 'CUDA_VISIBLE_DEVICES': device}
            log = subprocess.run([*command, '--overwrite'], capture_output=True, text=True, env=environment)
            seconds = time.perf_counter() - start
            folder.mkdir(parents=True, exist_ok=True)
            (folder / 'log.txt').write_text(log.stdout + log.stderr)
            if log.returncode:
                raise SystemExit(f'{folder.name}: {log.stderr[-2000:]}')
            done.write_text(f'{seconds:.1f}')
            print(f'{folder.name}: {seconds:.0f} s', flush=True)
        return float(done.read_text())

    def row(self, name: str) -> dict:
        """The last row of a run's log."""
        return json.loads((self.path(name) / 'summary.json').read_text())[-1]

    def table(self, names: list[str]) -> None:
        """Print the runs as Markdown."""
        print('\n| run | epochs | seconds | top-1 | loss |\n|---|---|---|---|---|')
        for name in names:
            row = self.row(name)
            top1 = f'{row["eval_top1"]:.2f}' if 'eval_top1' in row else ''
            seconds = (self.path(name) / 'seconds.txt').read_text()
            print(f'| {name} | {row["epoch"] + 1} | {float(seconds):.0f} | {top1} | {row["eval_loss"]:.4f} |')


def pretrain(runs: Runs) -> list[str]:
    runs.start(
        'mae', 'cifar10_tiny_mae', '--epochs', str(PRETRAIN), '--gallery-interval', '20', autoencoder=True
    ).result()
    report(runs, 'mae')
    return ['mae']


def report(runs: Runs, name: str) -> None:
    """Write the report of a masked autoencoder into its folder."""
    folder = runs.path(name)
    words = ['validate.py', '--mae', '--checkpoint', str(folder / 'last.pth.tar'), '--report', str(folder / 'report')]
    print(shlex.join(['python', *words]), flush=True)
    subprocess.run([sys.executable, *words], check=True)


def finetune(runs: Runs, few: bool = False) -> list[str]:
    label, epochs = ('few labels, ', FEW) if few else ('', FINETUNE)
    data = tenth(runs) if few else None
    settings = ['cifar10_tiny_finetune', '--epochs', str(epochs)]
    if few:
        settings += ['--batch-size', '256', '--lr', '1e-3']
    names = [f'{label}{kind}' for kind in ('from mae', 'from scratch', 'from scratch, total budget')]
    tuned = runs.start(names[0], *settings, *runs.encoder('mae'), data=data)
    scratch = runs.start(names[1], *settings, '--layer-decay', '1', data=data)
    both = float((runs.path('mae') / 'seconds.txt').read_text()) + tuned.result()
    if few:
        scratch.result()
        return names[:2]
    settings[2] = str(round(epochs * both / scratch.result()))
    runs.start(names[2], *settings, '--layer-decay', '1', data=data).result()
    return names


def tenth(runs: Runs) -> Path:
    """A folder with a tenth of the training images of each class, and all others, as links."""
    target = runs.args.output / TENTH
    for split, step in (('train', 10), ('validation', 1)):
        for source in sorted((runs.args.data_dir / split).iterdir()):
            folder = target / split / source.name
            folder.mkdir(parents=True, exist_ok=True)
            for file in sorted(source.iterdir())[::step]:
                link = folder / file.name
                if not link.exists():
                    link.symlink_to(file.resolve())
    return target


def probe(runs: Runs) -> list[str]:
    names = ['probe of mae', 'probe of random features']
    settings = ['cifar10_tiny_probe', '--epochs', str(PROBE)]
    for run in [runs.start(names[0], *settings, *runs.encoder('mae')), runs.start(names[1], *settings)]:
        run.result()
    return names


def ablate(runs: Runs) -> list[str]:
    cases = {**ABLATIONS, **(SHUFFLED if runs.args.model.startswith('vim_') else {})}
    short = ['--epochs', '30', '--warmup-epochs', '3']
    pretraining = {
        name: runs.start(f'mae, {name}', 'cifar10_tiny_mae', *short, *own, *both, autoencoder=True)
        for name, (own, both) in cases.items()
    }
    names, tuning = [f'scratch, {case}' for case in ('ratio 0.6', 'patch 2, ratio 0.6')], []
    settings = ['cifar10_tiny_finetune', '--epochs', '15', '--warmup-epochs', '2']
    for name, (_, both) in cases.items():
        pretraining[name].result()
        names.append(f'tuned, {name}')
        tuning.append(runs.start(names[-1], *settings, *both, *runs.encoder(f'mae, {name}')))
    for name in names[:2]:
        both = cases[name.removeprefix('scratch, ')][1]
        tuning.append(runs.start(name, *settings, '--layer-decay', '1', *both))
    for run in tuning:
        run.result()
    return names


def bands(runs: Runs) -> list[str]:
    folder = runs.args.output / 'bands'
    if not folder.exists():
        subprocess.run([sys.executable, '-m', 'benchmarks.bands', str(runs.args.data_dir), str(folder)], check=True)
    words = ['train.py', '--data-dir', str(folder), *BANDS.split(), '--seed', str(runs.args.seed), *runs.more]
    runs.args.model = 'favit'
    runs.run(words, runs.path('mae'))
    report(runs, 'mae')
    return ['mae']


STAGES = {
    'pretrain': pretrain, 'finetune': finetune, 'few': lambda runs: finetune(runs, few=True), 'probe': probe,
    'ablate': ablate, 'bands': bands,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('stage', choices=STAGES)
    parser.add_argument('--data-dir', type=Path, required=True)
    parser.add_argument('--output', type=Path, default=Path('output/mae'))
    parser.add_argument('--model', default='vim_tiny_patch4_32')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--jobs', type=int, default=1)
    words = sys.argv[1:]
    split = words.index('--') if '--' in words else len(words)
    runs = Runs(parser.parse_args(words[:split]), words[split + 1 :])
    runs.table(STAGES[runs.args.stage](runs))


if __name__ == '__main__':
    main()
