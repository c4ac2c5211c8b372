"""Whole models stay finite in half precision, and right where numbers are large."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F

import vim_timm  # noqa: F401  registers the models

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs an NVIDIA GPU')]
SMALL = {
    'vim_nano_patch4_32': dict(),
    'vim2_nano_patch4_32': dict(headdim=16, d_state=16),
    'vim_hybrid_tiny_patch4_32': dict(num_heads=2, d_state=16),
}


DEVICES = ['cpu', pytest.param('cuda', marks=GPU)]


def build(name):
    torch.manual_seed(0)
    return timm.create_model(name, img_size=16, embed_dim=32, depth=2, num_classes=5, **SMALL[name])


def train_300_steps(model, device, dtype, lr):
    """Losses of AMP steps on four noisy images, none of whose gradients is infinite or no number."""
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    size = model.pretrained_cfg['input_size'][-1] if device == 'cuda' else 16
    images, targets = torch.randn(4, 3, size, size, device=device), torch.arange(4, device=device)
    scale = 1024 if dtype == torch.float16 else 1  # small gradients would vanish
    losses = []
    for _ in range(300):
        with torch.autocast(device, dtype):
            loss = F.cross_entropy(model(images + 0.1 * torch.randn_like(images)), targets)
        optimizer.zero_grad()
        (scale * loss).backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        assert torch.nn.utils.get_total_norm(gradients).isfinite(), f'step {len(losses)}'
        torch._foreach_div_(gradients, scale)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize('name', [name for name in SMALL if name != 'vim_nano_patch4_32'])
def test_300_steps_in_bfloat16_without_a_gradient_that_is_not_finite(name):
    losses = train_300_steps(build(name), 'cpu', torch.bfloat16, 3e-3)
    assert losses[-1] < 0.1 < 1 < losses[0]


@pytest.mark.parametrize('device', [pytest.param('cuda', marks=GPU)])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name', ['vim_tiny_patch16_224', 'vim2_tiny_patch16_224', 'vim_hybrid_tiny_patch4_32'])
def test_300_steps_of_registered_models_on_a_gpu(name, dtype, device):
    torch.manual_seed(0)
    losses = train_300_steps(timm.create_model(name, num_classes=5), device, dtype, 3e-4)
    assert losses[-1] < 0.1 < 1 < losses[0]


def largest_activation(model, images):
    """The largest output of any module, and the features."""
    largest = [0.0]

    def look(module, args, output):
        largest.append(output.abs().max().item())

    hooks = [module.register_forward_hook(look) for module in model.modules() if not list(module.children())]
    features = model.forward_features(images)
    for hook in hooks:
        hook.remove()
    return max(largest), features


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('part', ['images', 'weights', 'both'])
@pytest.mark.parametrize('name', SMALL)
def test_activations_of_ten_thousand_stay_within_a_hundredth_of_float64(name, part, device):
    model, images = build(name).to(device).eval(), torch.randn(2, 3, 16, 16).to(device)
    reached = 0.0
    with torch.no_grad():
        while reached < 1e4:
            if part != 'weights':
                images = images * 2
            for module in model.modules() if part != 'images' else ():
                if isinstance(module, (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d)):
                    module.weight.mul_(1.5)
            reached, _ = largest_activation(model, images)
    assert reached < 1e6
    exact = copy.deepcopy(model).double()
    wanted = exact.forward_features(images.double())
    features = model.forward_features(images)
    assert (features - wanted).norm() < 1e-2 * wanted.norm()
    direction = torch.randn_like(features)  # the square of a norm's output would have no gradient
    (features * direction).sum().backward()
    (wanted * direction).sum().backward()
    rounding = 1e-7 * max(other.grad.norm() for other in exact.parameters() if other.grad is not None)
    for (where, parameter), other in zip(model.named_parameters(), exact.parameters()):
        if other.grad is not None:
            assert parameter.grad.isfinite().all(), where
            assert (parameter.grad - other.grad).norm() <= 1e-2 * other.grad.norm() + rounding, where
