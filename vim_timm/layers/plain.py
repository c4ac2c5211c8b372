"""Whether a module's weights say all that it computes."""

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules.module import _has_any_global_hook

PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d)
_TENSORS = (nn.Parameter, torch.Tensor, FakeTensor, FunctionalTensor)  # the last two while a graph is traced


def is_its_class(module: nn.Module) -> bool:
    """Whether a module computes what its class says: neither hooked (as pruning and weight_norm do), nor with a forward
    of its own, nor quantized by tensors of another class."""
    if 'forward' in module.__dict__ or _has_any_global_hook():
        return False
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    return all(type(weight) in _TENSORS for weight in module._parameters.values() if weight is not None)


def is_plain(module: nn.Module) -> bool:
    """Whether a kernel may take the weights of a module instead of calling it.

    It may of a Linear or convolution that is neither wrapped, hooked, parametrized, sharded by itself (FSDP2 changes
    its class) nor quantized.
    """
    return type(module) in PLAIN and is_its_class(module)
