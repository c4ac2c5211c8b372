"""Times of the symmetric state space dual's kernels on a GPU, in CUDA graphs, bfloat16.

    python -m benchmarks.ssd
    python -m benchmarks.ssd --sweep      other launches beside those that are used

Sizes are those of vim2_tiny without other arguments: 3 heads of 64, 32 states, one order by rows.
"""

import argparse
import itertools
from collections.abc import Iterator

import torch

from benchmarks.gpu import captured_ms
from vim_timm.ops import operands
from vim_timm.ops.triton_kernels import ssd_chunks, ssd_launch, ssd_op

HEADDIM = 64
# images and patches along a side: 224 px, 512 px, 1248 px
SHAPES = ((128, 14), (32, 32), (8, 78), (1, 78))


class Call:
    """One call's operands and gradients, and its parts as functions without arguments."""

    def __init__(self, batch: int, side: int, heads: int, state: int, orders: int):
        length, channels = side * side, heads * HEADDIM
        xbc = torch.randn(batch, length, channels + 2 * state, device='cuda', dtype=torch.bfloat16)
        B, C = xbc[..., channels:].split(state, -1)
        steps = torch.randn(batch, length, heads, device='cuda', dtype=torch.bfloat16) - 3
        rates, skip = torch.randn(orders, heads, device='cuda'), torch.randn(heads, device='cuda')
        x = xbc[..., :channels].unflatten(-1, (heads, HEADDIM))
        self.ssd = ssd_op.ssd_of(operands.Ssd(x, steps, rates, B, C, skip, None), ssd_launch.Grid(0, side, side))
        self.dt, self.s = self.ssd.decays()
        self.grad = torch.randn_like(self.forward())
        self.grad_x, self.grad_delta = torch.empty_like(self.grad), torch.empty_like(self.ssd.delta)
        self.grad_matrices = torch.empty_like(xbc)[..., channels:].split(state, -1)

    def forward(self) -> torch.Tensor:
        return self.ssd.forward(self.dt, self.s, torch.bfloat16)

    def backward(self) -> None:
        self.ssd.backward(self.grad, self.dt, self.s, self.grad_x, self.grad_delta, *self.grad_matrices)

    def values(self) -> None:
        self.ssd.value_gradients(self.grad, self.dt, self.s, self.grad_x)

    def matrices(self) -> None:
        self.ssd.matrix_gradients(self.grad, self.dt, self.s, *self.grad_matrices)


def launches(call: Call) -> Iterator[tuple[str, float]]:
    """Microseconds of a part with each of the launches that might serve it."""
    if isinstance(call.ssd, ssd_chunks.ChunkedSsd):
        parts = {'STATES': call.forward, 'FORWARD': call.forward}
        parts |= {'BACKWARD_VALUES': call.backward, 'BACKWARD_MATRICES': call.backward}
        for name, launch in itertools.product(parts, ((4, 1), (4, 2), (8, 1), (8, 2))):
            used = getattr(ssd_chunks, name)
            setattr(ssd_chunks, name, ssd_chunks.ChunkLaunch(*launch))
            yield f'{parts[name].__name__}, {name} {launch}', 1e3 * captured_ms(parts[name])
            setattr(ssd_chunks, name, used)
        return
    for launch in itertools.product((16, 32, 64), (64, 128), (4, 8), (1, 2, 3), (None, 128)):

        def values(launch: tuple = launch) -> None:
            call.ssd.value_gradients(call.grad, call.dt, call.s, call.grad_x, ssd_launch.ValuesLaunch(*launch))

        yield f'values, {launch}', 1e3 * captured_ms(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--sweep', action='store_true', help='time other launches too')
    parser.add_argument('--heads', type=int, default=3)
    parser.add_argument('--state', type=int, default=32)
    parser.add_argument('--orders', type=int, default=1, choices=(1, 2), help='rows, or rows and columns')
    options = parser.parse_args()
    for batch, side in SHAPES:
        call = Call(batch, side, options.heads, options.state, options.orders)
        print(f'{batch} images of {side} x {side} patches, microseconds')
        parts = [call.ssd.decays, call.forward, call.backward]
        if not isinstance(call.ssd, ssd_chunks.ChunkedSsd):
            parts += [call.values, call.matrices]
        for part in parts:
            print(f'  {part.__name__:<10} {1e3 * captured_ms(part):9.1f}')
        for name, microseconds in launches(call) if options.sweep else ():
            print(f'  {name:<50} {microseconds:9.1f}', flush=True)


if __name__ == '__main__':
    main()
