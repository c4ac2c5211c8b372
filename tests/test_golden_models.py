"""A model built from an original checkpoint computes the original's numbers: every value, every gradient."""

import golden_data
import numpy as np
import pytest
import torch

from vim_timm import use_scan_backend
from vim_timm.hub import from_original
from vim_timm.layers.token_order import to_scan_order
from vim_timm.models.vision_mamba import checkpoint_filter_fn

CASES = golden_data.cases('models')
BACKENDS = ('reference', 'torch')


def close(actual: torch.Tensor, expected: np.ndarray, rope: bool) -> None:
    """Equal, relative to the largest absolute value of the reference."""
    scale = max(np.abs(expected).max(), 1e-12)
    error = np.abs(actual.detach().numpy() - expected).max() / scale
    assert error <= golden_data.tolerance(expected, rope), error


def build(path, dtype: torch.dtype):
    arrays, meta = golden_data.load(path)
    state_dict = {name: torch.from_numpy(value) for name, value in golden_data.split(arrays, 'state').items()}
    model = from_original(state_dict, **golden_data.original_kwargs(meta), dtype=dtype).eval()
    return model, arrays, meta


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('path', CASES, ids=lambda path: path.stem)
def test_logits_and_gradients_in_float64(path, backend):
    model, arrays, meta = build(path, torch.float64)
    rope = model.rope
    image = torch.from_numpy(arrays['input']).double().requires_grad_()
    with use_scan_backend(backend):
        features = model.forward_head(model.forward_features(image), pre_logits=True)
        logits = model(image)
        close(features, arrays['features'], rope)
        close(logits, arrays['logits'], rope)
        loss = (logits * torch.from_numpy(arrays['loss_weights'])).sum()
        loss.backward()
    close(loss, arrays['loss'], rope)
    close(image.grad, arrays['grad_input'], rope)

    gradients = {name: torch.from_numpy(value) for name, value in golden_data.split(arrays, 'grad').items()}
    expected = checkpoint_filter_fn(gradients, model)
    actual = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        close(actual[name], gradient.numpy(), rope)


@pytest.mark.parametrize('path', CASES, ids=lambda path: path.stem)
def test_every_block_in_float64(path):
    model, arrays, meta = build(path, torch.float64)
    image = torch.from_numpy(arrays['input']).double()
    with use_scan_backend('torch'), torch.no_grad():
        final, streams = model.forward_intermediates(image, return_prefix_tokens=True, output_fmt='NLC')
        close(model.patch_embed(image), arrays['patch_tokens'], rope=False)
    hidden, residual = golden_data.split(arrays, 'block_hidden'), golden_data.split(arrays, 'block_residual')
    assert len(streams) == len(hidden)
    if model.num_prefix_tokens:
        streams = [torch.cat([prefix, patches], dim=1) for patches, prefix in streams]
    for i, stream in enumerate(streams):
        # the original keeps a block's output apart from the stream it is added to
        close(to_scan_order(stream, model.class_token), residual[str(i)] + hidden[str(i)], model.rope)
    close(to_scan_order(final, model.class_token), arrays['norm_f_out'], model.rope)


@pytest.mark.parametrize('path', CASES, ids=lambda path: path.stem)
def test_logits_in_float32(path):
    model, arrays, meta = build(path, torch.float32)
    with torch.no_grad():
        logits = model(torch.from_numpy(arrays['input'])).double().numpy()
    allowed = max(10 * meta['max_abs_logits_f32run_minus_f64'], 1e-4 * meta['max_abs_logits'])
    assert np.abs(logits - arrays['logits']).max() <= allowed


NAMES = [name for name in golden_data.load_json('state_dicts/summary.json') if not name.startswith('feb2024/')]


@pytest.mark.parametrize('name', NAMES)
def test_published_checkpoints_load_by_name_and_shape(name):
    published = golden_data.load_json(f'state_dicts/{name}.json')
    state_dict = {key: torch.empty(shape, device='meta') for key, shape in published['state_dict'].items()}
    kwargs = published['kwargs']
    if name.startswith('early/'):
        kwargs |= dict(
            if_cls_token='cls_token' in state_dict,
            if_divide_out=False,
            use_middle_cls_token=False,
            stride=kwargs['patch_size'],
        )
    model = from_original(state_dict, **kwargs, device='meta')
    assert sum(parameter.numel() for parameter in model.parameters()) == published['num_parameters']
