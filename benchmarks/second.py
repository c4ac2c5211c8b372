"""Figures of two tables taken a second way, which shares no line with `benchmarks.gpu` and `benchmarks.train`.

    python -m benchmarks.second models     vim2 beside DeiT of its size: CUDA events around twenty runs, in turn
    python -m benchmarks.second train      train.py as a user starts it, by the clock between the ends of its epochs

A raw step and a model run compiled with CUDA graphs, under bfloat16 autocast; five times twenty runs, of which the
median counts. Of the epochs, too, the median counts: each has all of its end in it, the checkpoint above all. Peak
memory is that of an eager run, with weights and optimizer.
"""

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import timm
import torch

import vim_timm  # noqa: F401  registers the models with timm

# size of the models, image size, batch, whether it is a training step
MODELS = [
    ('tiny', 224, 128, False),
    ('tiny', 224, 128, True),
    ('tiny', 512, 32, False),
    ('tiny', 1248, 8, False),
    ('small', 224, 128, False),
    ('small', 224, 128, True),
    ('base', 224, 128, False),
    ('base', 224, 128, True),
]
# model, image size, batch
TRAIN = [
    ('vim_tiny_patch4_32', 32, 1024),
    ('vim_tiny_patch4_32', 32, 256),
    ('vim_tiny_patch16_224', 224, 128),
]
DIGITS = 1438  # images of its training split
FLAGS = (
    '--dataset digits --data-in-memory --workers 0 --lr 1e-5 --opt adamw --warmup-epochs 0 --val-interval 1000 '
    '--checkpoint-hist 1 --amp --amp-dtype bfloat16 --torchcompile inductor --torchcompile-mode reduce-overhead'
)


class Contender:
    """A model on images that stay the same: `run` infers, or takes a training step with fused AdamW."""

    def __init__(self, name: str, size: int, batch: int, train: bool, **arguments: int):
        self.batch, self.training = batch, train
        self.model: Callable[[torch.Tensor], torch.Tensor] = timm.create_model(name, img_size=size, **arguments)
        self.module = self.model.cuda().train(train)
        self.images = torch.rand(batch, arguments.get('in_chans', 3), size, size, device='cuda')
        self.labels = torch.arange(batch, device='cuda') % 10
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-5, fused=True)

    def compile(self) -> None:
        self.model = torch.compile(self.module, mode='reduce-overhead', fullgraph=True)

    def run(self) -> None:
        torch.compiler.cudagraph_mark_step_begin()  # another model may have run since
        with torch.autocast('cuda', torch.bfloat16), torch.set_grad_enabled(self.training):
            logits = self.model(self.images)
            if self.training:
                loss = torch.nn.functional.cross_entropy(logits, self.labels)
        if self.training:
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def peak(self) -> float:
        """GiB that a run needs at most."""
        self.run()
        torch.cuda.reset_peak_memory_stats()
        self.run()
        return torch.cuda.max_memory_allocated() / 2**30

    def rate(self, runs: int = 20) -> float:
        """Images a second of twenty runs."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(runs):
            self.run()
        end.record()
        end.synchronize()
        return 1000 * runs * self.batch / begin.elapsed_time(end)


def rates(contenders: list[Contender]) -> list[float]:
    """Images a second of each, in turn."""
    for contender in contenders:
        contender.compile()
        contender.rate(5)
    return [statistics.median(of_one) for of_one in zip(*([c.rate() for c in contenders] for _ in range(5)))]


def chosen(table: list[tuple], rows: list[int]) -> list[tuple]:
    """Rows of a table, all of them if none is named."""
    return [row for i, row in enumerate(table) if i in rows or not rows]


def models(family: str, rows: list[int]) -> None:
    print('| model | size, batch | mode | img/s | DeiT | ratio | peak, GiB | DeiT | ratio |')
    print('|---|---|---|---|---|---|---|---|---|', flush=True)
    for model, size, batch, train in chosen(MODELS, rows):
        torch._dynamo.reset()
        names = [f'{name}_{model}_patch16_224' for name in (family, 'deit')]
        contenders, peaks = [], []
        for name in names:
            before = torch.cuda.memory_allocated() / 2**30
            contenders.append(Contender(name, size, batch, train))
            peaks.append(contenders[-1].peak() - before)
        ours, theirs = rates(contenders)
        print(
            f'| `{names[0]}` | {size}, {batch} | {"train" if train else "infer"} | {ours:,.0f} | {theirs:,.0f} | '
            f'{ours / theirs:.2f} | {peaks[0]:.2f} | {peaks[1]:.2f} | {peaks[0] / peaks[1]:.2f} |',
            flush=True,
        )
        del contenders


def seconds_of_epochs(flags: str) -> list[float]:
    """Seconds from the end of one epoch of train.py to that of the next."""
    ends = []
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, '-u', 'train.py', *flags.split(), '--output', folder]
        with subprocess.Popen(words, stdout=subprocess.PIPE, encoding='utf-8') as process:
            assert process.stdout
            for line in process.stdout:
                last = re.search(r'epoch \d+ \[(\d+)/(\d+)\]', line)
                if last and last[1] == last[2]:
                    ends.append(time.perf_counter())
        if process.returncode:
            raise SystemExit(f'train.py {flags} ended with exit status {process.returncode}')
    return [end - begin for begin, end in zip(ends, ends[1:])]


def train(steps: int, epochs: int, rows: list[int]) -> None:
    print('| model | size, batch | train.py, img/s | raw step | ratio |')
    print('|---|---|---|---|---|', flush=True)
    for name, size, batch in chosen(TRAIN, rows):
        repeats = max(1, round(steps * batch / DIGITS))
        seconds = seconds_of_epochs(
            f'{FLAGS} --model {name} --img-size {size} --batch-size {batch} --epoch-repeats {repeats} --epochs {epochs}'
        )
        images = repeats * DIGITS // batch * batch
        ours = images / statistics.median(seconds)
        torch._dynamo.reset()
        (raw,) = rates([Contender(name, size, batch, True, in_chans=1, num_classes=10)])
        print(f'| `{name}` | {size}, {batch} | {ours:,.0f} | {raw:,.0f} | {ours / raw:.3f} |', flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('table', choices=('models', 'train'))
    parser.add_argument('--family', choices=('vim', 'vim2'), default='vim2', help='beside DeiT')
    parser.add_argument('--rows', type=int, nargs='+', default=[], help='only these of the table, from 0')
    parser.add_argument('--steps', type=int, default=1000, help='of an epoch of train.py, about')
    parser.add_argument('--epochs', type=int, default=4, help='of train.py; the first is not timed')
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit('no GPU to measure: torch.cuda.is_available() is False')
    if options.table == 'models':
        models(options.family, options.rows)
    else:
        train(options.steps, options.epochs, options.rows)


if __name__ == '__main__':
    main()
