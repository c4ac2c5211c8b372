"""Small numbers of the device, which the host reads when the device is past them."""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch

LAG = 2  # steps that the host is ahead of a GPU: enough to keep it busy, few enough to stop soon


class Arrivals:
    """Tensors on their way to the host, each with the function that takes its values.

    A tensor that was sent in one step is received `lag` steps later, on every rank in the same step, or by `flush`.

    Args:
        device: of the tensors. A CPU is never behind, so there the lag is 0.
    """

    def __init__(self, device: torch.device):
        self.asynchronous = device.type == 'cuda'
        self.lag, self.step = LAG if self.asynchronous else 0, 0
        self.waiting: deque[tuple[int, torch.Tensor, Any, Callable[[Any], None]]] = deque()

    def send(self, values: torch.Tensor, receive: Callable[[Any], None]) -> None:
        """Let `receive` be called with `values.tolist()`; they may be overwritten after this call."""
        if not self.asynchronous:
            self.waiting.append((self.step, values.clone(), None, receive))
            return
        host = values.to('cpu', non_blocking=True)  # pinned memory
        event = torch.cuda.Event()
        event.record()
        self.waiting.append((self.step, host, event, receive))

    def advance(self) -> None:
        """End a step: receive what was sent `lag` steps ago."""
        self._receive(self.step - self.lag)
        self.step += 1

    def flush(self) -> None:
        """Receive everything that was sent."""
        self._receive(self.step)

    def _receive(self, until: int) -> None:
        while self.waiting and self.waiting[0][0] <= until:
            _, values, event, receive = self.waiting.popleft()
            if event is not None:
                event.synchronize()
            receive(values.tolist())
