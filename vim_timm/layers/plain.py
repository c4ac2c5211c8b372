"""Whether a module's weights say all that it computes."""

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import module as modules

PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d)
_HOOKS_OF_ALL = (
    modules._global_backward_pre_hooks,
    modules._global_backward_hooks,
    modules._global_forward_pre_hooks,
    modules._global_forward_hooks,
)
_TENSORS = (nn.Parameter, torch.Tensor, FakeTensor, FunctionalTensor)  # the last two while a graph is traced


def is_its_class(module: nn.Module) -> bool:
    """Whether a module computes what its class says: neither hooked (as pruning and weight_norm do), nor with a forward
    of its own, nor quantized by tensors of another class."""
    own = callable(module.forward) and 'forward' not in module.__dict__  # the former makes torch.compile guard it
    if not own or any(_HOOKS_OF_ALL):
        return False
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    for weight in module._parameters.values():
        if weight is not None and type(weight) not in _TENSORS:
            return False
    return True


def is_plain(module: nn.Module) -> bool:
    """Whether a kernel may take the weights of a module instead of calling it.

    It may of a Linear or convolution that is neither wrapped, hooked, parametrized, sharded by itself (FSDP2 changes
    its class) nor quantized.
    """
    return type(module) in PLAIN and is_its_class(module)


def is_plain_projection(linear: nn.Module) -> bool:
    """Whether a Linear's weight alone says what it computes."""
    return is_plain(linear) and linear.bias is None


def is_plain_depthwise(conv: nn.Module, padding: int) -> bool:
    """Whether a kernel of depthwise convolutions may take a convolution's weights: one of another padding, stride,
    dilation or grouping is called."""
    if not isinstance(conv, (nn.Conv1d, nn.Conv2d)) or not is_plain(conv):
        return False
    if conv.groups != conv.in_channels or conv.groups != conv.out_channels or conv.padding_mode != 'zeros':
        return False
    axes = len(conv.kernel_size)
    return conv.padding == (padding,) * axes and conv.stride == conv.dilation == (1,) * axes
