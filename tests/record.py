"""Logits, losses of ten training steps and all gradients of a few models on every backend, bit by bit.

    python tests/record.py store FILE [BACKEND ...]        in the tree before a change that must not change numbers
    python tests/record.py compare FILE [BACKEND ...]      in the tree after it, on the same machine

Triton's kernels run under its interpreter where there is no GPU. Takes a minute on a CPU.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import timm
import torch
import torch.nn.functional as F

import vim_timm  # noqa: F401  registers the models
from vim_timm.ops import use_scan_backend

MODELS = {
    'v2': dict(),
    'wide_conv': dict(d_conv=5, d_state=8),
    'v1': dict(scan='shared', class_token='head'),
    'forward': dict(scan='forward', class_token='none', global_pool='last'),
    'rope': dict(rope=True, halve=False, weight_init='early', class_token='none', global_pool='avg'),
    'rope_latest': dict(rope=True, rope_residual=False),
    'double': dict(class_token='double', norm_layer='layernorm', init_values=0.1, proj_bias=True, fc_norm=True),
    'overlap': dict(img_size=(24, 40), patch_size=8, stride=4, dynamic_img_size=True),
    'random': dict(random_token_order=True, random_class_position=True, drop_path_rate=0.3, proj_drop_rate=0.1),
}
BACKENDS = {'cpu': ('cpu', 'torch', 'export', 'reference', 'triton'), 'cuda': ('auto', 'triton', 'torch', 'export')}


def record_model(name: str, device: str, backend: str, dtype: torch.dtype | None, steps: int) -> dict:
    """One model's numbers; autocast to `dtype`."""
    torch.manual_seed(0)
    interpreted = backend == 'triton' and device == 'cpu'
    size = dict(depth=1, img_size=12, embed_dim=32) if interpreted else dict(depth=2, img_size=32, embed_dim=64)
    model = timm.create_model('vim_nano_patch4_32', num_classes=10, **{**size, **MODELS[name]}).to(device)
    images = torch.randn(3, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(1)).to(device)
    target = torch.tensor([1, 2, 3], device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    found = {}
    with use_scan_backend(backend), torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None):
        with torch.no_grad():
            found['logits'] = model.eval()(images)
        model.train()
        for step in range(steps):
            torch.manual_seed(step)
            loss = F.cross_entropy(model(images), target)
            optimizer.zero_grad()
            loss.backward()
            found[f'loss of step {step}'] = loss.detach()
            if step == 0:
                found |= {f'gradient of {key}': p.grad.clone() for key, p in model.named_parameters()}
            optimizer.step()
    found |= {f'{key} after {steps} steps': p.detach().clone() for key, p in model.named_parameters()}
    return {f'{backend} {name} {dtype or "float32"}: {key}': value.cpu() for key, value in found.items()}


def record(device: str, backend: str) -> dict:
    """Every model's numbers on a backend, in this process."""
    torch.set_num_threads(1)
    interpreted = backend == 'triton' and device == 'cpu'
    steps = 1 if interpreted else 3 if backend == 'reference' else 10
    found = {}
    for name in ('v2', 'v1') if interpreted else MODELS:
        found |= record_model(name, device, backend, None, steps)
        if device == 'cuda' or (backend, name) == ('cpu', 'v2'):
            found |= record_model(name, device, backend, torch.bfloat16, steps)
    return found


def record_all(device: str, backends: list[str], **environment: str) -> dict:
    """Every backend's numbers, each backend in a process of its own with further variables of the environment."""
    everything = {}
    with tempfile.TemporaryDirectory() as folder:
        for backend in backends:
            places = os.pathsep.join([os.getcwd(), os.environ.get('PYTHONPATH', '')])
            own = dict(os.environ, PYTHONPATH=places, **environment)
            own['TRITON_INTERPRET'] = str(int(backend == 'triton' and device == 'cpu'))
            part = Path(folder) / f'{backend}.pt'
            subprocess.run([sys.executable, __file__, 'one', device, backend, part], check=True, env=own)
            everything |= torch.load(part)
    return everything


def differing(before: dict, after: dict) -> list[str]:
    """Names of numbers that are not the same bits."""
    return [key for key, value in before.items() if key not in after or not torch.equal(value, after[key])]


def main(arguments: list[str]) -> int:
    if arguments[0] == 'one':
        torch.save(record(*arguments[1:3]), arguments[3])
        return 0
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    backends = arguments[2:] or list(BACKENDS[device])
    found = record_all(device, backends)
    if arguments[0] == 'store':
        torch.save(found, arguments[1])
        print(f'{len(found)} tensors stored')
        return 0
    before = {key: value for key, value in torch.load(arguments[1]).items() if key.split()[0] in backends}
    odd = differing(before, found)
    print(f'{len(before)} tensors, {len(odd)} differ', *odd[:20], sep='\n')
    return int(bool(odd))


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
