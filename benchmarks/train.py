"""What `train.py` reaches of the speed of a raw training step: its own log's img/s over those of a bare loop.

    python -m benchmarks.train --device cpu      vim_nano on the digits with the settings of its recipe
    python -m benchmarks.train                   the rows for one GPU: models x batches x ways x optimizers

A raw step is forward, loss, backward and optimizer (fused AdamW, or the optimizer of the row) on one fixed batch. Both
run in turn in one process, an epoch of `train.py` and as many raw steps, and each counts with its fastest epoch: other
programs slow both alike, and nothing makes one faster than it is. At one thread of a CPU the ratio of processor time,
which other programs hardly touch, stands beside that of the clock. `first` is the time to the log's first line, the end
of step 50, with reading the data and compiling.
Rows go to train.json in --output, each measured in a process of its own; where some failed, the last line names them
and the exit status is 1.
"""

import argparse
import contextlib
import io
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2

import vim_timm  # noqa: F401  registers the models with timm
from vim_timm import train
from vim_timm.engine import Hooks

# model, image size, batch, ways
GPU_ROWS: tuple[tuple[str, int, int, tuple[str, ...]], ...] = (
    ('vim_tiny_patch4_32', 32, 1024, ('eager', 'compiled', 'graph')),
    ('vim_tiny_patch4_32', 32, 256, ('eager', 'compiled', 'graph')),
    ('vim_nano_patch4_32', 32, 1024, ('eager', 'graph')),
    ('vim_tiny_patch16_224', 224, 128, ('eager', 'graph')),
    ('deit_tiny_patch16_224', 224, 128, ('eager', 'graph')),
)
WAYS = {
    'eager': '',
    'compiled': '--torchcompile inductor',
    'graph': '--torchcompile inductor --torchcompile-mode reduce-overhead',
}
MODES = {'compiled': 'default', 'graph': 'reduce-overhead'}
LINE = re.compile(r'epoch (\d+) \[(\d+)/(\d+)\].*?(\d+) img/s')


class Log(io.TextIOBase):
    """Takes what `train.py` prints, and the times at which an epoch's last line came."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.processor = 0.0
        self.first = 0.0

    def write(self, text: str) -> int:
        for match in LINE.finditer(text):
            _, step, steps, rate = match.groups()
            self.first = self.first or time.perf_counter()
            if step == steps:
                self.rates.append(float(rate))
                self.processor = time.process_time()
        return len(text)


def raw_step(row: dict[str, Any], args: Any) -> Callable[[], None]:
    """One training step of the model and batch of a row, on images that stay the same."""
    device = torch.device(row['device'])
    arguments = {'img_size': row['size'], 'in_chans': args.in_chans or 3, 'num_classes': args.num_classes or 10}
    model = timm.create_model(row['model'], **arguments).to(device)
    images = torch.randn(row['batch'], arguments['in_chans'], row['size'], row['size'], device=device)
    targets = torch.randint(10, (row['batch'],), device=device)
    fused = {'fused': True} if row['opt'] == 'adamw' else {}
    optimizer = create_optimizer_v2(model, row['opt'], lr=1e-4, weight_decay=0.05, **fused)
    call = torch.compile(model, mode=MODES[row['way']], fullgraph=True) if row['way'] in MODES else model

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == 'cuda'):
            loss = F.cross_entropy(call(images), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def timed(run: Callable[[], None], times: int, device: str) -> tuple[float, float]:
    """Seconds on the clock and of the processor."""
    if device == 'cuda':
        torch.cuda.synchronize()
    clock, processor = time.perf_counter(), time.process_time()
    for _ in range(times):
        run()
    if device == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter() - clock, time.process_time() - processor


def command(row: dict[str, Any], folder: str) -> list[str]:
    """The flags of `train.py` for a row."""
    common = f'--output {folder} --val-interval 1000 --checkpoint-hist 1 --warmup-epochs 0 --epochs {row["epochs"]}'
    if row['device'] == 'cpu':
        return f'--recipe digits --device cpu --log-interval {row["log_interval"]} {row["more"]} {common}'.split()
    return (
        f'--dataset digits --data-in-memory --workers 0 --epoch-repeats {row["repeats"]} --model {row["model"]} '
        f'--img-size {row["size"]} --batch-size {row["batch"]} --opt {row["opt"]} --lr 1e-4 --weight-decay 0.05 '
        f'--amp --amp-dtype bfloat16 --log-interval {row["log_interval"]} {WAYS[row["way"]]} {common}'
    ).split()


def measure(row: dict[str, Any]) -> dict[str, Any]:
    """The row with what was measured."""
    torch.set_num_threads(row['threads'] or torch.get_num_threads())
    log, raw, processor = Log(), [], []
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        args = train.parse_args(command(row, folder))
        row = {**row, 'model': args.model, 'batch': args.batch_size, 'size': args.img_size, 'opt': args.opt}
        step: Callable[[], None] | None = None
        start = time.process_time()
        spent: list[float] = []

        def after_epoch(trainer: Any) -> None:
            nonlocal step, start
            spent.append((log.processor - start) / trainer.batches)
            if step is None:
                step = raw_step(row, args)
                timed(step, 5, row['device'])
            times = min(trainer.batches, row['raw_steps'])
            seconds, of_processor = timed(step, times, row['device'])
            raw.append(row['batch'] * times / seconds)
            processor.append(of_processor / times)
            start = time.process_time()

        with contextlib.redirect_stdout(log):
            train.train(args, Hooks(callback=after_epoch))
    row.update(train=max(log.rates), raw=max(raw), epochs_of_train=log.rates, epochs_of_raw=raw)
    row['ratio'] = row['train'] / row['raw']
    if row['device'] == 'cpu' and torch.get_num_threads() == 1:
        row['ratio_processor'] = min(processor) / min(spent[1:] or spent)
    row['first'] = log.first - begun
    return row


def rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What is to be measured."""
    common = dict(device=options.device, epochs=options.epochs, raw_steps=options.raw_steps, threads=options.threads)
    if options.device == 'cpu':
        ways = {'as the recipe': '', 'in memory': '--data-in-memory'}
        return [dict(common, way=way, more=more, log_interval=50) for way, more in ways.items()]
    found = []
    for model, size, batch, ways in GPU_ROWS:
        repeats = max(1, round(100 * batch / 1438))  # about a hundred steps an epoch
        for way in ways:
            for opt in options.opts or ('adamw', 'nadamuon'):
                row = dict(common, model=model, size=size, batch=batch, way=way, opt=opt, repeats=repeats)
                found.append(dict(row, log_interval=50))
    wanted = {'model': options.models, 'batch': options.batches, 'way': options.ways}
    return [row for row in found if all(not names or row[key] in names for key, names in wanted.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', choices=('cuda', 'cpu'), default='cuda')
    parser.add_argument('--models', nargs='*', help='only these')
    parser.add_argument('--batches', nargs='*', type=int, help='only these')
    parser.add_argument('--ways', nargs='*', choices=tuple(WAYS), help='only these')
    parser.add_argument('--opts', nargs='*', help='optimizers (default: adamw and nadamuon)')
    parser.add_argument('--epochs', type=int, default=4, help='epochs of train.py, each beside a block of raw steps')
    parser.add_argument('--raw-steps', type=int, default=100, help='most raw steps a block')
    parser.add_argument('--threads', type=int, help='threads of torch (default: as it chooses)')
    parser.add_argument('--output', type=Path, default=Path('.'), help='folder of train.json')
    parser.add_argument('--row', help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measure(json.loads(options.row))))
        return
    if options.device == 'cpu' and (options.models or options.batches or options.ways or options.opts):
        parser.error('--models, --batches, --ways and --opts choose among the rows of a GPU: leave them out')
    found, failed = [], []
    print('| model | size, batch | way, optimizer | train.py, img/s | raw step | ratio | first 50 steps, s |')
    print('|---|---|---|---|---|---|---|', flush=True)
    for row in rows(options):
        words = [sys.executable, '-m', 'benchmarks.train', '--row', json.dumps(row)]
        result = subprocess.run(words, stdout=subprocess.PIPE, encoding='utf-8')
        if result.returncode:
            print(f'failed: {row}', flush=True)
            names = [str(row[key]) for key in ('model', 'size', 'batch', 'way', 'opt') if key in row]
            failed.append(' '.join(names))
            continue
        row = json.loads(result.stdout.splitlines()[-1])
        found.append(row)
        more = f' (processor time {row["ratio_processor"]:.3f})' if 'ratio_processor' in row else ''
        print(
            f'| `{row["model"]}` | {row["size"]}, {row["batch"]} | {row["way"]}, {row["opt"]} | {row["train"]:,.0f} | '
            f'{row["raw"]:,.0f} | {row["ratio"]:.3f}{more} | {row["first"]:.1f} |',
            flush=True,
        )
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / 'train.json').write_text(json.dumps(found, indent=1), encoding='utf-8')
    if failed:
        sys.exit(f'{len(failed)} of {len(found) + len(failed)} rows failed: {", ".join(failed)}')


if __name__ == '__main__':
    main()
