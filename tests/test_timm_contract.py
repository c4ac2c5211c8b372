"""What timm's scripts and users do with a Vim and its options, beyond what `families.py` asks of every family."""

import weakref

import families
import pytest
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from vim_timm import VisionMamba


def tiny(**kwargs) -> VisionMamba:
    """A registered model of 4 x 4 patches."""
    return families.builder('test_vim', img_size=32, patch_size=8)(**kwargs)


def images(size: int = 32, batch: int = 2, channels: int = 3) -> torch.Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('kwargs', [
    dict(proj_drop_rate=0.1), dict(rope=True), dict(scan='shared'), dict(random_token_order=True),
], ids=str)  # fmt: skip
def test_gradient_checkpointing_changes_neither_outputs_nor_gradients(kwargs):
    build = families.builder('test_vim', **kwargs)
    families.gradient_checkpointing_changes_neither_outputs_nor_gradients(build)


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


@pytest.mark.parametrize('kwargs', [
    {}, dict(scan='shared', class_token='head'), dict(rope=True, class_token='none', global_pool='avg'),
    dict(dynamic_img_size=True)], ids=str)  # fmt: skip
def test_compiles_to_one_graph_forward_and_backward(kwargs):
    families.compiles_to_one_graph_forward_and_backward(families.builder('test_vim', **kwargs), 'aot_eager')


@pytest.mark.parametrize('kwargs', [dict(scan='forward', class_token='double'), dict(rope=True)], ids=str)
def test_exports_with_any_batch_size(kwargs):
    families.exports_with_any_batch_size(families.builder('test_vim', **kwargs))


@pytest.mark.filterwarnings('ignore:.*torch.jit:FutureWarning')
@pytest.mark.parametrize('kwargs', [
    dict(class_token='double', global_pool='last'), dict(rope=True, rope_residual=False), dict(scan='shared'),
    dict(random_token_order=True, dynamic_img_size=True)], ids=str)  # fmt: skip
def test_a_scripted_model_can_be_saved(kwargs):
    families.a_scripted_model_can_be_saved(families.builder('test_vim', **kwargs))


@pytest.mark.parametrize('kwargs', [
    dict(class_token='double'), dict(class_token='none', global_pool='avg'), dict(rope=True, class_token='head'),
    dict(rope=True, class_token='double'), dict(rope=True, class_token='head', rope_residual=False),
    dict(scan='shared', pos_embed=False)], ids=str)  # fmt: skip
def test_a_masked_image_is_encoded_where_its_patches_stand(kwargs):
    families.a_masked_image_is_encoded_where_its_patches_stand(families.builder('test_vim', **kwargs))


def test_a_masked_image_has_its_class_token_in_the_middle_of_what_is_visible():
    model = tiny(depth=1)
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args))
    patches, grid = model.embed(images())
    keep = torch.tensor([[1, 4, 8, 9, 15], [0, 2, 3, 5, 7]])
    model.encode(patches, grid, keep)
    x, layout = seen[0]
    assert (layout.grid, layout.prefix) == ((4, 4), [2]) and torch.equal(layout.keep, keep)
    assert torch.equal(x[0, 2], (model.cls_token + model.pos_embed[:, :1])[0, 0])
    assert torch.equal(x[:, [0, 1, 3, 4, 5]], torch.stack([patches[0, keep[0]], patches[1, keep[1]]]))
    with pytest.raises(ValueError, match='rotary'):
        tiny(rope=True).encode(patches, grid, keep)


def test_a_pool_that_needs_a_class_token_is_refused_without_one():
    with pytest.raises(AssertionError):
        tiny(class_token='none', global_pool='avg').reset_classifier(10, 'token')
