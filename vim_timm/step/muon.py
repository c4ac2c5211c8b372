"""timm's Muon family with its matrices in batches: a few launches for each shape, not for each parameter.

The arithmetic and the state in checkpoints are those of `timm.optim.Muon` (Muon, AdaMuon, their Nesterov variants, and
AdamW or NAdamW for what is no matrix). What differs is that nothing of it asks the host: counts of steps live on the
device, the learning rate may be a tensor there, and an update that `found_inf` calls bad changes nothing.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm.optim import muon as timm_muon
from timm.optim.muon import Muon


class _Packed:
    """Some parameters of one dtype, whose state is one flat tensor a name; each one's own state is a view of it."""

    def __init__(self, params: list[torch.Tensor], state: Any, names: tuple[str, ...], counts: bool):
        self.params = params
        self.sizes = [parameter.numel() for parameter in params]
        self.owners: torch.Tensor | None = None
        self.flat: dict[str, torch.Tensor] = {}
        for name in names:
            before = [state[p].get(name) if name in state[p] else torch.zeros_like(p) for p in params]
            self.flat[name] = torch.cat([part.to(p.device, p.dtype).reshape(-1) for p, part in zip(params, before)])
            for p, part in zip(params, self.flat[name].split(self.sizes)):
                state[p][name] = part.view(p.shape)
        if counts:
            steps = [torch.as_tensor(state[p].get('step', 0.0), dtype=torch.float32) for p in params]
            self.steps = torch.stack([step.to(p.device) for p, step in zip(params, steps)])
            for p, step in zip(params, self.steps.unbind()):
                state[p]['step'] = step

    def gradients(self, bad: torch.Tensor) -> torch.Tensor:
        """All gradients in one tensor, zeros where the update is bad."""
        flat = torch.cat([p.grad.reshape(-1) for p in self.params if p.grad is not None])
        return torch.where(bad > 0, torch.zeros_like(flat), flat)

    def each(self, values: torch.Tensor) -> torch.Tensor:
        """Of one value a parameter (n,), one an element."""
        if self.owners is None:
            lengths = torch.tensor(self.sizes, device=values.device)
            self.owners = torch.arange(len(self.sizes), device=values.device).repeat_interleave(lengths)
        return values[self.owners]

    def move(self, decay: torch.Tensor, by: torch.Tensor) -> None:
        """Multiply the parameters by `decay` () and add the flat tensor `by`."""
        torch._foreach_mul_(self.params, decay)
        torch._foreach_add_(self.params, [part.view(p.shape) for p, part in zip(self.params, by.split(self.sizes))])


def _keep(old: torch.Tensor, new: torch.Tensor, bad: torch.Tensor) -> None:
    old.copy_(torch.where(bad > 0, old, new))


class BatchedMuon(Muon):
    """timm's Muon, a batch of matrices at a time. Arguments, parameter groups and state are timm's."""

    _step_supports_amp_scaling = True  # reads found_inf
    found_inf: torch.Tensor | None = None

    def __init__(self, params: Any, **arguments: Any):
        super().__init__(params, **arguments)
        self._packs: dict[Any, _Packed] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._packs = {}  # the state is another's now

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update, unless `found_inf` () is 1."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            adaptive = group['algo'] == 'adamuon'
            for (matrices, *rest), params in self._alike(group):
                key = (number, matrices, *rest)
                known = self._packs.get(key)
                if known is None or list(map(id, known.params)) != list(map(id, params)):
                    first = ('momentum_buffer', *(['exp_avg_sq'] if adaptive else []))
                    names = first if matrices else ('exp_avg', 'exp_avg_sq')
                    self._packs[key] = _Packed(params, self.state, names, adaptive or not matrices)
                bad = self.found_inf
                bad = torch.zeros((), device=params[0].device) if bad is None else bad
                (self._matrices if matrices else self._others)(group, self._packs[key], bad)
        return loss

    def _alike(self, group: dict[str, Any]) -> Iterator[tuple[tuple[Any, ...], list[torch.Tensor]]]:
        """The parameters with gradients that go together: matrices of one shape, all others of one dtype."""
        found: dict[tuple[Any, ...], list[torch.Tensor]] = {}
        for p in group['params']:
            if p.grad is None:
                continue
            state = self.state[p]
            if 'use_muon' not in state:
                chosen = False if group.get('use_fallback', False) else group.get('use_muon')
                state['use_muon'] = timm_muon._is_suitable_for_muon(p) if chosen is None else chosen
            matrices = bool(state['use_muon'])
            found.setdefault((matrices, p.dtype, p.device, *(p.shape if matrices else ())), []).append(p)
        return iter(found.items())

    def _others(self, group: dict[str, Any], packed: _Packed, bad: torch.Tensor) -> None:
        """AdamW, or NAdamW with Nesterov's momentum."""
        good, (beta1, beta2) = 1 - bad, group['betas']
        rate = group['lr'] * group['fallback_lr_scale']
        gradient, average, square = packed.gradients(bad), packed.flat['exp_avg'], packed.flat['exp_avg_sq']
        packed.steps.add_(good)
        average.lerp_(gradient, ((1 - beta1) * good).to(average.dtype))
        _keep(square, square.mul(beta2).addcmul_(gradient, gradient, value=1 - beta2), bad)
        correction1, correction2 = (1 - torch.pow(beta, packed.steps.clamp(min=1)) for beta in (beta1, beta2))
        ahead = average.lerp(gradient, 1 - beta1) if group['nesterov'] else average
        scale = packed.each(good * rate / correction1)
        update = ahead / (square.sqrt() / packed.each(correction2.sqrt())).add_(group['eps'])
        packed.move(1 - rate * group['weight_decay'] * good, (update * -scale).to(average.dtype))

    def _matrices(self, group: dict[str, Any], packed: _Packed, bad: torch.Tensor) -> None:
        """Muon, or AdaMuon."""
        good, shape, count = 1 - bad, packed.params[0].shape, len(packed.params)
        gradient, buffer = packed.gradients(bad), packed.flat['momentum_buffer']
        buffer.lerp_(gradient, ((1.0 - group['momentum']) * good).to(buffer.dtype))
        update = gradient.lerp(buffer, group['momentum']) if group['nesterov'] else buffer
        update, one = self._orthogonal(group, update.view(count, *shape))
        update = update.reshape(count, -1).to(buffer.dtype)
        scale, adjust = 1.0, group['adjust_lr_fn']
        if group['algo'] == 'adamuon':
            scale, normalizes = timm_muon.get_adamuon_lr_scale(one, adjust) if adjust else (1.0, False)
            square, beta2 = packed.flat['exp_avg_sq'].view(count, -1), group['betas'][1]
            packed.steps.add_(good)
            _keep(square, square.mul(beta2).addcmul_(update, update, value=1.0 - beta2), bad)
            if normalizes:
                update = update / square.sqrt().add_(group['eps'])
                update = update / update.norm(dim=1, keepdim=True).add_(group['eps'])
            else:
                correction = 1.0 - torch.pow(beta2, packed.steps.clamp(min=1))
                update = update / (square / correction[:, None]).sqrt().add_(group['eps'])
        elif adjust:
            scale = timm_muon.get_lr_scale(one, adjust)
        if group['conv_mode'] == 'batched' and len(shape) >= 3 and group['normalize_spatial']:
            scale *= shape[2:].numel() ** -0.5
        moved = (update * (-group['lr'] * scale * good)).to(buffer.dtype)
        packed.move(1 - group['lr'] * group['weight_decay'] * good, moved.reshape(-1))

    def _orthogonal(self, group: dict[str, Any], update: torch.Tensor) -> tuple[torch.Tensor, torch.Size]:
        """Newton-Schulz of n parameters (n, out, in, ...) at once, and the shape of what it sees of one of them."""
        count, out, inner, *space = update.shape
        if not space or group['conv_mode'] == 'flatten':
            matrices = update.reshape(count, out, -1)
            one = matrices.shape[1:]
        else:  # each place of a convolution's kernel is a matrix
            matrices = update.reshape(count, out, inner, -1).permute(0, 3, 1, 2)
            one = matrices.shape[1:]
            matrices = matrices.reshape(-1, out, inner)
        coefficients = timm_muon.resolve_ns_coefficients(group['ns_coefficients'], timm_muon._COEFFICIENTS)
        result = timm_muon.zeropower_via_newtonschulz(
            matrices, group['ns_steps'], coefficients, eps=group['eps'], safety_factor=group['safety_factor'],
            scale_eps=group['scale_eps'],
        )  # fmt: skip
        if len(one) == 3:
            result = result.view(count, *one).permute(0, 2, 3, 1)
        return result, one


def batched(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """timm's Muon as this one, if it is to say nothing of each parameter; any other optimizer as it is."""
    if type(optimizer) is not Muon or optimizer.defaults['verbose']:
        return optimizer
    params = list(itertools.chain.from_iterable(group['params'] for group in optimizer.param_groups))
    if any(p.is_sparse or p.is_complex() for p in params):
        return optimizer
    return BatchedMuon(optimizer.param_groups, **optimizer.defaults)
