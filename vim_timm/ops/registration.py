"""How a kernel becomes a torch operator: its schema, its gradient as a second operator, what it refuses, its FLOPs.

FLOPs follow one convention on every backend, so that those of a model do not depend on it. Of each direction: 9 for
every state of every channel and token, one each for skip weight and gate, 2 for a multiplication and an addition in
convolutions and products. A backward pass counts twice its forward pass; what a kernel computes again counts once.
"""

import contextlib
import math
from typing import Any, Callable, Dict, Iterable, NamedTuple, Optional, Sequence, Tuple

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.flop_counter import flop_registry, register_flop_formula

from vim_timm.ops.operands import schema

library = torch.library.Library('vim_timm', 'FRAGMENT')

Shapes = Dict[str, Optional[Sequence[int]]]  # of operands by their names in the schema


class Kernel(NamedTuple):
    """What `register` needs of a kernel; `run` and all others take the operands of the schema."""

    run: Callable[..., Any]
    fake: Callable[..., Any]  # run's outputs for fake tensors
    save: Callable[..., None]  # keeps what `differentiate` needs, from autograd's context, operands and output
    differentiate: Callable[..., Any]  # autograd's `backward`, which calls NAME_backward
    run_backward: Callable[..., Any]
    fake_backward: Callable[..., Any]


def register(name: str, schema: str, schema_backward: str, kernel: Kernel, flops: Callable[[Shapes], int]) -> None:
    """Define `vim_timm::NAME` and `vim_timm::NAME_backward`.

    Defined in a library, not by `torch.library.custom_op`, whose wrappers cost the host a third of a call.

    Args:
        schema: Operands and results, without defaults and without operands that go by keyword only.
        schema_backward: The same of NAME_backward; operands keep their names.
        flops: Of the forward operator.
    """

    def flops_backward(shapes: Shapes) -> int:
        return 2 * flops(shapes)

    run, fake = (_on_one_device(name, schema, function) for function in (kernel.run, kernel.fake))
    _define(name, schema, run, fake, kernel.save, kernel.differentiate, flops)
    run, fake = kernel.run_backward, kernel.fake_backward  # autograd sees to the gradients' devices
    _define(f'{name}_backward', schema_backward, run, fake, _save_nothing, refuse, flops_backward)


def register_inference(
    name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any], flops: Callable[[Shapes], int]
) -> None:
    """Define `vim_timm::NAME`, whose caller has another way to gradients: a derivative of it is refused."""
    run, fake = (_on_one_device(name, schema, function) for function in (run, fake))
    _define(name, schema, run, fake, _save_nothing, _refuse_any, flops)


def _on_one_device(name: str, schema: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function that first raises RuntimeError, as aten does, where tensors lie on several devices: kernels take
    addresses. An operator's first operand is a tensor."""
    operands = [part.split() for part in schema[1 : schema.rindex(') ->')].split(', ')]
    tensors = [(place, names[-1]) for place, names in enumerate(operands) if names[0].startswith('Tensor')]

    def checked(*inputs: Any) -> Any:
        device = inputs[0].device
        for place, operand in tensors:
            x = inputs[place]
            if x is not None and x.device != device:
                raise RuntimeError(
                    f'Expected all tensors to be on the same device, but found at least two devices, {device} and '
                    f'{x.device}! (when checking argument {operand} of vim_timm::{name})'
                )
        return function(*inputs)

    return checked


def _define(
    operator: str,
    signature: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    save: Callable[..., None],
    differentiate: Callable[..., Any],
    formula: Callable[[Shapes], int],
) -> None:
    library.define(operator + signature)
    library.impl(operator, run, 'CompositeExplicitAutograd')
    torch.library.register_fake(f'vim_timm::{operator}', fake, lib=library)
    overload = getattr(torch.ops.vim_timm, operator).default
    library.impl(operator, _differentiable(overload, save, differentiate), 'Autograd')
    if _returns_list(overload):  # else torch calls it for one after the other of several gradients (is_grads_batched)
        library.impl(operator, refuse, 'Batched')
    _count(overload, formula)


# What a kernel has not, and who has it.
REFUSAL = (
    'kernels have a first derivative in reverse mode, no second one, no forward mode, none of the transforms of '
    "torch.func: use vim_timm.ops.use_scan_backend('export') or VIM_TIMM_SCAN=export for them (or `reference`, slower)"
)


def refuse(ctx: Any, *grads: Any) -> None:
    """Raise RuntimeError: a kernel's backward pass has no derivative of its own, and takes one gradient at a time."""
    raise RuntimeError(REFUSAL)


def _refuse_any(ctx: Any, *grads: Any) -> None:
    raise RuntimeError('this kernel is for inference: the operators of vim_timm.ops choose one that has derivatives')


@torch.compiler.assume_constant_result  # Dynamo has no answer of its own, and takes what it has for a transform
def _in_functorch() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


def transformed() -> bool:
    """Whether forward-mode differentiation or a transform of torch.func is at work, which would pass kernels by."""
    return forward_ad._current_level >= 0 or _in_functorch()


def autocast_off(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Kernels decide their own precision, whatever autocast says on x's device."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def as_product_operands(*tensors: Optional[torch.Tensor]) -> Tuple[Optional[torch.Tensor], ...]:
    """The tensors, of which the first is none of the absent ones, in the dtype in which autocast multiplies them."""
    assert tensors[0] is not None
    dtype = autocast_dtype(tensors[0])
    if dtype is None:
        return tensors
    return tuple(None if x is None else x.to(dtype) for x in tensors)


def autocast_dtype(x: torch.Tensor) -> Optional[torch.dtype]:
    """The dtype in which autocast multiplies tensors on x's device, None without autocast."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def as_dtype(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x.to(dtype), but x itself where that changes nothing: the call costs the host more, and in an autograd function
    Dynamo, that of torch 2.11 among others, loses its gradient."""
    return x if x.dtype == dtype else x.to(dtype)


def in_dtypes_of(
    tensors: Sequence[Optional[torch.Tensor]], gradients: Sequence[Optional[torch.Tensor]]
) -> Tuple[Optional[torch.Tensor], ...]:
    """Gradients as autograd takes them: in their tensors' dtypes, None for what is absent."""
    return tuple(None if x is None or g is None else g.to(x.dtype) for x, g in zip(tensors, gradients))


def keep_outputs(ctx: Any, *outputs: torch.Tensor) -> None:
    """Outputs that are there for the backward pass alone: they have no gradient, and no zeros are filled for one."""
    ctx.mark_non_differentiable(*outputs)
    ctx.set_materialize_grads(False)


def _save_nothing(ctx: Any, inputs: Any, output: Any) -> None:
    pass


def wants_gradient(inputs: Iterable[Any]) -> bool:
    """Whether autograd has to keep what a gradient of any of the inputs takes."""
    if torch.is_grad_enabled():
        for x in inputs:
            if isinstance(x, torch.Tensor) and x.requires_grad:
                return True
    return False


def _returns_list(operator: torch._ops.OpOverload) -> bool:
    return isinstance(operator._schema.returns[0].type, torch.ListType)


def _differentiable(
    operator: torch._ops.OpOverload, save: Callable[..., None], differentiate: Callable[..., Any]
) -> Callable[..., Any]:
    """The operator as autograd calls it. `torch.library.register_autograd` does the same, but takes the host a tenth of
    a millisecond for a call with twenty operands."""
    several = _returns_list(operator)

    def forward(ctx: Any, *inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = operator(*inputs)
        save(ctx, inputs, output)
        return tuple(output) if several else output  # autograd would not look into a list

    methods = {'forward': staticmethod(forward), 'backward': staticmethod(differentiate)}
    function: Any = type(operator.name(), (torch.autograd.Function,), methods)

    def call(*inputs: Any) -> Any:
        if transformed():
            raise RuntimeError(REFUSAL)
        if wants_gradient(inputs):
            output = function.apply(*inputs)
            return list(output) if several else output
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*inputs)

    return call


def _count(overload: torch._ops.OpOverload, formula: Callable[[Shapes], int]) -> None:
    names = [argument.name for argument in overload._schema.arguments]

    @register_flop_formula(overload.overloadpacket)
    def count(*shapes: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return formula(dict(zip(names, shapes)))


def count(y: torch.Tensor, flops: Callable[[Shapes], int], given: Any) -> torch.Tensor:
    """y; a FLOP counter at work sees what an operator that is made of aten's, most of which have no FLOPs, took."""
    if counting():
        names = [part.split()[-1] for part in schema(type(given)).split(', ')]
        number = flops({name: getattr(x, 'shape', x) for name, x in zip(names, given.flat())})
        torch.ops.vim_timm.flops(y.detach(), number)
        if y.requires_grad:
            y.register_hook(lambda grad: torch.ops.vim_timm.flops(grad.detach(), 2 * number))
    return y


def counting() -> bool:
    """Whether a FLOP counter is at work, and no graph is being traced."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return any('FlopCounter' in type(mode).__name__ for mode in _get_current_dispatch_mode_stack())


library.define('flops(Tensor x, int number) -> ()')
library.impl('flops', lambda x, number: None, 'CompositeExplicitAutograd')
register_flop_formula(torch.ops.vim_timm.flops)(lambda shape, number, **kwargs: number)


def scan_flops(shapes: Shapes) -> int:
    """FLOPs of `operands.Scan`."""
    directions = 1 if shapes['u_b'] is None else 2
    extras = (shapes['D'] is not None) + (shapes['z'] is not None)
    return math.prod(_shape(shapes, 'u')) * (9 * directions * _shape(shapes, 'A_log')[1] + extras)


def conv_flops(shapes: Shapes) -> int:
    """FLOPs of `operands.Conv`."""
    directions = 1 if shapes['weight_b'] is None else 2
    return 2 * directions * math.prod(_shape(shapes, 'x')) * _shape(shapes, 'weight')[1]


def mixer_flops(shapes: Shapes) -> int:
    """FLOPs of `operands.Mixer`: the sum over the operators of the composition."""
    batch, length, both = _shape(shapes, 'xz')
    products = sum(2 * _shape(shapes, name)[axis] for name, axis in (('conv', -1), ('x_proj', 0), ('dt', 1)))
    out_proj = shapes.get('out_proj')
    inside = 2 * products + 2 * 9 * _shape(shapes, 'A_log')[1] + 2 + (0 if out_proj is None else 2 * out_proj[0])
    return batch * length * both // 2 * inside


SSD_WHOLE = 512  # tokens up to which a symmetric state space dual is one product of scores
SSD_CHUNK = 128  # tokens of a chunk of a longer one


def ssd_flops(shapes: Shapes) -> int:
    """FLOPs of `operands.Ssd`: the products of the form that plain torch takes at the sequence's length."""
    batch, length, heads, headdim = _shape(shapes, 'x')
    state = _shape(shapes, 'B')[-1]
    if length <= SSD_WHOLE:
        return 2 * batch * length * length * (state + heads * headdim)
    chunks, orders = -(-length // SSD_CHUNK), _shape(shapes, 'A_log')[0]
    inside = SSD_CHUNK * SSD_CHUNK * (state + heads * headdim)
    states = heads * headdim * state * (2 * SSD_CHUNK + chunks)  # made, read, and taken to every other chunk
    return 2 * batch * orders * chunks * (inside + 2 * states)


def grid_conv_flops(shapes: Shapes) -> int:
    """FLOPs of `operands.GridConv`."""
    return 18 * math.prod(_shape(shapes, 'x'))


def grid_mixer_flops(shapes: Shapes) -> int:
    """FLOPs of `operands.GridMixer`: nine taps, what `ssd_flops` counts, and out_proj; norm and gate count nothing."""
    batch, length, _ = _shape(shapes, 'zxbcdt')
    channels, dim, A_log = _shape(shapes, 'conv')[0], _shape(shapes, 'norm')[0], _shape(shapes, 'A_log')
    x, B = (batch, length, A_log[1], dim // A_log[1]), (batch, length, (channels - dim) // 2)
    out_proj = shapes.get('out_proj')
    taps, product = 18 * channels, 0 if out_proj is None else 2 * dim * out_proj[0]
    return batch * length * (taps + product) + ssd_flops({'x': x, 'B': B, 'A_log': A_log})


def masked_grid_mixer_flops(shapes: Shapes) -> int:
    """FLOPs of `operands.GridMixer` where patches are hidden, whose convolution counts as the whole image's: backends
    without this operator compute that."""
    batch, length, _ = _shape(shapes, 'zxbcdt')
    given: Any = shapes  # numbers as they are
    hidden = given['prefix'] + given['height'] * given['width'] - length
    return grid_mixer_flops(shapes) + 18 * batch * hidden * _shape(shapes, 'conv')[0]


def swiglu_flops(shapes: Shapes) -> int:
    """FLOPs of `operands.SwiGlu`: both products."""
    rows = math.prod(_shape(shapes, 'x')[:-1])
    return 2 * rows * (math.prod(_shape(shapes, 'weight')) + math.prod(_shape(shapes, 'out')))


def count_depthwise(y: torch.Tensor, x: torch.Tensor, conv: torch.nn.Module) -> None:
    """Have a FLOP counter at work find twice the FLOPs of y, a depthwise convolution of x, in its backward pass.

    torch's formula takes the gradient of a grouped convolution's weight for that of a full one.
    """
    if not counting() or not y.requires_grad:
        return
    weight = getattr(conv, 'weight', None)
    if not isinstance(weight, torch.Tensor) or weight.shape[1] != 1:
        return
    mask = [x.requires_grad, weight.requires_grad, False]
    others = (None, None, None, None, False, None, weight.shape[0], mask)
    found = flop_registry[torch.ops.aten.convolution_backward](y, x, weight, *others, out_val=[x, weight, None])
    wanted = 4 * y.numel() * weight[0].numel()
    y.register_hook(lambda grad: torch.ops.vim_timm.flops(grad.detach(), wanted - found))


def uncounted(shapes: Shapes) -> int:
    """FLOPs of an operator that is counted elsewhere, or not at all, like torch's norms."""
    return 0


def _shape(shapes: Shapes, name: str) -> Tuple[int, ...]:
    shape = shapes[name]
    assert shape is not None
    return tuple(shape)
