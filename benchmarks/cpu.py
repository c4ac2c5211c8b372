"""Vision Mamba and Vision Mamba 2 on this machine's CPU, each backend, beside timm's DeiT of the same size.

    python -m benchmarks.cpu                     the default grid, about ten minutes on two cores
    python -m benchmarks.cpu --families vim2     Vision Mamba 2
    python -m benchmarks.cpu --sizes 224 448 896 1248 --batches 1 8 --models tiny small --backends cpu torch reference
    python -m benchmarks.cpu --against PATH      this checkout beside another one, instead of beside DeiT (against.py)

Contenders of one setting run in turn inside one process, so that a busy machine slows all alike: trust the ratios.
At one thread the ratio is that of processor time, which other programs hardly touch; else that of the clock.
Peak memory is the growth of the resident set over the loaded model, each contender in a process of its own.
Writes cpu.json and cpu.png, or against.json, to --output.
"""

import argparse
import itertools
import json
import platform
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Callable

import timm
import torch
import torch.nn.functional as F

import vim_timm
from benchmarks import against
from vim_timm.ops import cpu, use_scan_backend
from vim_timm.ops.cpu import library
from vim_timm.ops.operands import Direction, Scan

DEIT = 'deit'


def build(contender: str, family: str, model: str, size: int, train: bool) -> Callable[[torch.Tensor], None]:
    """A function that runs one inference, or one training step without an optimizer."""
    name = f'{DEIT if contender == DEIT else family}_{model}_patch16_224'
    network = timm.create_model(name, img_size=size).train(train)

    def infer(images: torch.Tensor) -> None:
        with torch.inference_mode():
            network(images)

    def step(images: torch.Tensor) -> None:
        network.zero_grad()
        F.cross_entropy(network(images), torch.zeros(len(images), dtype=torch.long)).backward()

    run = step if train else infer

    def on_backend(images: torch.Tensor) -> None:
        with use_scan_backend('auto' if contender == DEIT else contender):
            run(images)

    return on_backend


def in_turn(runs: dict[str, Callable[[], None]], repeats: int, budget: float) -> dict[str, dict[str, float]]:
    """Seconds of each, measured in turn; one that takes longer than `budget` runs once."""
    times: dict[str, list[tuple[float, float]]] = {name: [timed(run)] for name, run in runs.items()}
    for _ in range(repeats):
        for name, run in runs.items():
            if times[name][0][0] < budget:
                times[name].append(timed(run))
    return {name: summary(measured[1:] or measured) for name, measured in times.items()}


def timed(run: Callable[[], None]) -> tuple[float, float]:
    """Seconds on the clock, and seconds of processor time, which other programs do not add to."""
    clock, processor = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - clock, time.process_time() - processor


def summary(measured: list[tuple[float, float]]) -> dict[str, float]:
    clock, processor = zip(*measured)
    return {
        'median': statistics.median(clock),
        'best': min(clock),
        'processor_median': statistics.median(processor),
        'runs': len(measured),
    }


def high_water_mark() -> int:
    """Peak resident set in bytes since the last reset."""
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith('VmHWM:'):
            return int(line.split()[1]) * 1024
    raise RuntimeError('no VmHWM in /proc/self/status')


def peak_memory(contender: str, family: str, model: str, size: int, batch: int, train: bool, threads: int) -> int:
    """Growth of the resident set over three runs, in a fresh process."""
    arguments = [contender, family, model, str(size), str(batch), str(int(train)), str(threads)]
    command = [sys.executable, '-m', 'benchmarks.cpu', '--measure-peak', *arguments]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def measure_peak(contender: str, family: str, model: str, size: str, batch: str, train: str, threads: str) -> int:
    torch.set_num_threads(int(threads))
    F.linear(F.conv2d(torch.randn(1, 3, 16, 16), torch.randn(8, 3, 16, 16)).flatten(1), torch.randn(8, 8))
    assert not cpu.unavailable()  # all libraries are loaded now
    run = build(contender, family, model, int(size), train == '1')
    images = torch.randn(int(batch), 3, int(size), int(size))
    Path('/proc/self/clear_refs').write_text('5')
    before = high_water_mark()
    for _ in range(3):
        run(images)
    return high_water_mark() - before


def textbook_scan(u, delta, A, B, C, D, z):
    """What users without a kernel run today, in the (B, D, L) layout: all decays at once, then token by token."""
    delta = F.softplus(delta)
    decay = torch.exp(torch.einsum('bdl,dn->bdln', delta, A))
    x = torch.einsum('bdl,bnl,bdl->bdln', delta, B, u)
    h = torch.zeros_like(x[:, :, 0])
    ys = []
    for t in range(u.shape[2]):
        h = decay[:, :, t] * h + x[:, :, t]
        ys.append(torch.einsum('bdn,bn->bd', h, C[:, :, t]))
    return (torch.stack(ys, dim=2) + u * D[:, None]) * F.silu(z)


def scan_alone(repeats: int) -> dict[str, dict[str, float]]:
    """One direction of a scan as in Vim tiny at 224 pixels, batch 8: kernel and textbook loop."""
    batch, length, channels, state = 8, 197, 384, 16
    u, delta, z = (torch.randn(batch, length, channels) for _ in range(3))
    B, C = (torch.randn(batch, length, state) for _ in range(2))
    A, D = -torch.arange(1.0, state + 1).repeat(channels, 1), torch.ones(channels)
    transposed = [x.transpose(1, 2).contiguous() for x in (u, delta, B, C, z)]

    @torch.inference_mode()
    def kernel() -> None:
        cpu.scan(Scan(Direction(u, delta, A, B, C, D, None), None, z, A_is_log=False))

    @torch.inference_mode()
    def loop() -> None:
        u_, delta_, B_, C_, z_ = transposed
        textbook_scan(u_, delta_, A, B_, C_, D, z_)

    return in_turn({'kernel': kernel, 'textbook loop': loop}, repeats, budget=10)


def measure(options: argparse.Namespace) -> list[dict]:
    rows: list[dict] = []
    slow: dict[tuple, float] = {}  # seconds per token of a contender, to leave out what would take too long
    for threads, family, model, mode, batch, size in itertools.product(
        options.threads, options.families, options.models, options.modes, options.batches, options.sizes
    ):
        torch.set_num_threads(threads)
        train, tokens = mode == 'train', batch * ((size // 16) ** 2 + 1)
        if train and size not in options.train_sizes:
            continue
        names = [DEIT, *options.backends]
        names = [n for n in names if slow.get((n, family, model, train, threads), 0) * tokens < options.limit]
        if DEIT not in names:
            continue
        images = torch.randn(batch, 3, size, size)
        runs = {name: partial(build(name, family, model, size, train), images) for name in names}
        times = in_turn(runs, options.repeats, options.budget)
        for name in names:
            slow[name, family, model, train, threads] = times[name]['median'] / tokens
            row = {'contender': name, 'family': family, 'model': model, 'mode': mode}
            row |= {'batch': batch, 'size': size, 'threads': threads}
            clock = 'processor_median' if threads == 1 else 'median'
            row |= times[name] | {'speed_vs_deit': times[DEIT][clock] / times[name][clock]}
            if threads == max(options.threads) and times[name]['median'] < options.budget:
                row['peak_bytes'] = peak_memory(name, family, model, size, batch, train, threads)
            rows.append(row)
            peak = f'{row["peak_bytes"] / 2**20:6.0f} MiB' if 'peak_bytes' in row else ''
            print(
                f'{family:4} {model:5} {mode:5} batch {batch} {size:4} px {threads} thread(s) {name:9} '
                f'{row[clock] * 1e3:9.1f} ms  {row["speed_vs_deit"]:5.2f} of DeiT {peak}',
                flush=True,
            )
    return rows


def measure_against(options: argparse.Namespace) -> list[dict]:
    settings = [
        dict(name=f'{family}_{model}_patch16_224', size=size, batch=batch, mode=mode, threads=threads)
        for threads, family, model, mode, batch, size in itertools.product(
            options.threads, options.families, options.models, options.modes, options.batches, options.sizes
        )
        if mode == 'infer' or size in options.train_sizes
    ]
    compared = (against.compare(options.against, settings, name, options.repeats) for name in options.backends)
    return list(itertools.chain.from_iterable(compared))


def plot(rows: list[dict], file: Path) -> None:
    """Speed relative to DeiT over the image size, one line per backend, mode and batch, at the most threads."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    most = max(row['threads'] for row in rows)

    def key(row: dict) -> tuple:
        return row['family'], row['model'], row['contender'], row['mode'], row['batch']

    shown = sorted((row for row in rows if row['threads'] == most and row['contender'] != DEIT), key=key)
    for (family, model, backend, mode, batch), line in itertools.groupby(shown, key):
        points = [(row['size'], row['speed_vs_deit']) for row in line]
        axes.plot(*zip(*points), marker='o', label=f'{family}_{model}, {backend}, {mode}, batch {batch}')
    axes.axhline(1, color='grey', linewidth=1)
    axes.set(xlabel='image side (pixels)', ylabel='speed relative to DeiT', yscale='log')
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = torch.get_num_threads()
    parser.add_argument('--families', nargs='+', default=['vim'], choices=['vim', 'vim2'])
    parser.add_argument('--models', nargs='+', default=['tiny'], choices=['tiny', 'small'])
    parser.add_argument('--backends', nargs='+', default=['cpu', 'torch'], choices=['cpu', 'torch', 'reference'])
    parser.add_argument('--modes', nargs='+', default=['infer', 'train'], choices=['infer', 'train'])
    parser.add_argument('--sizes', nargs='+', type=int, default=[224, 448, 896, 1248], metavar='PX')
    parser.add_argument('--train-sizes', nargs='+', type=int, default=[224], metavar='PX')
    parser.add_argument('--batches', nargs='+', type=int, default=[1, 8], metavar='N')
    parser.add_argument('--threads', nargs='+', type=int, default=sorted({1, cores}), metavar='N')
    parser.add_argument('--repeats', type=int, default=5, help='measurements of each contender after the first')
    parser.add_argument('--budget', type=float, default=5, help='seconds; a slower run is measured once')
    parser.add_argument('--limit', type=float, default=20, help='seconds; a run predicted to take longer is left out')
    parser.add_argument('--against', type=Path, metavar='PATH', help='another checkout, its CPU kernel built')
    parser.add_argument('--output', type=Path, default=Path('output/benchmarks'))
    parser.add_argument('--measure-peak', nargs=7, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure_peak:
        print(measure_peak(*options.measure_peak))
        return
    if cpu.unavailable():
        sys.exit(f'no CPU kernel to measure: {cpu.unavailable()}')
    options.output.mkdir(parents=True, exist_ok=True)
    if options.against:
        (options.output / 'against.json').write_text(json.dumps(measure_against(options), indent=1))
        print(f'wrote {options.output}/against.json')
        return
    scan = {}
    for threads in options.threads:
        torch.set_num_threads(threads)
        scan[threads] = scan_alone(options.repeats)
        ratio = scan[threads]['textbook loop']['best'] / scan[threads]['kernel']['best']
        print(
            f'scan forward, batch 8, 197 tokens, {threads} thread(s): the kernel is {ratio:.0f} times as fast as the '
            'textbook loop'
        )
    rows = measure(options)
    report = {
        'machine': {'processor': platform.processor() or platform.machine(), 'kernel_build': library.instruction_set()},
        'versions': {'torch': torch.__version__, 'timm': timm.__version__, 'vim_timm': vim_timm.__version__},
        'scan_alone': scan,
        'models': rows,
    }
    (options.output / 'cpu.json').write_text(json.dumps(report, indent=1))
    plot(rows, options.output / 'cpu.png')
    print(f'wrote {options.output}/cpu.json and cpu.png')


if __name__ == '__main__':
    main()
