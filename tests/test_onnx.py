"""ONNX graphs compute a model's logits at any batch size, by torch's exporter and by its older one."""

import contextlib
import io

import pytest
import timm
import torch

import vim_timm  # noqa: F401  registers the models

pytest.importorskip('onnxscript')
onnxruntime = pytest.importorskip('onnxruntime')

SMALL = dict(embed_dim=32, depth=1, num_classes=10)
MODELS = {
    'vim': ('vim_nano_patch4_32', dict(img_size=28)),
    'one token': ('vim_nano_patch4_32', dict(img_size=4, class_token='none', global_pool='avg')),
    'two tokens': ('vim_nano_patch4_32', dict(img_size=4)),
    'shared': ('vim_nano_patch4_32', dict(img_size=8, scan='shared', norm_layer='layernorm')),
    'vim2': ('vim2_nano_patch4_32', dict(img_size=(8, 20), headdim=16, d_state=16)),
    'vim2 with all options': (
        'vim2_nano_patch4_32',
        dict(img_size=8, headdim=16, d_state=16, stem='conv', class_token='middle', bc_norm=True, rope=True),
    ),
    'hybrid': ('vim_hybrid_tiny_patch4_32', dict(img_size=8, ssm='mamba', num_heads=2)),
}


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('dynamo, kind', [
    *((False, kind) for kind in MODELS), *((True, kind) for kind in ('vim', 'vim2 with all options', 'hybrid')),
])  # fmt: skip
def test_onnx_computes_the_same_for_any_batch(dynamo, kind, tmp_path):
    name, kwargs = MODELS[kind]
    torch.manual_seed(0)
    model = timm.create_model(name, **SMALL, **kwargs).eval()
    images = torch.randn(3, 3, *model.patch_embed.img_size)
    path = tmp_path / 'model.onnx'
    any_batch = {'dynamic_shapes': ({0: torch.export.Dim('batch', min=1)},)} if dynamo else {
        'dynamic_axes': {'images': {0: 'batch'}}
    }  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(model, (images[:2],), path, dynamo=dynamo, input_names=['images'], **any_batch)
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    for batch in (1, 3):
        (logits,) = session.run(None, {'images': images[:batch].numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(images[:batch]).detach(), rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', ['mae_vim_tiny_patch4_32', 'mae_vim2_tiny_patch4_32', 'mae_favit_small_patch16_224'])
def test_a_masked_autoencoder_is_exported_and_traced_with_its_noise(name, tmp_path):
    """As a second input: ONNX draws no masks."""
    sizes = dict(img_size=32, depth=1, decoder_dim=32, decoder_depth=1, decoder_heads=2)
    model = timm.create_model(name, **sizes).eval()
    images = torch.randn(2, model.in_chans, 32, 32)
    noise = torch.randint(0, 9, (2, model.num_patches((32, 32)))).float()  # of equal numbers the first is taken
    path = tmp_path / 'model.onnx'
    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(model, (images, noise), path, dynamo=True, input_names=['images', 'noise'])
        with pytest.raises(Exception, match=r'ONNX draws no masks: give noise \(B, \d+\) as a second input'):
            torch.onnx.export(model, (images,), path, dynamo=True)
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    outputs = session.run(None, {'images': images.numpy(), 'noise': noise.numpy()})
    traced = torch.jit.trace(model, (images, noise))
    for output, again, expected in zip(outputs, traced(images, noise), model(images, noise)):
        torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(again, expected)
