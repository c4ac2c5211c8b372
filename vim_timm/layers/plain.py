"""Whether a module's weights say all that it computes."""

from typing import Any, List, Optional, Tuple

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import module as modules

PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d)
_TENSORS = (nn.Parameter, torch.Tensor, FakeTensor, FunctionalTensor)  # the last two while a graph is traced


def is_its_class(module: nn.Module) -> bool:
    """Whether a module computes what its class says: neither hooked (as pruning and weight_norm do), nor with a forward
    of its own, nor quantized by tensors of another class."""
    own = module.__dict__  # asked directly: a module's attributes cost the host several times as much
    if 'forward' in own or not callable(module.forward):  # the latter makes torch.compile guard it
        return False
    if modules._global_forward_hooks or modules._global_forward_pre_hooks:
        return False
    if modules._global_backward_hooks or modules._global_backward_pre_hooks:
        return False
    if own['_forward_hooks'] or own['_forward_pre_hooks'] or own['_backward_hooks'] or own['_backward_pre_hooks']:
        return False
    for weight in own['_parameters'].values():
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
    return is_plain(linear) and weights(linear)[1] is None


def weights(layer: nn.Module) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    """Weight and bias of a Linear or convolution; as attributes they cost the host several times as much."""
    own: Any = layer._parameters
    if 'weight' in own and 'bias' in own:
        return own['weight'], own['bias']
    return layer.weight, layer.bias  # type: ignore[return-value]  # plain tensors in a replica or shard of a model


def parameters(module: nn.Module, *names: str) -> List[torch.Tensor]:
    """A module's own parameters, as fast as `weights`."""
    own: Any = module._parameters
    return [own[name] if name in own else getattr(module, name) for name in names]


def is_plain_depthwise(conv: nn.Module, padding: int) -> bool:
    """Whether a kernel of depthwise convolutions may take a convolution's weights: one of another padding, stride,
    dilation or grouping is called."""
    if not isinstance(conv, (nn.Conv1d, nn.Conv2d)) or not is_plain(conv):
        return False
    if conv.groups != conv.in_channels or conv.groups != conv.out_channels or conv.padding_mode != 'zeros':
        return False
    axes = len(conv.kernel_size)
    return conv.padding == (padding,) * axes and conv.stride == conv.dilation == (1,) * axes
