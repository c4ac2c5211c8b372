"""Whether a module's weights say all that it computes."""

import torch.nn as nn


def is_plain(module: nn.Module) -> bool:
    """A Linear or convolution that is neither wrapped, hooked nor quantized: a kernel may take its weights."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) in (nn.Linear, nn.Conv1d, nn.Conv2d) and not any(hooks)
