"""What timm's scripts and users do with a model, where timm's own tests do not look."""

import io
import weakref
from copy import deepcopy

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from timm.optim import create_optimizer_v2
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from vim_timm import VisionMamba


def tiny(**kwargs) -> VisionMamba:
    """A registered model of 4 x 4 patches."""
    torch.manual_seed(0)
    defaults = dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_classes=10, dynamic_img_size=False)
    return timm.create_model('test_vim', **{**defaults, **kwargs}).eval()


def images(size: int = 32, batch: int = 2, channels: int = 3) -> torch.Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


def train_step(model: nn.Module, image: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and gradients of one training step with fixed random numbers."""
    torch.manual_seed(2)
    model.zero_grad()
    logits = model.train()(image)
    logits.square().sum().backward()
    return logits.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def test_get_classifier_is_the_head():
    model = tiny()
    assert model.get_classifier() is model.head
    assert model.get_classifier() is getattr(model, model.default_cfg['classifier'])
    assert isinstance(tiny(num_classes=0).get_classifier(), nn.Identity)


@pytest.mark.parametrize('kwargs', [
    {}, dict(drop_path_rate=0.5, proj_drop_rate=0.1), dict(rope=True), dict(scan='shared'),
    dict(random_token_order=True),
], ids=str)  # fmt: skip
def test_gradient_checkpointing_changes_neither_outputs_nor_gradients(kwargs):
    model = tiny(**kwargs)
    logits, gradients = train_step(model, images())
    model.set_grad_checkpointing()
    assert model.grad_checkpointing
    checkpointed_logits, checkpointed_gradients = train_step(model, images())
    torch.testing.assert_close(checkpointed_logits, logits)
    for name, gradient in gradients.items():
        torch.testing.assert_close(checkpointed_gradients[name], gradient)
    model.set_grad_checkpointing(enable=False)
    assert not model.grad_checkpointing


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors created inside the mode hold at one time."""

    def __init__(self):
        super().__init__()
        self.live, self.bytes, self.peak = set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.track, result)
        return result

    def track(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.live:
            self.live.add(key)
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self.release, key, size)

    def release(self, key, size):
        self.live.discard(key)
        self.bytes -= size


def test_gradient_checkpointing_halves_the_peak_of_a_training_step():
    model = timm.create_model('vim_tiny_patch16_224').train()
    model(images(224, batch=1)).sum().backward()  # gradients exist before and after
    peaks = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        with PeakMemory() as memory:
            model(images(224, batch=8)).sum().backward()
        peaks.append(memory.peak)
    assert peaks[1] <= peaks[0] / 2, peaks


def test_group_matcher_covers_every_parameter():
    model = tiny()
    groups = timm.models.group_parameters(model, model.group_matcher())
    names = [name for group in groups.values() for name in group]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert len(groups) == 1 + 3 + 1  # stem, blocks (the last with the norm), head


@pytest.mark.parametrize('kwargs', [
    {}, dict(class_token='none', global_pool='avg'), dict(class_token='double'), dict(pos_embed=False),
    dict(scan='shared'), dict(scan='forward'), dict(decay_state=True)], ids=str)  # fmt: skip
def test_no_weight_decay_names_parameters_that_exist(kwargs):
    model = tiny(**kwargs)
    listed = model.no_weight_decay()
    assert listed <= dict(model.named_parameters()).keys()
    assert all(name in listed for name in ('cls_token', 'pos_embed') if getattr(model, name) is not None)
    state = {name for name, _ in model.named_parameters() if name.endswith(('A_log', 'A_b_log', '.D', '.D_b'))}
    assert (state & listed) == (set() if kwargs.get('decay_state') else state)


def test_an_optimizer_with_layer_decay_trains():
    model = tiny().train()
    optimizer = create_optimizer_v2(model, opt='adamw', lr=1e-2, weight_decay=0.05, layer_decay=0.75)
    target = torch.tensor([3, 7])
    losses = []
    for _ in range(5):
        loss = nn.functional.cross_entropy(model(images()), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize('backend', ['eager', 'aot_eager'])
@pytest.mark.parametrize('kwargs', [
    {}, dict(scan='shared', class_token='head'), dict(rope=True, class_token='none', global_pool='avg'),
    dict(dynamic_img_size=True)], ids=str)  # fmt: skip
def test_compiles_to_one_graph_forward_and_backward(kwargs, backend):
    torch._dynamo.reset()
    model = tiny(depth=2, **kwargs)
    logits, gradients = train_step(model, images())
    compiled_logits, compiled_gradients = train_step(torch.compile(model, backend=backend, fullgraph=True), images())
    torch.testing.assert_close(compiled_logits, logits)
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled_gradients[f'_orig_mod.{name}'], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('kwargs', [{}, dict(scan='forward', class_token='double'), dict(rope=True)], ids=str)
def test_exports_with_any_batch_size(kwargs):
    model = tiny(depth=2, **kwargs)
    batch = torch.export.Dim('batch', min=1, max=64)
    program = torch.export.export(model, (images(),), dynamic_shapes=({0: batch},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    reloaded = torch.export.load(file).module()
    for size in (1, 5):
        torch.testing.assert_close(reloaded(images(batch=size)), model(images(batch=size)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('size', [32, 56])
def test_onnx_computes_the_same(size, tmp_path):
    pytest.importorskip('onnxscript')
    onnxruntime = pytest.importorskip('onnxruntime')
    model = tiny(img_size=size, depth=2)
    path = tmp_path / 'model.onnx'
    torch.onnx.export(
        model, (images(size),), path, dynamo=True, verbose=False, input_names=['image'],
        dynamic_shapes=({0: torch.export.Dim('batch', min=1, max=64)},))  # fmt: skip
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    for batch in (1, 3):
        image = images(size, batch=batch)
        (logits,) = session.run(None, {'image': image.numpy()})
        np.testing.assert_allclose(logits, model(image).detach().numpy(), rtol=1e-3, atol=1e-5)


def test_channels_last_computes_the_same():
    model = tiny()
    logits, gradients = train_step(model, images())
    last = model.to(memory_format=torch.channels_last)
    image = images().contiguous(memory_format=torch.channels_last)
    last_logits, last_gradients = train_step(last, image)
    torch.testing.assert_close(last_logits, logits)
    for name, gradient in gradients.items():
        torch.testing.assert_close(last_gradients[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_a_half_precision_model_returns_its_dtype_and_stays_close(dtype):
    model = tiny()
    expected = model(images())
    half = deepcopy(model).to(dtype)
    logits = half(images().to(dtype))
    assert logits.dtype == dtype
    assert half.forward_features(images().to(dtype)).dtype == dtype
    assert (logits - expected).abs().max() <= 0.05 * expected.abs().max()
    maps = half.forward_intermediates(images().to(dtype), intermediates_only=True)
    assert all(output.dtype == dtype for output in maps)


def test_autocast_trains_in_bfloat16():
    model = tiny()
    expected, gradients = train_step(model, images())
    with torch.autocast('cpu', torch.bfloat16):
        logits, half_gradients = train_step(model, images())
    assert logits.dtype == torch.bfloat16
    assert (logits - expected).abs().max() <= 0.05 * expected.abs().max()
    for name, gradient in half_gradients.items():
        assert gradient.dtype == torch.float32 and gradient.isfinite().all(), name
        assert (gradient - gradients[name]).abs().max() <= 0.2 * gradients[name].abs().max() + 1e-4, name


def test_a_meta_model_runs_and_materializes():
    model = tiny(device='meta', drop_path_rate=0.1)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model(images().to('meta')).shape == (2, 10)
    assert not list(model.buffers())
    real = model.to_empty(device='cpu')
    real.init_weights()
    assert real(images()).isfinite().all()


def test_features_only_gives_maps():
    model = timm.create_model('test_vim', features_only=True, out_indices=(1, 3, 5))
    assert model.feature_info.channels() == [64] * 3
    assert model.feature_info.reduction() == [16] * 3
    outputs = model(images(96))
    assert [output.shape for output in outputs] == [(2, 64, 6, 6)] * 3


def test_intermediates_are_the_blocks_outputs():
    model = tiny()
    final, outputs = model.forward_intermediates(images())
    assert len(outputs) == 3
    _, chosen = model.forward_intermediates(images(), indices=[0, 2], output_fmt='NLC')
    for spatial, sequence in zip((outputs[0], outputs[2]), chosen):
        assert torch.equal(spatial.flatten(2).transpose(1, 2), sequence)
    early = model.forward_intermediates(images(), indices=[0], stop_early=True, intermediates_only=True)
    assert torch.equal(early[0], outputs[0])
    result = model.forward_intermediates(images(), output_dict=True, return_prefix_tokens=True)
    assert torch.equal(result['image_features'], final)
    assert [prefix.shape for prefix in result['image_intermediates_prefix']] == [(2, 1, 32)] * 3


def test_reset_classifier_follows_the_model():
    model = tiny().to(torch.bfloat16).train()
    model.reset_classifier(7)
    assert (model.num_classes, model.global_pool) == (7, 'token')
    assert model.head.weight.dtype == torch.bfloat16
    model = tiny()
    features = model.forward_features(images())
    model.reset_classifier(0, 'avg')
    torch.testing.assert_close(model(images()), features[:, 1:].mean(1))
    assert isinstance(model.get_classifier(), nn.Identity)
    for pool in ('catavgmax', 'map'):
        with pytest.raises(AssertionError):
            model.reset_classifier(10, pool)
    assert model.global_pool == 'avg'
    with pytest.raises(AssertionError):
        tiny(class_token='none', global_pool='avg').reset_classifier(10, 'token')


def test_pruning_leaves_a_model_that_uses_all_it_has():
    model = tiny()
    expected = model.forward_intermediates(images(), indices=[1], intermediates_only=True)[0]
    assert model.prune_intermediate_layers([0, 1], prune_norm=True) == [0, 1]
    assert len(model.blocks) == 2
    assert torch.equal(model.forward_intermediates(images(), indices=1, intermediates_only=True)[0], expected)
    _, gradients = train_step(model, images())
    assert all(gradient is not None for gradient in gradients.values())
    whole = tiny()
    logits = whole(images())
    whole.prune_intermediate_layers(1, prune_head=False)
    assert torch.equal(whole(images()), logits)


def test_tensors_may_be_moved_to_float64():
    model = tiny()
    expected = model(images())
    logits = model.double()(images().double())
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits.float(), expected, rtol=1e-4, atol=1e-5)
