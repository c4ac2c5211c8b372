"""Copies of the host's numbers to the device that nobody waits for."""

from typing import Any

import numpy as np
import torch


def to_device(numbers: Any, device: torch.device) -> torch.Tensor:
    """Numbers as float32 on the device.

    A GPU takes them from pinned memory when it comes to them; from other memory the host would wait until then.
    """
    result = torch.from_numpy(np.asarray(numbers, np.float32))
    return (result.pin_memory() if device.type == 'cuda' else result).to(device, non_blocking=True)
