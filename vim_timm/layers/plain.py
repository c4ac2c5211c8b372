"""Whether a module's weights say all that it computes."""

import torch.nn as nn

PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d)


def is_plain(module: nn.Module) -> bool:
    """A Linear or convolution that is neither wrapped, hooked nor quantized: a kernel may take its weights."""
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return type(module) in PLAIN and not hooked
