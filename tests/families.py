"""What every registered family must pass: `test_families.py` asks it of all names.

A check takes a function that builds a small model in evaluation mode, with further arguments.
"""

import functools
import inspect
import io
import math
import pickle
import sys
from collections.abc import Callable
from copy import deepcopy

import numpy
import pytest
import timm
import torch
from process_state import STATES
from timm.optim import create_optimizer_v2
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

Build = Callable[..., nn.Module]

# arguments that make a family's models small, by the module that registers them
SMALL: dict[str, dict] = {
    'vision_mamba': dict(embed_dim=32, depth=3),
    'vision_mamba2': dict(embed_dim=32, depth=3, headdim=16, d_state=16),
    'vision_mamba_hybrid': dict(embed_dim=32, depth=3, num_heads=2, attn_blocks=(0,)),
    'toy_family': dict(embed_dim=32, depth=3),
}


def structures(module: str) -> list[str]:
    """Names of the module's models that differ in more than size; the first of each kind."""
    kinds = {}
    for name in timm.list_models(module=module):
        model = timm.create_model(name, device='meta', **SMALL[module])
        kinds.setdefault((repr(model), model.class_token, model.global_pool, model.rope), name)
    return list(kinds.values())


def builder(name: str, **small) -> Build:
    """A function that builds the registered model `name` small, for images of 4 x 4 patches and 10 classes."""

    def build(**kwargs) -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model(name, **{**arguments, **kwargs}).eval()

    module = timm.model_entrypoint(name).__module__.rpartition('.')[2]
    arguments = {**SMALL[module], **small}
    patch = timm.create_model(name, device='meta', **arguments).patch_embed.patch_size
    arguments = dict(img_size=tuple(4 * side for side in patch), num_classes=10, dynamic_img_size=False) | arguments
    return build


def images_for(model: nn.Module, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, model.in_chans, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(1))


def train_step(model: nn.Module, images: torch.Tensor | None = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and gradients of one training step with fixed random numbers."""
    torch.manual_seed(2)
    model.zero_grad()
    parameters = dict(model.named_parameters())
    logits = model.train()(images_for(model) if images is None else images)
    logits.square().sum().backward()
    return logits.detach(), {name: parameter.grad for name, parameter in parameters.items()}


def assert_same_step(actual, expected, **tolerance):
    torch.testing.assert_close(actual[0], expected[0])
    assert len(actual[1]) == len(expected[1])
    for name, (ours, theirs) in zip(expected[1], zip(actual[1].values(), expected[1].values())):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f'{name}: {text}', **tolerance)


# what numbers must be, and some that are not, of which torch makes NaN, nothing or a traceback
NUMBERS = {
    'num_classes': ('a whole number', math.nan, 2.0, '2'),
    'dt_rank': ("'auto' or a whole number of at least 1", 0, 1.5, 'all'),
    'norm_eps': ('a number above 0', -1, 0, math.nan, math.inf, '1e-5'),
    'expand': ('a number above 0', -1, 0, math.nan, math.inf, '2'),
    'mlp_ratio': ('a number', math.nan, math.inf, '4'),
    'init_values': ('a number', math.nan, math.inf, '1e-5'),
    'rope_pretrained_grid': ('a whole number of at least 1', -1, 0, math.nan),
}


def arguments_are_strict(build: Build) -> None:
    with pytest.raises(TypeError, match='no_such_argument'):
        build(no_such_argument=1)
    for pool in ('catavgmax', 'map'):
        with pytest.raises(AssertionError, match='global_pool'):
            build(global_pool=pool)
    for size in ('img_size', 'patch_size', 'in_chans', 'embed_dim', 'depth'):
        for value in (0, -1, 8.0, 'small'):
            with pytest.raises(ValueError, match=f'{size} must be a whole number of at least 1, not {value!r}'):
                build(**{size: value})
    build(embed_dim=numpy.int64(32), drop_path_rate=numpy.float32(0.1))
    for rate in (-0.1, 2, '0.1'):
        with pytest.raises(ValueError, match='drop_path_rate must be a number from 0 to 1'):
            build(drop_path_rate=rate)
    own = inspect.signature(type(build())).parameters
    for word in ('none', 'false', 2, math.nan) if 'fc_norm' in own else ():
        with pytest.raises(ValueError, match=f'fc_norm must be True or False, not {word!r}'):
            build(fc_norm=word)
    for name, (wanted, *wrongs) in NUMBERS.items():
        for wrong in wrongs if name in own else ():
            with pytest.raises(ValueError, match=f'{name} must be {wanted}, not {wrong!r}'):
                build(**{name: wrong})


def get_classifier_is_the_head(build: Build) -> None:
    model = build()
    assert model.get_classifier() is model.head
    assert any(module is model.get_submodule(model.default_cfg['classifier']) for module in model.head.modules())
    assert isinstance(build(num_classes=0).get_classifier(), nn.Identity)


def reset_classifier_follows_the_model(build: Build) -> None:
    model = build().to(torch.bfloat16).train()
    pool = model.global_pool
    model.reset_classifier(7)
    assert (model.num_classes, model.global_pool) == (7, pool)
    assert next(model.head.parameters()).dtype == torch.bfloat16 and model.head.training
    model = build()
    features = model.forward_features(images_for(model))
    model.reset_classifier(0, 'avg')
    torch.testing.assert_close(model(images_for(model)), features[:, model.num_prefix_tokens :].mean(1))
    assert isinstance(model.get_classifier(), nn.Identity)
    with pytest.raises(AssertionError):
        model.reset_classifier(10, 'map')
    assert model.global_pool == 'avg'


def gradient_checkpointing_changes_neither_outputs_nor_gradients(build: Build) -> None:
    model = build(drop_path_rate=0.5)
    expected = train_step(model)
    model.set_grad_checkpointing()
    assert model.grad_checkpointing
    assert_same_step(train_step(model), expected)
    model.set_grad_checkpointing(enable=False)
    assert not model.grad_checkpointing


def group_matcher_covers_every_parameter(build: Build) -> None:
    model = build()
    groups = timm.models.group_parameters(model, model.group_matcher())
    names = [name for group in groups.values() for name in group]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert len(groups) == 1 + len(model.blocks) + 1  # stem, blocks (the last with the norm), head


def no_weight_decay_names_parameters_that_exist(build: Build) -> None:
    model = build()
    listed = model.no_weight_decay()
    assert listed <= dict(model.named_parameters()).keys()
    assert all(name in listed for name in ('cls_token', 'pos_embed') if getattr(model, name) is not None)
    state = {name for name, _ in model.named_parameters() if name.endswith(('A_log', 'A_b_log', '.D', '.D_b'))}
    assert state <= listed


def an_optimizer_with_layer_decay_trains(build: Build) -> None:
    model = build().train()
    optimizer = create_optimizer_v2(model, opt='adamw', lr=1e-2, weight_decay=0.05, layer_decay=0.75)
    target = torch.tensor([3, 7])
    losses = []
    for _ in range(5):
        loss = nn.functional.cross_entropy(model(images_for(model)), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def compiles_to_one_graph_forward_and_backward(build: Build, backend: str = 'eager') -> None:
    torch._dynamo.reset()
    model = build(depth=2)
    expected = train_step(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert_same_step(train_step(compiled, images_for(model)), expected, rtol=1e-4, atol=1e-5)


def exports_with_any_batch_size(build: Build) -> None:
    model = build(depth=1)
    batch = torch.export.Dim('batch', min=1, max=64)
    program = torch.export.export(model, (images_for(model),), dynamic_shapes=({0: batch},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    reloaded = torch.export.load(file).module()
    for size in (1, 5):
        images = images_for(model, size)
        torch.testing.assert_close(reloaded(images), model(images), rtol=1e-4, atol=1e-5)


def a_scripted_model_can_be_saved(build: Build) -> None:
    model = build(depth=2)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    images = images_for(model)
    torch.testing.assert_close(torch.jit.load(file)(images), model(images), rtol=1e-4, atol=1e-5)


def torchvisions_extractor_takes_it_as_timms_models(build: Build) -> None:
    model = build(depth=2)
    images = images_for(model)
    node = [node for node in get_graph_node_names(model)[1] if node.startswith('blocks.0')][-1]
    outputs = create_feature_extractor(model, {node: 'block', 'head': 'logits'})(images)
    torch.testing.assert_close(outputs['logits'], model(images), rtol=1e-5, atol=1e-6)  # a fused kernel may round apart
    assert outputs['block'].shape[0] == 2 and outputs['block'].shape[2] == model.embed_dim


def channels_last_computes_the_same(build: Build) -> None:
    model = build()
    expected = train_step(model)
    last = model.to(memory_format=torch.channels_last)
    images = images_for(model).contiguous(memory_format=torch.channels_last)
    assert_same_step(train_step(last, images), expected, rtol=1e-4, atol=1e-5)


def a_half_precision_model_returns_its_dtype_and_stays_close(build: Build) -> None:
    model = build()
    images = images_for(model)
    expected = model(images)
    for dtype in (torch.bfloat16, torch.float16):
        half = deepcopy(model).to(dtype)
        logits = half(images.to(dtype))
        assert logits.dtype == half.forward_features(images.to(dtype)).dtype == dtype
        assert (logits - expected).abs().max() <= 0.05 * expected.abs().max()
        maps = half.forward_intermediates(images.to(dtype), intermediates_only=True)
        assert all(output.dtype == dtype for output in maps)


def a_double_precision_model_stays_close(build: Build) -> None:
    model = build()
    images = images_for(model)
    expected = model(images)
    logits = model.double()(images.double())
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits.float(), expected, rtol=1e-4, atol=1e-5)


def autocast_trains_in_bfloat16(build: Build) -> None:
    model = build()
    expected, gradients = train_step(model)
    with torch.autocast('cpu', torch.bfloat16):
        logits, half_gradients = train_step(model)
    assert logits.dtype == torch.bfloat16
    assert (logits - expected).abs().max() <= 0.05 * expected.abs().max()
    for name, gradient in half_gradients.items():
        assert gradient.dtype == torch.float32 and gradient.isfinite().all(), name
        assert (gradient - gradients[name]).abs().max() <= 0.2 * gradients[name].abs().max() + 1e-4, name


def a_meta_model_runs_and_materializes(build: Build) -> None:
    model = build(device='meta', drop_path_rate=0.1)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model(images_for(model).to('meta')).shape == (2, 10)
    assert not list(model.buffers())
    real = model.to_empty(device='cpu')
    with torch.no_grad():
        for parameter in real.parameters():
            parameter.fill_(float('nan'))
    real.init_weights()
    assert real(images_for(model)).isfinite().all()


def init_weights_draws_whatever_stands_in_the_heads_place(build: Build) -> None:
    """Heads without a bias, of several layers, of none: what is drawn is finite, and a stem needs no bias either."""
    width = build().embed_dim
    for head in (
        nn.Linear(width, 10, bias=False),
        nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10, bias=False)),
        nn.Sequential(nn.BatchNorm1d(width), nn.Linear(width, 10), nn.Dropout(0.1)),
        nn.Sequential(nn.Unflatten(1, (width, 1)), nn.Conv1d(width, 10, 1, bias=False), nn.Flatten()),
        nn.Sequential(),
    ):
        model = build()
        model.head = head
        stem = model.patch_embed.proj
        stem.bias = None
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float('nan'))
        model.init_weights()
        assert model(images_for(model)).isfinite().all(), head


def features_only_gives_maps(build: Build) -> None:
    whole = build()
    model = build(features_only=True, out_indices=(0, 2))
    assert model.feature_info.channels() == [whole.embed_dim] * 2
    assert model.feature_info.reduction() == [whole.patch_embed.feat_ratio()] * 2
    outputs = model(images_for(whole))
    assert [output.shape[1:] for output in outputs] == [(whole.embed_dim, *whole.patch_embed.grid_size)] * 2


def raw_outputs_of_blocks_are_in_timms_order_or_refused(build: Build) -> None:
    whole = build()
    images, grid = images_for(whole), whole.patch_embed.grid_size
    for extractor in ('hook', 'fx'):
        if whole.class_token in ('middle', 'double'):
            with pytest.raises(ValueError, match=f"feature_cls '{extractor}' .* leave it out"):
                build(features_only=True, feature_cls=extractor)
            continue
        raw = build(features_only=True, feature_cls=extractor)(images)
        maps = build(features_only=True, feature_cls='Getter')(images)
        for tokens, expected in zip(raw, maps, strict=True):
            patches = tokens[:, whole.num_prefix_tokens :].transpose(1, 2)
            torch.testing.assert_close(patches.unflatten(2, grid), expected)


def intermediates_are_the_blocks_outputs(build: Build) -> None:
    model = build()
    images = images_for(model)
    final, outputs = model.forward_intermediates(images)
    assert torch.equal(final, model.forward_features(images))
    assert len(outputs) == 3
    _, chosen = model.forward_intermediates(images, indices=[0, 2], output_fmt='NLC')
    for spatial, sequence in zip((outputs[0], outputs[2]), chosen):
        assert torch.equal(spatial.flatten(2).transpose(1, 2), sequence)
    early = model.forward_intermediates(images, indices=[0], stop_early=True, intermediates_only=True)
    assert torch.equal(early[0], outputs[0])
    result = model.forward_intermediates(images, output_dict=True, return_prefix_tokens=True)
    assert torch.equal(result['image_features'], final)
    prefix = [tokens.shape[1] for tokens in result.get('image_intermediates_prefix', [])]
    assert prefix == [model.num_prefix_tokens] * 3 * bool(model.num_prefix_tokens)


def pruning_leaves_a_model_that_uses_all_it_has(build: Build) -> None:
    model = build()
    images = images_for(model)
    expected = model.forward_intermediates(images, indices=[1], intermediates_only=True)[0]
    assert model.prune_intermediate_layers([0, 1], prune_norm=True) == [0, 1]
    assert len(model.blocks) == 2
    assert torch.equal(model.forward_intermediates(images, indices=1, intermediates_only=True)[0], expected)
    _, gradients = train_step(model)
    assert all(gradient is not None for gradient in gradients.values())
    whole = build()
    logits = whole(images)
    whole.prune_intermediate_layers(1, prune_head=False)
    assert torch.equal(whole(images), logits)


def dynamic_sizes_equal_a_model_set_to_that_size(build: Build) -> None:
    model = build(dynamic_img_size=True)
    patch = model.patch_embed.patch_size
    for rows, columns in ((5, 4), (3, 6), (4, 4)):
        fixed = build()
        fixed.set_input_size((rows * patch[0], columns * patch[1]))
        torch.testing.assert_close(model(images_for(fixed)), fixed(images_for(fixed)))
        assert fixed.feature_info == model.feature_info


def a_refused_size_leaves_the_model_as_it_was(build: Build) -> None:
    model = build()
    images, size = images_for(model), model.patch_embed.img_size
    logits, state = model(images), {name: value.clone() for name, value in model.state_dict().items()}
    patch, count = model.patch_embed.patch_size[0], 'must be a whole number of at least 1, not'
    for wrong, why in (
        (dict(img_size=size[0] + 1), 'cannot be tiled'),
        (dict(img_size=size[0] + 1, patch_size=patch // 2), 'cannot be'),
        (dict(img_size=float(size[0])), f'img_size {count} {float(size[0])}'),
        (dict(img_size=size * 2), f'img_size {count}'),
        (dict(patch_size=float(patch)), f'patch_size {count} {float(patch)}'),
        (dict(patch_size=(patch, 0)), f'patch_size {count}'),
    ):
        with pytest.raises(ValueError, match=why):
            model.set_input_size(**wrong)
        assert torch.equal(model(images), logits) and model.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def an_image_does_not_depend_on_its_batch(build: Build) -> None:
    model = build()
    images = images_for(model, 3)
    together = model(images)
    for image, logits in zip(images, together):
        torch.testing.assert_close(model(image.unsqueeze(0))[0], logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(images.flip(0)).flip(0), together, rtol=1e-5, atol=1e-6)
    assert torch.equal(model(images), together)
    assert model(images[:0]).shape == (0, 10)
    assert model.forward_intermediates(images[:0])[1][0].shape == (0, model.embed_dim, *model.patch_embed.grid_size)


def embedding_and_encoding_are_the_features(build: Build) -> None:
    model = build()
    images = images_for(model)
    patches, grid = model.embed(images)
    assert grid == model.patch_embed.grid_size and patches.shape == (2, grid[0] * grid[1], model.embed_dim)
    tokens, outputs = model.encode(patches, grid, take=(0, 2))
    assert torch.equal(model.norm(tokens), model.forward_features(images))
    assert torch.equal(outputs[1], tokens)
    spatial = model.forward_intermediates(images, indices=[0], output_fmt='NLC', intermediates_only=True)[0]
    assert torch.equal(outputs[0][:, model.num_prefix_tokens :], spatial)


def a_masked_image_is_encoded_where_its_patches_stand(build: Build) -> None:
    model = build()
    images = images_for(model)
    patches, grid = model.embed(images)
    every = torch.arange(patches.shape[1]).expand(2, -1)
    tokens, _ = model.encode(patches, grid)
    torch.testing.assert_close(model.encode(patches, grid, keep=every)[0], tokens, rtol=1e-5, atol=1e-5)
    visible = torch.stack([every[0, 1::3], every[0, : every[0, 1::3].shape[0]]])
    some, outputs = model.encode(patches, grid, keep=visible, take=(1,))
    assert some.shape == outputs[0].shape == (2, model.num_prefix_tokens + visible.shape[1], model.embed_dim)
    # nor need what is hidden be embedded
    embedded, _ = model.embed(images, visible)
    places = visible[..., None].expand(-1, -1, model.embed_dim)
    torch.testing.assert_close(embedded, patches.gather(1, places), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.encode(embedded, grid, keep=visible)[0], some, rtol=1e-5, atol=1e-5)
    # what is hidden cannot matter
    hidden = torch.ones_like(patches).scatter(1, places, 0.0)
    assert torch.equal(model.encode(patches + 5 * hidden, grid, keep=visible)[0], some)
    model.train().encode(*model.embed(images), keep=visible)[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.blocks.parameters())


def copies_and_checkpoints_compute_the_same(build: Build) -> None:
    model = build()
    images = images_for(model)
    expected = model(images)
    assert torch.equal(deepcopy(model)(images), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(images), expected)
    other = build()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(0.5)
    filter_fn = sys.modules[type(model).__module__].checkpoint_filter_fn
    other.load_state_dict(filter_fn({'state_dict': model.state_dict()}, other))
    assert torch.equal(other(images), expected)


def foreign_weights_are_refused(build: Build) -> None:
    model = build()
    filter_fn = sys.modules[type(model).__module__].checkpoint_filter_fn
    with pytest.raises(ValueError, match='vision transformer'):
        filter_fn(_vision_transformer(), model)
    with pytest.raises(ValueError, match='blocks.2'):
        filter_fn(model.state_dict(), build(depth=2))
    for wrong in ('norm.weight', next(name for name in model.state_dict() if '.mixer.' in name)):
        weights = {**model.state_dict(), wrong: torch.zeros(1, 2, 3)}
        with pytest.raises(ValueError, match=wrong):
            filter_fn(weights, model)


@functools.cache
def _vision_transformer() -> dict[str, torch.Tensor]:
    return timm.create_model('test_vit').state_dict()


def a_model_does_not_see_the_state_of_the_process(build: Build) -> None:
    arguments = dict(drop_path_rate=0.2, dynamic_img_size=True)
    model = build(**arguments)
    larger = torch.randn(2, model.in_chans, *(2 * side for side in model.patch_embed.img_size))
    for images in (images_for(model), larger):
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        logits = model.eval()(images)
        expected = train_step(model, images)
        for name, state in STATES.items():
            with state():
                found = model.eval()(images)
                step = train_step(model, images)
                again = build(**arguments, device='cpu', dtype=torch.float32).state_dict()
            assert found.dtype == torch.float32 and torch.equal(found, logits), name
            assert_same_step(step, expected, rtol=0, atol=0)
            assert all(torch.equal(value, weights[key]) for key, value in again.items()), name


def inference_mode_leaves_nothing_behind(build: Build) -> None:
    """What a first pass computes and keeps must do for training too."""
    with torch.inference_mode():
        model = build(dynamic_img_size=True)
        logits = model(images_for(model))
    trained = build(dynamic_img_size=True)
    with torch.inference_mode():
        assert torch.equal(trained(images_for(trained)), logits)
    train_step(trained)


# takes long: asked of one model of a family
def what_replaces_or_hooks_a_layer_is_called(build: Build) -> None:
    """Every layer with weights: a hook on it is, and so is what wraps it, whatever that is."""
    images, wanted = images_for(model := build(depth=1)), train_step(model)
    for path, layer in model.named_modules():
        if any(layer.children()) or not any(True for _ in layer.parameters()):
            continue
        model = build(depth=1)
        seen: list[str] = []
        model.get_submodule(path).register_forward_hook(lambda *_, seen=seen: seen.append('called'))
        assert_same_step(train_step(model, images), wanted, rtol=1e-4, atol=1e-5)
        assert seen, path
        model = build(depth=1)
        parent, _, name = path.rpartition('.')
        model.get_submodule(parent).add_module(name, nn.Sequential(model.get_submodule(path)))
        assert_same_step(train_step(model, images), wanted, rtol=1e-4, atol=1e-5)


SLOW = (exports_with_any_batch_size,)
CHECKS = (
    arguments_are_strict,
    get_classifier_is_the_head,
    reset_classifier_follows_the_model,
    gradient_checkpointing_changes_neither_outputs_nor_gradients,
    group_matcher_covers_every_parameter,
    no_weight_decay_names_parameters_that_exist,
    an_optimizer_with_layer_decay_trains,
    compiles_to_one_graph_forward_and_backward,
    a_scripted_model_can_be_saved,
    torchvisions_extractor_takes_it_as_timms_models,
    channels_last_computes_the_same,
    a_half_precision_model_returns_its_dtype_and_stays_close,
    a_double_precision_model_stays_close,
    autocast_trains_in_bfloat16,
    a_meta_model_runs_and_materializes,
    init_weights_draws_whatever_stands_in_the_heads_place,
    features_only_gives_maps,
    raw_outputs_of_blocks_are_in_timms_order_or_refused,
    a_refused_size_leaves_the_model_as_it_was,
    intermediates_are_the_blocks_outputs,
    pruning_leaves_a_model_that_uses_all_it_has,
    dynamic_sizes_equal_a_model_set_to_that_size,
    an_image_does_not_depend_on_its_batch,
    embedding_and_encoding_are_the_features,
    a_masked_image_is_encoded_where_its_patches_stand,
    copies_and_checkpoints_compute_the_same,
    foreign_weights_are_refused,
    a_model_does_not_see_the_state_of_the_process,
    inference_mode_leaves_nothing_behind,
    what_replaces_or_hooks_a_layer_is_called,
)
