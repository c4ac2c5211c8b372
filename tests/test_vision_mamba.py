"""What the Vim family is: its sizes, initial values, options, token order, and what its projections let in."""

import math
import pickle
import re
import warnings
import weakref
from copy import deepcopy
from itertools import product

import golden_data
import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay, param_groups_weight_decay

from vim_timm import VisionMamba, use_scan_backend
from vim_timm.hub import from_original
from vim_timm.layers.autocast import as_product_operand
from vim_timm.models.vision_mamba import checkpoint_filter_fn
from vim_timm.ops import explain

AVAILABLE = [status.name for status in explain() if status.available]


def tiny(seed: int = 0, **kwargs) -> VisionMamba:
    """A model of 4 x 4 patches that runs in milliseconds."""
    torch.manual_seed(seed)
    defaults = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_classes=10)
    return VisionMamba(**{**defaults, **kwargs}).eval()


def images(height: int = 32, width: int = 32, batch: int = 2, channels: int = 3) -> torch.Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))


def without_mixing(model: VisionMamba) -> VisionMamba:
    """The model with blocks that leave every token as it is."""
    with torch.no_grad():
        for block in model.blocks:
            block.mixer.out_proj.weight.zero_()
    return model


# name -> image, patch, stride, width, depth, class token, pool, millions of parameters
FAMILY = {
    'vim_tiny_patch16_224': (224, 16, 16, 192, 24, 'middle', 'token', 7),
    'vim_small_patch16_224': (224, 16, 16, 384, 24, 'middle', 'token', 26),
    'vim_base_patch16_224': (224, 16, 16, 768, 24, 'middle', 'token', 98),
    'vim_tiny_patch16_384': (384, 16, 16, 192, 24, 'middle', 'token', 7),
    'vim_small_patch16_384': (384, 16, 16, 384, 24, 'middle', 'token', 26),
    'vim_base_patch16_384': (384, 16, 16, 768, 24, 'middle', 'token', 98),
    'vim_tiny_patch16_stride8_224': (224, 16, 8, 192, 24, 'middle', 'token', 7),
    'vim_small_patch16_stride8_224': (224, 16, 8, 384, 24, 'middle', 'token', 26),
    'vim_tiny_patch16_rope_ape_gap_224': (224, 16, 16, 192, 24, 'none', 'avg', 7),
    'vim_small_patch16_rope_ape_gap_224': (224, 16, 16, 384, 24, 'none', 'avg', 26),
    'vim_base_patch16_rope_ape_gap_224': (224, 16, 16, 768, 24, 'none', 'avg', 98),
    'vim_tiny_patch8_rope_ape_gap_224': (224, 8, 8, 192, 24, 'none', 'avg', 7),
    'vim_tiny_patch16_rope_ape_224': (224, 16, 16, 192, 24, 'head', 'token', 7),
    'vim_tiny_patch8_rope_ape_224': (224, 8, 8, 192, 24, 'head', 'token', 7),
    'vim_nano_patch4_32': (32, 4, 4, 96, 12, 'middle', 'token', None),
    'vim_tiny_patch4_32': (32, 4, 4, 192, 24, 'middle', 'token', None),
    'vim_small_patch4_32': (32, 4, 4, 384, 24, 'middle', 'token', None),
    'vim_tiny': (224, 16, 16, 192, 24, 'middle', 'token', 7),
    'vim_small': (224, 16, 16, 384, 24, 'middle', 'token', 26),
    'vim_base': (224, 16, 16, 768, 24, 'middle', 'token', 98),
    'test_vim': (160, 16, 16, 64, 6, 'middle', 'token', None),
}


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_family_is_registered():
    assert set(FAMILY) <= set(timm.list_models(module='vision_mamba'))


@pytest.mark.parametrize('name', FAMILY)
def test_each_name_builds_its_model(name):
    image, patch, stride, width, depth, class_token, pool, millions = FAMILY[name]
    model = timm.create_model(name, device='meta')
    assert model.patch_embed.img_size == (image, image)
    assert model.patch_embed.patch_size == (patch, patch)
    assert model.patch_embed.stride == (stride, stride)
    side = (image - patch) // stride + 1
    prefix = 0 if class_token == 'none' else 1
    assert model.patch_embed.grid_size == (side, side)
    assert model.pos_embed.shape == (1, side * side + prefix, width)
    assert (model.embed_dim, len(model.blocks)) == (width, depth)
    assert model.num_prefix_tokens == prefix
    assert model.class_token == class_token
    assert model.global_pool == pool
    early = 'rope' in name
    assert model.rope == early
    assert model.blocks[0].mixer.scale == (1.0 if early else 0.5)
    if millions is not None:
        assert round(parameters(model) / 1e6) == millions


def test_nano_has_less_than_a_million_parameters():
    assert parameters(timm.create_model('vim_nano_patch4_32', device='meta')) < 1_000_000


PUBLISHED = [name for name in golden_data.load_json('state_dicts/summary.json') if not name.startswith('feb2024/')]


@pytest.mark.parametrize('published', PUBLISHED)
def test_the_originals_name_builds_the_model_of_its_checkpoint(published):
    content = golden_data.load_json(f'state_dicts/{published}.json')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # timm announces the name's successor
        model = timm.create_model(published.split('/')[1], device='meta')
    state_dict = {name: torch.zeros(shape, device='meta') for name, shape in content['state_dict'].items()}
    model.load_state_dict(checkpoint_filter_fn(state_dict, model), strict=True, assign=True)
    assert parameters(model) == content['num_parameters']


def converted(name: str) -> str:
    """An original parameter's name (`*` for a block's number) -> ours."""
    name = re.sub(r'^layers\.', 'blocks.', re.sub(r'^norm_f\.', 'norm.', name))
    return re.sub(r'^cls_token_(head|tail)$', 'cls_token', name)


QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@pytest.mark.parametrize('file, model_name', [
    ('head_vim_tiny', 'vim_tiny_patch16_224'),
    ('early_vim_tiny_rope_cls', 'vim_tiny_patch16_rope_ape_224'),
])  # fmt: skip
def test_initial_values_follow_the_originals_distributions(file, model_name):
    torch.manual_seed(0)
    pooled: dict[str, list[torch.Tensor]] = {}
    for name, parameter in timm.create_model(model_name).named_parameters():
        pooled.setdefault(re.sub(r'^blocks\.\d+', 'blocks.*', name), []).append(parameter.detach().flatten())
    expected = {}
    seeds = golden_data.load_json(f'init/{file}.json')['stats'].values()
    for statistics in seeds:
        for name, values in statistics['pooled_over_layers'].items():
            if not name.startswith('rope.'):
                expected.setdefault(converted(name), []).append(values)
    assert pooled.keys() == expected.keys()
    for name, draws in expected.items():
        values = torch.cat(pooled[name]).double()
        std = sum(draw['std'] for draw in draws) / len(draws)
        numel = draws[0]['numel']
        assert values.numel() == numel, name
        # five standard errors of the mean and of the deviation
        assert abs(values.mean() - draws[0]['mean']) <= 1e-6 + 5 * std * math.sqrt(2 / numel), name
        assert values.std(correction=0) == pytest.approx(std, rel=5 / math.sqrt(numel), abs=1e-7), name
        # quantiles, not extremes: the original's truncated normal has strays at the far ends of its range
        quantiles = np.quantile(values.numpy(), QUANTILES)
        for i, quantile in enumerate(quantiles):
            drawn = [draw['quantiles_1_5_25_50_75_95_99'][i] for draw in draws]
            slack = std * 20 / math.sqrt(numel) + 1e-6
            assert min(drawn) - slack <= quantile <= max(drawn) + slack, (name, QUANTILES[i])


def test_init_weights_draws_the_same_as_the_constructor():
    model = tiny(embed_dim=64)
    again = deepcopy(model)
    for parameter in again.parameters():
        nn.init.constant_(parameter, math.nan)
    again.init_weights()
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values()):
        assert b.isfinite().all(), name
        assert a.std(correction=0).item() == pytest.approx(b.std(correction=0).item(), rel=6 / a.numel() ** 0.5), name


@pytest.mark.parametrize('case', golden_data.load_json('norm/drop_path_schedule.json'))
def test_drop_path_rates_are_the_originals(case):
    depth, rate = re.fullmatch(r'depth(\d+)_rate([\d.]+)', case).groups()
    model = tiny(depth=int(depth), drop_path_rate=float(rate))
    ours = [getattr(block.drop_path, 'drop_prob', 0.0) for block in model.blocks]
    schedule = golden_data.load_json('norm/drop_path_schedule.json')[case]
    # the original drops block i's output in block i + 1, and the last one's at the end
    assert ours == pytest.approx([*schedule['per_layer'][1:], schedule['final']], rel=1e-6)


def test_drop_path_acts_where_the_originals_does():
    arrays, meta = golden_data.load(golden_data.root() / 'norm' / 'drop_path_model.npz')
    state_dict = {name: torch.from_numpy(value) for name, value in golden_data.split(arrays, 'state').items()}
    model = from_original(state_dict, **meta['kwargs'], dtype=torch.float64).train()
    rates = [block.drop_path.drop_prob for block in model.blocks[1:]]
    assert rates == pytest.approx(meta['drop_probs'])

    def fixed(rate, noise):
        keep = 1 - rate
        return lambda module, args, output: args[0] / keep * torch.floor(keep + noise)

    for i, (block, rate) in enumerate(zip(model.blocks[1:], rates)):
        block.drop_path.register_forward_hook(fixed(rate, torch.from_numpy(arrays[f'noise/{i}'])))
    logits = model(torch.from_numpy(arrays['input']).double())
    expected = torch.from_numpy(arrays['logits']).double()
    assert (logits - expected).abs().max() <= 1e-6 * expected.abs().max()


def decayed(model: VisionMamba) -> set[str]:
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)] for group in groups if group['weight_decay'] > 0 for p in group['params']}


@pytest.mark.parametrize('case, class_token', [('vim_tiny_first_layer_only', 'middle'), ('double_cls', 'double')])
def test_decay_state_reproduces_the_originals_weight_decay(case, class_token):
    golden = golden_data.load_json('weight_decay_groups.json')[case]
    model = tiny(depth=1, class_token=class_token, decay_state=True)
    assert {converted(name) for name in golden} == dict(model.named_parameters()).keys()
    assert decayed(model) == {converted(name) for name, group in golden.items() if group == 'decay'}


def test_state_space_parameters_are_not_decayed_by_default():
    model = tiny()
    by_default = decayed(model)
    assert decayed(tiny(decay_state=True)) - by_default == {
        f'blocks.{i}.mixer.{name}' for i in range(2) for name in ('A_log', 'A_b_log')
    }
    assert 'blocks.0.mixer.in_proj.weight' in by_default


def test_layer_decay_slows_the_lower_layers():
    model = tiny(depth=3)
    groups = param_groups_layer_decay(model, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scale = {names[id(p)]: group['lr_scale'] for group in groups for p in group['params']}
    assert scale.keys() == dict(model.named_parameters()).keys()
    stem = {scale[name] for name in ('cls_token', 'pos_embed', 'patch_embed.proj.weight')}
    blocks = [{value for name, value in scale.items() if name.startswith(f'blocks.{i}.')} for i in range(3)]
    assert all(len(group) == 1 for group in (stem, *blocks))
    ladder = [group.pop() for group in (stem, *blocks)] + [scale['head.weight']]
    assert scale['norm.weight'] == scale['blocks.2.mixer.D']  # as in timm's vision transformer
    assert ladder[-1] == 1.0
    assert all(lower == upper / 2 for lower, upper in zip(ladder, ladder[1:]))


def original_weights(model: VisionMamba) -> dict[str, torch.Tensor]:
    """Distinct values under the original's names and in its order, for a model with a middle class token."""
    state_dict = {}
    for name, value in model.state_dict().items():
        name = re.sub(r'^norm\.', 'norm_f.', re.sub(r'^blocks\.', 'layers.', name))
        state_dict[name] = torch.randn(value.shape, generator=torch.Generator().manual_seed(len(state_dict)))
    return state_dict


@pytest.mark.parametrize('size, patches', [(32, 16), (40, 25)])
def test_resizing_a_middle_class_checkpoint_moves_the_right_rows(size, patches):
    state_dict = original_weights(tiny(img_size=size))
    rows, middle = state_dict['pos_embed'], patches // 2
    model = tiny(img_size=(64, 48))
    model.load_state_dict(checkpoint_filter_fn(state_dict, model))
    assert torch.equal(model.pos_embed[:, 0], rows[:, middle])
    patch_rows = torch.cat([rows[:, :middle], rows[:, middle + 1 :]], dim=1)
    side = math.isqrt(patches)
    grid = patch_rows.transpose(1, 2).unflatten(2, (side, side))
    expected = F.interpolate(grid, (8, 6), mode='bicubic', align_corners=False).flatten(2).transpose(1, 2)
    torch.testing.assert_close(model.pos_embed[:, 1:], expected)


CLASS_TOKENS = ('middle', 'head', 'double', 'none')
POOLS = ('', 'token', 'avg', 'max', 'last')


@pytest.mark.parametrize('scan', ['bidirectional', 'shared', 'forward'])
def test_every_class_token_with_every_pool_trains(scan):
    for class_token, pool in product(CLASS_TOKENS, POOLS):
        if (class_token, pool) == ('none', 'token'):
            continue
        model = tiny(class_token=class_token, global_pool=pool, scan=scan).train()
        logits = model(images())
        tokens = 16 + model.num_prefix_tokens
        assert logits.shape == ((2, tokens, 10) if pool == '' else (2, 10)), (class_token, pool)
        logits.square().sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), (class_token, pool, name)


def test_a_pool_reads_the_tokens_it_names():
    for class_token, pool in product(CLASS_TOKENS, POOLS):
        if (class_token, pool) == ('none', 'token'):
            continue
        model = tiny(class_token=class_token, global_pool=pool)
        tokens = model.forward_features(images())
        prefix, patches = tokens[:, : model.num_prefix_tokens], tokens[:, model.num_prefix_tokens :]
        pooled = {'': tokens, 'avg': patches.mean(1), 'max': patches.amax(1), 'last': patches[:, -1]}
        expected = prefix.mean(1) if pool == 'token' else pooled[pool]
        torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), expected)


@pytest.mark.parametrize('kwargs', [
    dict(pos_embed=False),
    dict(rope=True, class_token='none', global_pool='avg'),
    dict(rope=True, rope_residual=False),
    dict(halve=False),
    dict(d_state=5, d_conv=3, expand=1, dt_rank=3),
    dict(conv_bias=False, proj_bias=True),
    dict(norm_layer='layernorm', norm_eps=1e-6),
    dict(residual_in_fp32=False),
    dict(init_values=1e-2),
    dict(fc_norm=True),
    dict(stride=4),
    dict(drop_rate=0.1, pos_drop_rate=0.1, proj_drop_rate=0.1, drop_path_rate=0.5),
    dict(weight_init='early'),
    dict(num_classes=0),
], ids=lambda kwargs: ','.join(kwargs))  # fmt: skip
def test_every_option_trains(kwargs):
    model = tiny(**kwargs)
    assert torch.equal(model(images()), model(images()))
    model.train()(images()).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_wrong_arguments_are_named():
    for pool in ('catavgmax', 'map', None):
        with pytest.raises(AssertionError, match='global_pool'):
            tiny(global_pool=pool)
    with pytest.raises(AssertionError, match='class token'):
        tiny(class_token='none', global_pool='token')
    with pytest.raises(TypeError, match='no_such_argument'):
        tiny(no_such_argument=1)
    with pytest.raises(TypeError, match='no_such_argument'):
        timm.create_model('test_vim', no_such_argument=1)
    for name, value in dict(class_token='tail', scan='v2', norm_layer='batchnorm', weight_init='late').items():
        with pytest.raises(ValueError, match=f'{name}.*{value}'):
            tiny(**{name: value})
    with pytest.raises(ValueError, match='random_class_position'):
        tiny(random_class_position=True, class_token='double')
    with pytest.raises(ValueError, match='rope.*divisible by 4'):
        tiny(rope=True, embed_dim=30)


def message(function, *args, **kwargs) -> str:
    """The text of the ValueError that the call raises, checked to be a single sentence."""
    with pytest.raises(ValueError) as error:
        function(*args, **kwargs)
    text = str(error.value)
    assert '\n' not in text and '. ' not in text
    return text


@pytest.mark.parametrize('size, stride, nearest', [
    (30, None, '24 or 32'), (33, None, '32 or 40'), (5, None, '8 or 16'), (30, 4, '28 or 32')])  # fmt: skip
def test_a_size_that_patches_do_not_tile_names_the_two_nearest(size, stride, nearest):
    for img_size in (size, (size, 32), (32, size)):
        assert nearest in message(tiny, img_size=img_size, stride=stride)
    assert nearest in message(tiny(stride=stride).set_input_size, size)
    assert nearest in message(tiny(stride=stride, dynamic_img_size=True), images(size, 32))
    lower = int(nearest.split()[0])
    assert tiny(img_size=lower, stride=stride)(images(lower, lower)).shape == (2, 10)


@pytest.mark.parametrize('name', ['img_size', 'patch_size', 'stride'])
def test_the_class_takes_whole_numbers_alone(name):
    arguments = dict(img_size=32, patch_size=8, embed_dim=32, depth=1)
    for wrong in (8.0, (8, 8.0), (8, 8, 8), 'small'):
        assert f'{name} must be a whole number of at least 1, not {wrong!r}' in message(
            VisionMamba, **{**arguments, name: wrong}
        )


def test_another_size_than_the_models_names_both():
    text = message(tiny(), images(40, 32))
    assert '40 x 32' in text and '32 x 32' in text


@pytest.mark.parametrize('class_token', CLASS_TOKENS)
@pytest.mark.parametrize('kwargs', [
    dict(img_size=(24, 40)), dict(img_size=32), dict(img_size=(32, 24), rope=True), dict(random_token_order=True),
], ids=str)  # fmt: skip
def test_a_map_cell_is_its_patch_and_the_class_token_is_not_in_the_map(class_token, kwargs):
    model = without_mixing(tiny(class_token=class_token, global_pool='avg', **kwargs)).train()
    height, width = model.patch_embed.img_size
    rows, columns = model.patch_embed.grid_size
    before = images(height, width)
    maps, prefix = [], []
    for cell in [None, *product(range(rows), range(columns))]:
        image = before.clone()
        if cell:
            image[:, :, cell[0] * 8 : cell[0] * 8 + 8, cell[1] * 8 : cell[1] * 8 + 8] += 1
        output = model.forward_intermediates(image, indices=1, return_prefix_tokens=True, intermediates_only=True)[0]
        if model.num_prefix_tokens:
            output, tokens = output
            assert tokens.shape == (2, model.num_prefix_tokens, 32)
            prefix.append(tokens)
        assert output.shape == (2, 32, rows, columns)
        maps.append(output)
        if cell:
            changed = (output - maps[0]).abs().amax(dim=(0, 1)) > 1e-3
            assert changed.nonzero().tolist() == [list(cell)]
    assert all(torch.equal(tokens, prefix[0]) for tokens in prefix)


@pytest.mark.parametrize('class_token', CLASS_TOKENS)
def test_the_last_intermediate_normed_is_forward_features(class_token):
    model = tiny(class_token=class_token, global_pool='avg', depth=3)
    features = model.forward_features(images())
    final, outputs = model.forward_intermediates(images(), norm=True, return_prefix_tokens=True, output_fmt='NLC')
    assert len(outputs) == 3
    last = torch.cat([outputs[-1][1], outputs[-1][0]], dim=1) if model.num_prefix_tokens else outputs[-1]
    assert torch.equal(last, features)
    assert torch.equal(final, features)


def test_the_middle_token_is_scanned_in_the_middle():
    model = tiny(depth=1)
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(images())
    class_row = (model.cls_token + model.pos_embed[:, :1])[0, 0]
    assert torch.equal(seen[0][0, 8], class_row)
    assert seen[0].shape == (2, 17, 32)


def test_embedded_tokens_are_freed_after_the_first_block():
    model = tiny(depth=3)
    first, alive = [], []
    model.blocks[0].register_forward_pre_hook(lambda module, args: first.append(weakref.ref(args[0])))
    model.blocks[2].register_forward_pre_hook(lambda module, args: alive.append(first[0]() is not None))
    with torch.no_grad():
        model(images())
    assert alive == [False]


def test_a_graph_traced_by_fx_gives_the_models_outputs():
    model, x = tiny(proj_drop_rate=0.1), images()
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))
    norm, x = model.norm.bfloat16(), torch.randn(2, 32)
    assert torch.equal(torch.fx.symbolic_trace(norm)(x), norm(x))


def test_a_quantized_model_runs_under_autocast():
    model = timm.create_model('test_vim').eval()
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
    images = torch.rand(1, 3, *model.patch_embed.img_size)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        assert torch.isfinite(quantized(images)).all()


def test_a_product_operand_is_cast_where_autocast_would():
    x = torch.randn(3, 4).t()
    assert as_product_operand(x) is x
    with torch.autocast('cpu', torch.bfloat16):
        y = as_product_operand(x)
        assert y.dtype == torch.bfloat16 and y.is_contiguous() and torch.equal(y, x.bfloat16())
        assert as_product_operand(x.double()).dtype == torch.float64


@pytest.mark.parametrize('kwargs', [dict(random_token_order=True), dict(random_class_position=True)], ids=str)
def test_random_orders_are_seeded_and_only_for_training(kwargs):
    plain, model = tiny(), tiny(**kwargs)
    assert torch.equal(model(images()), plain(images()))
    model.train()

    def logits(seed):
        torch.manual_seed(seed)
        return model(images())

    assert torch.equal(logits(1), logits(1))
    assert any(not torch.allclose(logits(seed), logits(0)) for seed in range(1, 4))
    # whatever the scan order, tokens return to their places
    without_mixing(model)
    torch.testing.assert_close(model.forward_features(images()), without_mixing(plain).forward_features(images()))


def test_dynamic_sizes_equal_a_model_set_to_that_size():
    model = tiny(dynamic_img_size=True)
    for height, width in [(48, 32), (24, 64), (32, 32)]:
        fixed = tiny()
        fixed.set_input_size((height, width))
        torch.testing.assert_close(model(images(height, width)), fixed(images(height, width)))


def test_dynamic_padding_adds_zeros_at_the_bottom_and_the_right():
    model = tiny(dynamic_img_size=True, dynamic_img_pad=True)
    odd = images(27, 33)
    torch.testing.assert_close(model(odd), model(F.pad(odd, [0, 7, 0, 5])))
    fixed = tiny(img_size=(27, 33), dynamic_img_pad=True)
    assert fixed.patch_embed.grid_size == (4, 5)
    assert fixed(odd).shape == (2, 10)


@pytest.mark.parametrize(
    'to', [dict(img_size=48), dict(patch_size=4), dict(img_size=(24, 36), patch_size=(6, 12))], ids=str
)
def test_set_input_size_gives_a_model_of_that_size(to):
    model = tiny()
    model.pos_embed.requires_grad_(False)
    model.patch_embed.proj.weight.requires_grad_(False)
    model.set_input_size(**to)
    built = tiny(**to)
    assert model.pos_embed.shape == built.pos_embed.shape
    assert model.patch_embed.stride == built.patch_embed.stride
    assert model.feature_info == built.feature_info
    assert not model.pos_embed.requires_grad and not model.patch_embed.proj.weight.requires_grad
    height, width = built.patch_embed.img_size
    assert model(images(height, width)).shape == (2, 10)


def test_overlapping_patches_keep_their_stride():
    model = tiny(stride=4)
    assert model.patch_embed.grid_size == (7, 7)
    assert [info['reduction'] for info in model.feature_info] == [4, 4]
    maps = model.forward_intermediates(images(), intermediates_only=True)
    assert maps[0].shape == (2, 32, 7, 7)


@pytest.mark.parametrize('in_chans', [1, 3, 13])
def test_any_number_of_channels(in_chans):
    model = tiny(in_chans=in_chans)
    assert model.in_chans == in_chans
    assert model(images(channels=in_chans)).shape == (2, 10)


def test_copies_compute_the_same():
    model = tiny(rope=True)
    expected = model(images())
    assert torch.equal(deepcopy(model)(images()), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(images()), expected)


PROJECTIONS = ('in_proj', 'x_proj', 'x_proj_b', 'dt_proj', 'dt_proj_b', 'out_proj')


class LowRank(nn.Module):
    """A linear layer with a trainable low-rank addition: base(x) + x A^T B^T."""

    def __init__(self, base: nn.Linear, rank: int = 2):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.base = base
        self.A = nn.Parameter(torch.randn(rank, base.in_features, generator=generator))
        self.B = nn.Parameter(torch.randn(base.out_features, rank, generator=generator))

    def forward(self, x):
        return self.base(x) + x @ self.A.T @ self.B.T


@pytest.mark.parametrize('backend', AVAILABLE)
@pytest.mark.parametrize('name', PROJECTIONS)
def test_a_forward_hook_on_a_projection_takes_effect(backend, name):
    hooked, scaled = tiny(), tiny()
    with use_scan_backend(backend), torch.no_grad():
        plain = hooked(images())
        for model in (hooked, scaled):
            for block in model.blocks:
                projection = getattr(block.mixer, name)
                if model is hooked:
                    projection.register_forward_hook(lambda module, args, output: 1.5 * output)
                else:
                    for parameter in projection.parameters():
                        parameter.mul_(1.5)
        torch.testing.assert_close(hooked(images()), scaled(images()))
        assert not torch.allclose(hooked(images()), plain, rtol=1e-3)


@pytest.mark.parametrize('backend', AVAILABLE)
@pytest.mark.parametrize('name', PROJECTIONS)
def test_a_low_rank_wrapper_on_a_projection_takes_effect_and_trains(backend, name):
    wrapped, merged = tiny(), tiny()
    with use_scan_backend(backend):
        plain = wrapped(images())
        for adapted, base in zip(wrapped.blocks, merged.blocks):
            wrapper = LowRank(getattr(adapted.mixer, name))
            setattr(adapted.mixer, name, wrapper)
            with torch.no_grad():
                getattr(base.mixer, name).weight.add_(wrapper.B @ wrapper.A)
        torch.testing.assert_close(wrapped(images()), merged(images()), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(wrapped(images()), plain, rtol=1e-3)
        wrapped(images()).square().sum().backward()
    for block in wrapped.blocks:
        adapter = getattr(block.mixer, name)
        assert adapter.A.grad.abs().sum() > 0 and adapter.B.grad.abs().sum() > 0


def test_peft_adapts_every_projection():
    peft = pytest.importorskip('peft')
    model = peft.get_peft_model(tiny(), peft.LoraConfig(r=2, target_modules=list(PROJECTIONS)))
    plain = model(images())
    adapters = [parameter for name, parameter in model.named_parameters() if 'lora_B' in name]
    assert len(adapters) == 2 * len(PROJECTIONS)
    for parameter in adapters:
        nn.init.normal_(parameter, std=0.1)
    adapted = model(images())
    assert not torch.allclose(adapted, plain, rtol=1e-3)
    adapted.sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in adapters)
    torch.testing.assert_close(model.merge_and_unload()(images()), adapted, rtol=1e-4, atol=1e-5)
