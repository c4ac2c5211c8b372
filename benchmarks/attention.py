"""Kernels of scaled dot product attention: time, peak memory and error at 64 to 4096 tokens.

    python -m benchmarks.attention               a minute on a GPU; on a CPU with --tokens 64 256 1024

Six heads of width 64, bfloat16, forward and backward, medians. The error is the largest difference of output or
gradient from a float64 computation over the largest value there. Writes attention.json to --output.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Callable, Optional

import torch

from vim_timm.files import to_json
from vim_timm.layers.attention import attention, attention_kernels, use_attention_kernel

HEADS, WIDTH = 6, 64


def operands(batch: int, tokens: int, device: str) -> list[torch.Tensor]:
    """q, k, v and the output's gradient."""
    return [torch.randn(batch, HEADS, tokens, WIDTH, device=device, dtype=torch.bfloat16) for _ in range(4)]


def forward_backward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    y = attention(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def median_ms(run: Callable[[], object], device: str, repeats: int = 20) -> float:
    times = []
    for _ in range(repeats + 3):
        start = time.perf_counter()
        run()
        if device == 'cuda':
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:]) * 1000


def peak_mib(run: Callable[[], object], device: str) -> Optional[float]:
    """Growth of allocated memory on a GPU in MiB; None on a CPU."""
    if device != 'cuda':
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def error(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    return max(float((x.double() - y).abs().max() / y.abs().max()) for x, y in zip(found, exact))


def measure(kernel: str, batch: int, tokens: int, device: str) -> dict:
    """One row: a kernel at a number of tokens."""
    tensors = operands(batch, tokens, device)
    with use_attention_kernel('math'):
        exact = forward_backward(*(x[:1].double() for x in tensors))
    with use_attention_kernel(kernel):
        with torch.no_grad():
            forward = median_ms(lambda: attention(*tensors[:3]), device)
        both = median_ms(lambda: forward_backward(*tensors), device)
        peak = peak_mib(lambda: forward_backward(*tensors), device)
        wrong = error(forward_backward(*(x[:1] for x in tensors)), exact)
    return {'kernel': kernel, 'tokens': tokens, 'batch': batch, 'forward_ms': forward, 'forward_backward_ms': both,
            'peak_mib': peak, 'error': wrong}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    parser.add_argument('--tokens', nargs='+', type=int, default=[64, 196, 256, 576, 1024, 4096])
    parser.add_argument('--total', type=int, default=65536 if device == 'cuda' else 1024, help='tokens of a batch')
    parser.add_argument('--output', type=Path, default=Path('output/benchmarks'))
    options = parser.parse_args()
    rows = []
    print('| tokens | kernel | forward, ms | with backward, ms | peak memory, MiB | error |\n|---|---|---|---|---|---|')
    for tokens in options.tokens:
        batch = max(1, options.total // tokens)
        for kernel, reason in attention_kernels(device):
            if not reason:
                row = measure(kernel, batch, tokens, device)
                rows.append(row)
                peak = '' if row['peak_mib'] is None else f'{row["peak_mib"]:.0f}'
                print(
                    f'| {tokens} | `{kernel}` | {row["forward_ms"]:.3f} | {row["forward_backward_ms"]:.3f} | {peak} | '
                    f'{row["error"]:.1e} |',
                    flush=True,
                )
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / 'attention.json').write_text(to_json(rows))


if __name__ == '__main__':
    main()
