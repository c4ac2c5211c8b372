"""Where the time of a GPU goes: kernels of an inference or a training step, by torch.profiler, in us of a block.

    python -m benchmarks.kernels vim2_tiny_patch16_224 [--train] [--size 224] [--batch 128]

The model runs as in `benchmarks.gpu`, compiled with CUDA graphs under bfloat16 autocast. The sum of all kernels stands
in the last line beside the time of a run, by the clock: the difference is gaps between kernels.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable

import timm
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import vim_timm  # noqa: F401  registers the models with timm


def step_of(options: argparse.Namespace) -> tuple[Callable[[], None], int]:
    """A function that infers once, or takes a training step with fused AdamW, and the number of the model's blocks."""
    model = timm.create_model(options.model, img_size=options.size).cuda().train(options.train)
    images = torch.randn(options.batch, 3, options.size, options.size, device='cuda')
    labels = torch.randint(1000, (options.batch,), device='cuda')
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    compiled = torch.compile(model, mode='reduce-overhead', fullgraph=True)

    def step() -> None:
        with torch.autocast('cuda', torch.bfloat16), torch.set_grad_enabled(options.train):
            logits = compiled(images)
            loss = torch.nn.functional.cross_entropy(logits, labels)
        if options.train:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    if not hasattr(model, 'blocks'):
        sys.exit(f'{options.model} has no list of blocks, of which one could be timed')
    return step, len(model.blocks)


def kernels(step: Callable[[], None], runs: int) -> tuple[Counter[str], Counter[str]]:
    """Microseconds and launches of each kernel in `runs` runs."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        for _ in range(runs):
            step()
        torch.cuda.synchronize()
    spent: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:  # those span kernels
            spent[event.name] += event.time_range.elapsed_us()
            launches[event.name] += 1
    return spent, launches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model')
    parser.add_argument('--train', action='store_true', help='a training step, not an inference')
    parser.add_argument('--size', type=int, default=224, help='pixels of a side')
    parser.add_argument('--batch', type=int, default=128)
    parser.add_argument('--runs', type=int, default=5)
    parser.add_argument('--rows', type=int, default=40, help='kernels that are shown')
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit('no GPU to measure: torch.cuda.is_available() is False')
    step, blocks = step_of(options)
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(options.runs):
        step()
    torch.cuda.synchronize()
    clock = 1e6 * (time.perf_counter() - start) / options.runs
    spent, launches = kernels(step, options.runs)
    print(f'| us of a block ({blocks}) | launches a run | kernel |\n|---|---|---|')

    def show(microseconds: float, count: int, name: str) -> None:
        print(f'| {microseconds / options.runs / blocks:.1f} | {count / options.runs:.0f} | {name} |')

    for name, microseconds in spent.most_common(options.rows):
        show(microseconds, launches[name], f'`{name[:90]}`')
    show(sum(spent.values()), sum(launches.values()), f'all kernels, of {clock / blocks:.1f} by the clock')


if __name__ == '__main__':
    main()
