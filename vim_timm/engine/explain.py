"""Where a model looks: how much each patch of an image speaks for a class.

A state space model has no attention map to show, and what it knows of a patch travels on through later tokens. So the
patches themselves are asked: `integrated_gradients` follows the logit from a grey image to the image (Sundararajan et
al., Axiomatic Attribution for Deep Networks, 2017), through both directions of every scan, and adds up what each patch
contributed. `measure` compares such a map with others by deletion and insertion (Petsiuk et al., RISE, 2018).
"""

from collections.abc import Callable
from typing import Any

import torch

STEPS = 16


def _grid(model: Any, images: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of the map: the model's patches, else 14 x 14."""
    size = getattr(getattr(model, 'patch_embed', None), 'grid_size', None) or (14, 14)
    return min(size[0], images.shape[-2]), min(size[1], images.shape[-1])


def _pool(values: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """(B, H, W) -> (B, h, w) in 0..1: what speaks for the class, each image by its own largest value."""
    values = torch.nn.functional.adaptive_avg_pool2d(values[:, None], grid)[:, 0].clamp(min=0)
    return values / values.amax((1, 2), keepdim=True).clamp(min=1e-12)


def integrated_gradients(model: Any, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Contribution of each patch to the logit of its image's label.

    Args:
        images: (B, C, H, W), normalized, so that zero is a grey image.
        labels: (B,) int64.

    Returns:
        (B, h, w) in 0..1, a value a patch.
    """
    return _pool(contributions(model, images, labels).sum(1), _grid(model, images))


def contributions(model: Any, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Contribution of each pixel (B, C, H, W) to the logit; they add up to its difference from the grey image's.

    Norms make a model change most where the image is almost grey: steps of the path are the shorter the nearer to that.
    """
    total = torch.zeros_like(images)
    ends = [(step / STEPS) ** 3 for step in range(STEPS + 1)]
    for low, high in zip(ends, ends[1:]):
        total += (high - low) * _gradient(model, images * ((low + high) / 2), labels)
    return images * total


def _gradient(model: Any, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        images = images.detach().clone().requires_grad_()
        logits = model(images).float()
        return torch.autograd.grad(logits.gather(1, labels[:, None]).sum(), images)[0]


def grad_cam(model: Any, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Gradient times activation of the patches after the last block (Selvaraju et al., Grad-CAM, 2017); to compare."""
    taken: list[torch.Tensor] = []
    hook = model.norm.register_forward_hook(lambda module, inputs, output: taken.append(output))
    try:
        with torch.enable_grad():
            logits = model(images.detach()).float()
            (gradient,) = torch.autograd.grad(logits.gather(1, labels[:, None]).sum(), taken)
    finally:
        hook.remove()
    return _tokens_to_map(model, (gradient.mean(1, keepdim=True) * taken[0]).sum(2), _grid(model, images))


def occlusion(model: Any, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Logit that is lost where a patch is made grey (Zeiler and Fergus, 2014), a forward pass a patch; to compare."""
    rows, columns = _grid(model, images)
    lost = images.new_zeros(len(images), rows * columns, dtype=torch.float32)
    with torch.no_grad():
        whole = model(images).float().gather(1, labels[:, None])[:, 0]
        for place in range(rows * columns):
            kept = images.new_ones(1, 1, rows * columns)
            kept[..., place] = 0
            mask = torch.nn.functional.interpolate(kept.unflatten(2, (rows, columns)), images.shape[-2:])
            lost[:, place] = whole - model(images * mask).float().gather(1, labels[:, None])[:, 0]
    return _pool(lost.unflatten(1, (rows, columns)), (rows, columns))


def _tokens_to_map(model: Any, values: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    values = values[:, getattr(model, 'num_prefix_tokens', 0) :].unflatten(1, grid)
    return _pool(values.detach(), grid)


def measure(
    model: Any, images: torch.Tensor, labels: torch.Tensor, heat: torch.Tensor, steps: int = 16
) -> tuple[float, float]:
    """Mean probability of the label while patches are taken away, the hottest first (deletion: low is good), and while
    they are put into a grey image (insertion: high is good).

    Args:
        heat: (B, h, w), the map of each image.
    """
    order = heat.flatten(1).argsort(dim=1, descending=True).argsort(dim=1).unflatten(1, heat.shape[1:])
    count, curves = heat[0].numel(), ([], [])  # type: ignore[var-annotated]
    for step in range(steps + 1):
        hot = (order < round(count * step / steps))[:, None].to(images.dtype)
        mask = torch.nn.functional.interpolate(hot, images.shape[-2:], mode='nearest')
        for curve, part in zip(curves, (1 - mask, mask)):
            with torch.inference_mode():
                scores = model(images * part).float().softmax(1)
            curve.append(scores.gather(1, labels[:, None]).mean())
    deletion, insertion = (float(torch.trapezoid(torch.stack(curve), dx=1 / steps)) for curve in curves)
    return deletion, insertion


METHODS: dict[str, Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    'integrated gradients': integrated_gradients,
    'occlusion': occlusion,
    'Grad-CAM': grad_cam,
}
