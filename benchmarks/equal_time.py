"""What learns most in the same time on CIFAR-10: choices inside `vim2_tiny_patch4_32`, or models beside each other.

    python -m benchmarks.equal_time --data-dir CIFAR10 [--budget 12] [--seeds 0 1 2] [--jobs 3] [--limit SECONDS]
    python -m benchmarks.equal_time --data-dir CIFAR10 --models

`CIFAR10` is a folder of images, train/CLASS/*.jpg and validation/CLASS/*.jpg. A process for each variant trains with
`vim_timm.train` in four stages:

    1. some processes at a time train an epoch of half the images: kernels are compiled, steps recorded
    2. one after the other, alone on the device, each trains another, which tells the variant's images a second
    3. --budget seconds at that rate are so many passes over the training images, fixed before any result is known; a
       variant that has not time for one is named and left out
    4. a training of so many passes for each seed, --jobs side by side: that changes its seconds, not its steps

All variants with the first seed come first. No training begins that would end after --limit seconds of this program.
Every training appends a line to equal_time.jsonl in --output; failed variants are named and left out. The last lines
are a table in Markdown: top-1 of the last step, which nobody chose, mean and standard deviation over seeds. Where a
variant failed the exit status is 1.

Batch 512, AdamW 2e-3, weight decay 0.05, cosine with a tenth of warm-up, crop and flip, mixup 0.2, smoothing 0.1,
clipping at 1, bfloat16, on a GPU `--cuda-graph`. Variants whose mixer no fused kernel computes (norms, rotary
positions, 1-d convolution, own B and C of each order) are timed as they run.
"""

import argparse
import concurrent.futures
import contextlib
import gc
import json
import os
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# name -> arguments of vim2_tiny_patch4_32; the defaults are alternating orders, 32 states, 12 mixers as wide as the
# tokens with a SwiGLU of four times their width each
ARGUMENTS = {
    'as registered': '',
    'both orders': 'orders=both',
    'one order: rows': 'orders=row',
    '64 states': 'd_state=64',
    '128 states': 'd_state=128',
    'heads of 32': 'headdim=32',
    'expand 2, SwiGLU 2.5, 64 states': 'expand=2 mlp_ratio=2.5 d_state=64',
    'expand 1.5, SwiGLU 3, heads of 32': 'expand=1.5 mlp_ratio=3 headdim=32',
    'convolutional stem': 'stem=conv',
    'B and C normed': 'bc_norm=True',
    'B and C rotary': 'rope=True',
    'B and C normed and rotary': 'bc_norm=True rope=True',
    '24 mixers, no SwiGLU': 'depth=24 expand=2 mlp_ratio=0',
    '1-d convolution of width 7': 'conv=1d',
}
# no choices of the model, see `own_projections`
OWN = {
    'both orders, own B and C of each': '--model vim2_tiny_patch4_32_own',
    'both orders, no fused kernel': '--model vim2_tiny_patch4_32_shared',
}
# name -> options of the training
MODELS = {
    'vim_tiny_patch4_32': '--model vim_tiny_patch4_32',
    'vim2_tiny_patch4_32': '--model vim2_tiny_patch4_32',
    'vim_hybrid_tiny_patch4_32': '--model vim_hybrid_tiny_patch4_32',
    'deit_tiny_patch16_224, patch 4': '--model deit_tiny_patch16_224 --img-size 32 --model-kwargs patch_size=4',
    'efficientvim_m1': '--model efficientvim_m1 --img-size 32',
}
VARIANTS = {
    **{
        name: '--model vim2_tiny_patch4_32' + (f' --model-kwargs {words}' if words else '')
        for name, words in ARGUMENTS.items()
    },
    **OWN,
    **MODELS,
}
SPLITS = ('train', 'validation')
RECIPE = """--dataset= --data-in-memory --num-classes 10 --opt adamw --lr 2e-3 --weight-decay 0.05 --clip-grad 1
--sched cosine --sched-on-updates --warmup-epochs 0 --warmup-lr 1e-6 --min-lr 0 --scale 0.6 1 --ratio 0.85 1.18
--color-jitter 0 --mixup 0.2 --smoothing 0.1 --amp --amp-dtype bfloat16 --val-interval 1000 --checkpoint-hist 1
--validation-batch-size 1000 --overwrite"""
AT_ONCE = 6  # processes that start together: their first steps take memory for plain and for recorded ones
START, TURN, RESERVE = 90.0, 30.0, 2.0  # seconds: most for a start and for a measurement; kept before the limit


def in_files(name: str) -> str:
    """A variant's name as files have it."""
    return name.replace(' ', '-').replace(':', '').replace(',', '')


def decode(files: list[Path]) -> np.ndarray:
    """Images (N, H, W, 3) of files."""
    return np.stack([np.asarray(Image.open(file).convert('RGB')) for file in files])


def keep_images(data: Path, output: Path) -> None:
    """Decode both splits once, for all processes, to SPLIT.npz in `output`."""
    with concurrent.futures.ProcessPoolExecutor() as pool:
        for split in SPLITS:
            classes = sorted(folder.name for folder in (data / split).iterdir() if folder.is_dir())
            files = [sorted((data / split / name).iterdir()) for name in classes]
            images = np.concatenate(list(pool.map(decode, files)))
            targets = np.repeat(np.arange(len(classes)), [len(part) for part in files])
            np.savez(output / f'{split}.npz', images=images, targets=targets, classes=classes)


class Kept:
    """The images of a split that `keep_images` wrote, as `Hooks.dataset` wants them."""

    image_mode = 'RGB'

    def __init__(self, file: Path, every: int = 1):
        with np.load(file) as content:
            self.images, self.targets = content['images'][::every], content['targets'][::every].tolist()
            self.classes = content['classes'].tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), self.targets[index]


# The process of a variant


class Trainings:
    """Trainings of one variant in this process."""

    def __init__(self, options: argparse.Namespace, name: str):
        self.options, self.words = options, VARIANTS[name].split()
        self.folder = options.output / 'runs' / in_files(name)
        self.graph = options.device == 'cuda'

    def images(self, every: int = 1) -> dict[str, Kept]:
        """Every so many-th image of both splits."""
        return {split: Kept(self.options.output / f'{split}.npz', every) for split in SPLITS}

    def train(
        self, data: dict[str, Kept], seed: int, epochs: int, passes: float, warmup: float, callback: Any = None
    ) -> tuple[dict[str, Any], float]:
        """Train: the last row of the log, and millions of parameters.

        Args:
            passes: over the images in each epoch.
            warmup: in epochs.
        """
        from vim_timm import train
        from vim_timm.engine import Hooks

        words = [*RECIPE.split(), '--data-dir', str(self.options.output), '--device', self.options.device]
        words += [*self.words, '--batch-size', str(self.options.batch), '--workers', str(self.options.workers)]
        words += ['--epochs', str(epochs), '--epoch-repeats', str(passes), '--seed', str(seed)]
        words += ['--output', str(self.folder.parent), '--experiment', self.folder.name]
        words += ['--cuda-graph'] if self.graph else []
        args = train.parse_args(words).replace(warmup_epochs=warmup)  # the flag takes whole epochs
        trainer = train.train(args, Hooks(dataset=lambda split, *_: data[split], callback=callback))
        size = sum(parameter.numel() for parameter in trainer.task.get_eval_model().parameters()) / 1e6
        return trainer.rows[-1], size

    def rate(self, turn: Callable[[], None]) -> dict[str, Any]:
        """Images a second of an epoch after `turn()`, and what else is known of the variant."""
        from vim_timm.errors import UserError

        def callback(trainer: Any) -> None:
            if trainer.epoch == 1:
                turn()

        data = self.images(2)
        try:
            row, size = self.train(data, 0, 2, 1, 0, callback)
        except UserError as error:
            if not self.graph:
                raise
            print(f'without a graph: {error}', flush=True)
            self.graph = False
            row, size = self.train(data, 0, 2, 1, 0, callback)
        return {'rate': row['images_per_second'], 'parameters': round(size, 3), 'graph': self.graph}


def serve(options: argparse.Namespace) -> None:
    """Answer the driver's lines on standard input by lines on standard output; all else goes to a log."""
    answers = os.fdopen(os.dup(1), 'w')
    log = os.open(options.output / f'{in_files(options.variant)}.log', os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 1), os.dup2(log, 2)
    import torch

    import benchmarks.own_projections  # noqa: F401  registers its models
    import vim_timm.train  # noqa: F401  while others have the device

    def say(**facts: Any) -> None:
        print(json.dumps(facts), file=answers, flush=True)

    def release() -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def turn() -> None:
        release()
        say(ready=True)
        sys.stdin.readline()

    sys.stdin.readline()
    trainings = Trainings(options, options.variant)
    facts = trainings.rate(turn)
    release()
    say(**facts)
    data = trainings.images()
    for line in sys.stdin:
        job = json.loads(line)
        start = time.perf_counter()
        row, _ = trainings.train(data, job['seed'], 1, job['passes'], 0.1)
        release()
        names = ('eval_top1', 'eval_loss', 'train_loss', 'skipped', 'images_per_second')
        say(**job, **{name: row[name] for name in names}, seconds=round(time.perf_counter() - start, 2))


# The driver


class Variant:
    """A variant's process, and what is known of it."""

    def __init__(self, name: str, words: list[str]):
        self.name, self.facts, self.failed = name, dict[str, Any](), False
        command = [sys.executable, '-m', 'benchmarks.equal_time', *words, '--variant', name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding='utf-8')

    def tell(self, line: str) -> None:
        """Send a line; a process that is gone is noticed by its answer."""
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            print(line, file=self.process.stdin, flush=True)

    def hear(self, patience: float) -> dict[str, Any]:
        """The next answer, or {} where the process is gone; one that is silent for too long is ended."""
        assert self.process.stdout
        heard, _, _ = select.select([self.process.stdout], [], [], max(0.0, patience))
        line = self.process.stdout.readline() if heard else ''
        if not line:
            self.process.kill()
            self.failed = True
            print(f'{self.name}: {"failed" if heard else "took too long"}, see its log', flush=True)
        return json.loads(line) if line else {}


def measure(variants: list[Variant], begun: float) -> list[Variant]:
    """The variants that start, with their rates, each alone on the device."""
    for first in range(0, len(variants), AT_ONCE):
        some, since = variants[first : first + AT_ONCE], time.perf_counter()
        for variant in some:
            variant.tell('start')
        ready = [variant for variant in some if variant.hear(since + START - time.perf_counter())]
        print(f'{time.perf_counter() - begun:.0f} s: {len(ready)} of {len(some)} variants have started', flush=True)
        for variant in ready:
            variant.tell('go')
            variant.facts = variant.hear(TURN)
            print(f'{time.perf_counter() - begun:.0f} s: {variant.name}: {variant.facts}', flush=True)
    return [variant for variant in variants if variant.facts]


def run(variants: list[Variant], options: argparse.Namespace, begun: float, images: int) -> list[dict[str, Any]]:
    """Train every variant with every seed, as far as the limit allows."""
    from vim_timm.files import to_json

    rows: list[dict[str, Any]] = []
    passes = {variant: round(options.budget * variant.facts['rate'] / images, 3) for variant in variants}
    for variant in variants:
        if passes[variant] < 1:
            print(f'{variant.name}: left out, {options.budget:g} s are {passes[variant]:.2f} passes', flush=True)
    waiting = [(seed, variant) for seed in options.seeds for variant in variants if passes[variant] >= 1]
    busy: dict[Any, Variant] = {}
    longest = 0.0
    while waiting or busy:
        left = options.limit - (time.perf_counter() - begun)
        if waiting and left < (longest or options.budget * options.jobs) + RESERVE:
            print(f'{len(waiting)} trainings would end too late', flush=True)
            waiting = []
        for seed, variant in list(waiting):
            if len(busy) == options.jobs or variant in busy.values():
                continue
            waiting.remove((seed, variant))
            variant.tell(json.dumps({'variant': variant.name, 'seed': seed, 'passes': passes[variant]}))
            busy[variant.process.stdout] = variant
        heard, _, _ = select.select(list(busy), [], [], max(0.0, left)) if busy else ([], [], [])
        if busy and not heard:
            print(f'at the limit: {len(busy)} trainings are cut', flush=True)
            break
        for pipe in heard:
            variant = busy.pop(pipe)
            result = variant.hear(0)
            if not result:
                waiting = [task for task in waiting if task[1] is not variant]
                continue
            rows.append({**variant.facts, **result})
            longest = max(longest, result['seconds'])
            with open(options.output / 'equal_time.jsonl', 'a', encoding='utf-8') as file:
                print(to_json(rows[-1], indent=None), end='', file=file)
            print(f'{time.perf_counter() - begun:.0f} s: {result}', flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The results in Markdown."""
    lines = ['| variant | M parameters | img/s | epochs | seeds | top-1 |', '|---|---|---|---|---|---|']
    for name in VARIANTS:
        own = [row for row in rows if row['variant'] == name]
        if own:
            top1 = [row['eval_top1'] for row in own]
            spread = f' ± {statistics.stdev(top1):.2f}' if len(top1) > 1 else ''
            facts, eager = own[0], '' if own[0]['graph'] else ' (eager)'
            lines.append(
                f'| {name} | {facts["parameters"]:.2f} | {facts["rate"]:,.0f}{eager} | {facts["passes"]:.2f} | '
                f'{len(own)} | {statistics.mean(top1):.2f}{spread} |'
            )
    return '\n'.join(lines) + '\n'


def main() -> None:
    begun = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir', type=Path, required=True)
    parser.add_argument('--output', type=Path, default=Path('output/equal_time'))
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--budget', type=float, default=12, help="seconds of training at the variant's rate")
    parser.add_argument('--limit', type=float, default=3600, help='seconds of this program')
    parser.add_argument('--jobs', type=int, default=3, help='trainings side by side')
    parser.add_argument('--variants', nargs='+', choices=VARIANTS, metavar='NAME', help='only these')
    parser.add_argument('--models', action='store_true', help='models instead of choices inside one')
    parser.add_argument('--batch', type=int, default=512)
    parser.add_argument('--workers', type=int, default=4, help='loading processes of a training')
    parser.add_argument('--device', choices=('cuda', 'cpu'), default='cuda')
    parser.add_argument('--variant', help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        return serve(options)
    options.output.mkdir(parents=True, exist_ok=True)
    keep_images(options.data_dir, options.output)
    images = len(Kept(options.output / 'train.npz'))
    names = options.variants or list(MODELS if options.models else {**ARGUMENTS, **OWN})
    variants = [Variant(name, sys.argv[1:]) for name in names]
    try:
        rows = run(measure(variants, begun), options, begun, images)
    finally:
        for variant in variants:
            variant.process.kill()
    text = table(rows)
    (options.output / 'equal_time.md').write_text(text, encoding='utf-8')
    print(f'\n{text}', end='')
    if failed := [variant.name for variant in variants if variant.failed]:
        sys.exit(f'{len(failed)} of {len(variants)} variants failed, see {options.output}/*.log: {", ".join(failed)}')


if __name__ == '__main__':
    main()
