"""Vision Mamba on an NVIDIA GPU beside timm's DeiT, and its scan beside mamba-ssm's.

    python -m benchmarks.gpu                     every table of docs/benchmarks.md, about fifteen minutes on an H200
    python -m benchmarks.gpu --tables ops infer --models tiny --sizes 224 1248

Inference and training run under bfloat16 autocast. Three ways to run a model: eager, torch.compile, and torch.compile
with CUDA graphs. The mamba_ssm rows appear where that package is installed. Writes gpu.json and gpu.png to --output;
where a model could not be measured the last line names it and the exit status is 1.
"""

import argparse
import itertools
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, Callable

import timm
import torch
import torch.nn.functional as F

import vim_timm
from vim_timm.ops import mamba_ssm_adapter, operands, triton_kernels, use_scan_backend
from vim_timm.ops.cuda.mixer_op import Mixer
from vim_timm.ops.operands import Conv, Direction, Scan, Taps, Weights

# channels, tokens and batch of Vim tiny at 224, small at 224, tiny at 448, tiny at 896, tiny at 1248
SCANS = [(128, 384, 197), (128, 768, 197), (32, 384, 785), (8, 384, 3137), (4, 384, 6085)]
BATCHES = {224: 128, 384: 64, 512: 32, 768: 16, 1024: 8, 1248: 8}
COMPILED = {'compile': 'default', 'graph': 'reduce-overhead'}


def median_ms(run: Callable[[], Any], milliseconds: int) -> float:
    from triton.testing import do_bench

    return do_bench(run, warmup=milliseconds // 4, rep=milliseconds, return_mode='median')


def captured_ms(run: Callable[[], Any], milliseconds: int = 50, times: int = 5) -> float:
    """Median time of a run in a CUDA graph, free of the host's launches."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            run()
    return median_ms(graph.replay, milliseconds) / times


def exponentials_ms(batch: int, dim: int, length: int, state: int = 16) -> float:
    """What the exponentials of both directions cost alone: 16 a clock on each multiprocessor."""
    from triton.runtime import driver

    properties = driver.active.utils.get_device_properties(0)
    return 2 * batch * length * dim * state / (16 * properties['multiprocessor_count'] * properties['sm_clock_rate'])


def scan_operands(batch: int, dim: int, length: int, state: int = 16) -> Scan:
    """Operands of a scan in both directions, bfloat16 with float32 parameters, laid out as in a model."""
    rank = dim // 32

    def leaf(x: torch.Tensor) -> torch.Tensor:
        return x.detach().requires_grad_()

    def direction() -> Direction:
        rows = torch.randn(batch, length, rank + 2 * state, device='cuda', dtype=torch.bfloat16)
        u, delta = torch.randn(2, batch, length, dim, device='cuda', dtype=torch.bfloat16)
        A_log = torch.arange(1.0, state + 1, device='cuda').log().repeat(dim, 1)
        D, bias = torch.randn(dim, device='cuda'), torch.randn(dim, device='cuda') - 3
        return Direction(
            *map(leaf, (u, delta, A_log, rows[..., rank : rank + state], rows[..., rank + state :], D, bias))
        )

    z = torch.randn(batch, length, 2 * dim, device='cuda', dtype=torch.bfloat16)[..., dim:]
    return Scan(direction(), direction(), leaf(z), 0.5)


def mamba_ssm_operands(scan: Scan) -> list[torch.Tensor]:
    """One direction in mamba-ssm's layout: u, delta, A, B, C, D, z, delta_bias."""
    u, delta, A_log, B, C, D, bias, z = (x.detach() for x in (*scan.forward, scan.z))
    u, delta, B, C, z = (x.transpose(1, 2).contiguous() for x in (u, delta, B, C, z))
    return [x.requires_grad_() for x in (u, delta, -A_log.exp(), B[:, None], C[:, None], D, z, bias)]


def mixer_operands(batch: int, dim: int, length: int, state: int = 16) -> operands.Mixer:
    """Operands of the fused inside of a block, without out_proj."""
    rank, draw = dim // 32, partial(torch.randn, device='cuda')

    def weights() -> Weights:
        A_log = torch.arange(1.0, state + 1, device='cuda').log().repeat(dim, 1)
        x_proj, dt = draw(rank + 2 * state, dim) / dim**0.5, draw(dim, rank) / rank**0.5
        return Weights(draw(dim, 4) / 2, draw(dim), x_proj, dt, draw(dim) - 3, A_log, draw(dim))

    xz = torch.randn(batch, length, 2 * dim, device='cuda', dtype=torch.bfloat16)
    return operands.Mixer(xz, weights(), weights(), 0.5)


def measure_fused(batch: int, dim: int, length: int) -> dict[str, float]:
    """The fused scan, which projects step sizes and gates too, and the whole inside of a block."""
    mixer = Mixer(mixer_operands(batch, dim, length))
    p = mixer.project()
    grad = torch.randn(batch, length, dim, device='cuda', dtype=torch.bfloat16)
    grad_xz, weights = torch.empty_like(mixer.xz), torch.empty(2 * mixer.direction_size, device='cuda')
    return {
        'fused_project': captured_ms(mixer.project),
        'fused_scan': captured_ms(lambda: mixer.scan_forward(p)),
        'fused_scan_backward': captured_ms(lambda: mixer.scan_gradients(p, grad, grad_xz, weights)),
        'fused_block_backward': captured_ms(lambda: mixer.backward(grad)),
    }


def measure_op(batch: int, dim: int, length: int) -> dict:
    """Milliseconds of a scan in both directions, forward and forward + backward, and of the convolution."""
    scan = scan_operands(batch, dim, length)
    grad = torch.randn(batch, length, dim, device='cuda', dtype=torch.bfloat16)
    leaves = [x for x in scan.flat() if isinstance(x, torch.Tensor)]
    plain = Scan.of(*(x.detach() for x in leaves), 0.5)
    taps = Taps(torch.randn(dim, 4, device='cuda'), torch.randn(dim, device='cuda'))

    def both() -> None:
        torch.autograd.grad(triton_kernels.scan(scan), leaves, grad)

    row: dict[str, Any] = {'batch': batch, 'dim': dim, 'length': length}
    row['exponentials'] = exponentials_ms(batch, dim, length)
    row |= measure_fused(batch, dim, length)
    row['triton_forward'] = captured_ms(lambda: triton_kernels.scan(plain))
    row['triton_forward_backward'] = median_ms(both, 50)
    row['triton_conv'] = captured_ms(lambda: triton_kernels.conv(Conv(plain.z, taps, taps)))
    if not mamba_ssm_adapter.unavailable():
        row |= measure_mamba_ssm(scan, grad)
    print(' '.join(f'{k} {v:.4g}' for k, v in row.items()), flush=True)
    return row


def measure_mamba_ssm(scan: Scan, grad: torch.Tensor) -> dict[str, float]:
    """The same two scans by mamba-ssm, without the flips and the sum that a bidirectional model adds."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    theirs, grad = mamba_ssm_operands(scan), grad.transpose(1, 2).contiguous()

    def both() -> None:
        for _ in range(2):
            torch.autograd.grad(selective_scan_fn(*theirs, True), theirs, grad)

    with torch.no_grad():
        forward = median_ms(lambda: [selective_scan_fn(*theirs, True) for _ in range(2)], 50)
    return {'mamba_ssm_forward': forward, 'mamba_ssm_forward_backward': median_ms(both, 50)}


def build(name: str, size: int, way: str, train: bool) -> Callable[[], None]:
    """One inference, or one training step with AdamW, on fixed random images."""
    # DeiT has no argument for other sizes in common with these
    arguments = {} if name.startswith(('mambaout', 'efficientvim')) else {'img_size': size}
    model = timm.create_model(name, **arguments).cuda().train(train)
    images = torch.randn(BATCHES[size], 3, size, size, device='cuda')
    labels = torch.randint(1000, (len(images),), device='cuda')
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    call = torch.compile(model, mode=COMPILED[way], fullgraph=True) if way in COMPILED else model

    def infer() -> None:
        with torch.no_grad(), torch.autocast('cuda', torch.bfloat16):
            call(images)

    def step() -> None:
        with torch.autocast('cuda', torch.bfloat16):
            loss = F.cross_entropy(call(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step if train else infer


def measure_model(name: str, size: int, way: str, train: bool, backend: str = 'auto') -> dict:
    """Images a second, peak GiB and seconds to the first result, or the error where memory or the compiler gives up."""
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    row = {'model': name, 'backend': backend, 'way': way, 'size': size, 'batch': BATCHES[size], 'train': train}
    try:
        with use_scan_backend(backend):
            start = time.perf_counter()
            run = build(name, size, way, train)
            run()
            torch.cuda.synchronize()
            row['first'] = time.perf_counter() - start
            run()
            torch.cuda.reset_peak_memory_stats()
            run()
            row['peak_gib'] = torch.cuda.max_memory_allocated() / 2**30
            row['images_per_second'] = BATCHES[size] / median_ms(run, 400) * 1000
    except Exception as error:  # a benchmark goes on and says what failed
        row['error'] = f'{type(error).__name__} {str(error)[:300]}'
        print(f'{name} {size} {way}: {row["error"]}', flush=True)
        return row
    print(
        f'{name:24} {backend:9} {size:4} batch {row["batch"]:3} {"train" if train else "infer"} {way:8}'
        f'{row["images_per_second"]:9.0f} img/s {row["peak_gib"]:6.2f} GiB, first after {row["first"]:.1f} s',
        flush=True,
    )
    return row


def measure_models(options: argparse.Namespace, train: bool) -> list[dict]:
    sizes = [size for size in options.sizes if size == 224] if train else options.sizes
    rows = []
    for size, model in itertools.product(sizes, options.models):
        names = [f'{family}_{model}_patch16_224' for family in ('vim', 'vim2', 'deit')]
        names += ['mambaout_femto', 'efficientvim_m1'] if model == 'tiny' and size == 224 else []
        names = [name for name in names if name.split('_')[0] in options.families]
        for name, way in itertools.product(names, options.ways):
            rows.append(measure_model(name, size, way, train))
        if 'vim' in options.families and not mamba_ssm_adapter.unavailable() and 'eager' in options.ways:
            rows.append(measure_model(names[0], size, 'eager', train, 'mamba_ssm'))
    return rows


def ratios(rows: list[dict]) -> list[dict]:
    """Vim and Vision Mamba 2 over DeiT for each size, mode and model: the speed of the fastest way of each; speed and
    peak memory in eager mode (what a CUDA graph holds is not counted)."""
    found = []
    for size, train, model in sorted({(r['size'], r['train'], r['model'].split('_')[1]) for r in rows}):
        group = [r for r in rows if (r['size'], r['train']) == (size, train) and r['backend'] == 'auto']
        deit = [r for r in group if r['model'].startswith(f'deit_{model}')]
        for family in ('vim', 'vim2'):
            ours = [r for r in group if r['model'].startswith(f'{family}_{model}')]
            if not ours or not deit:
                continue
            eager = [[r for r in rs if r['way'] == 'eager'] for rs in (ours, deit)]
            best = [max(rs, key=lambda r: r['images_per_second']) for rs in (ours, deit)]
            row = {'model': f'{family}_{model}', 'size': size, 'train': train, 'ways': [r['way'] for r in best]}
            row['fastest'] = best[0]['images_per_second'] / best[1]['images_per_second']
            if all(eager):
                row['eager'] = eager[0][0]['images_per_second'] / eager[1][0]['images_per_second']
                row['memory'] = eager[0][0]['peak_gib'] / eager[1][0]['peak_gib']
            print(row, flush=True)
            found.append(row)
    return found


def plot(rows: list[dict], file: Path) -> None:
    """Images a second over the image size, the fastest way of each model."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    shown = [
        r for r in rows if not r['train'] and r['backend'] == 'auto' and r['model'][:4] in ('vim_', 'vim2', 'deit')
    ]
    for name in sorted({r['model'] for r in shown}):
        best: dict[int, float] = {}
        for r in shown:
            if r['model'] == name:
                best[r['size']] = max(best.get(r['size'], 0), r['images_per_second'])
        axes.plot(*zip(*sorted(best.items())), marker='o', label=name)
    axes.set(xlabel='image side (pixels)', ylabel='images per second', yscale='log', title=torch.cuda.get_device_name())
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = ['ops', 'infer', 'train']
    parser.add_argument('--tables', nargs='+', default=tables, choices=tables)
    parser.add_argument('--models', nargs='+', default=['tiny', 'small', 'base'], choices=['tiny', 'small', 'base'])
    families = ['vim', 'vim2', 'deit', 'mambaout', 'efficientvim']
    parser.add_argument('--families', nargs='+', default=families, choices=families)
    parser.add_argument('--sizes', nargs='+', type=int, default=list(BATCHES), choices=list(BATCHES), metavar='PX')
    ways = ['eager', *COMPILED]
    parser.add_argument('--ways', nargs='+', default=ways, choices=ways)
    parser.add_argument('--output', type=Path, default=Path('output/benchmarks'))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit('no GPU to measure: torch.cuda.is_available() is False')
    options.output.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        'gpu': torch.cuda.get_device_name(),
        'versions': {'torch': torch.__version__, 'timm': timm.__version__, 'vim_timm': vim_timm.__version__},
    }
    parts = {
        'ops': lambda: [measure_op(*shape) for shape in SCANS],
        'infer': partial(measure_models, options, False),
        'train': partial(measure_models, options, True),
    }
    for table in options.tables:
        report[table] = parts[table]()
        (options.output / 'gpu.json').write_text(json.dumps(report, indent=1))
    measured = report.get('infer', []) + report.get('train', [])
    models = [row for row in measured if 'error' not in row]
    report['ratios'] = ratios(models)
    (options.output / 'gpu.json').write_text(json.dumps(report, indent=1))
    if models:
        plot(models, options.output / 'gpu.png')
    print(f'wrote {options.output}/gpu.json')
    if failed := [row for row in measured if 'error' in row]:
        names = [f'{row["model"]} {row["size"]} {"train" if row["train"] else "infer"} {row["way"]}' for row in failed]
        sys.exit(f'{len(failed)} of {len(measured)} rows of models failed: {", ".join(names)}')


if __name__ == '__main__':
    main()
