"""What is Vision Mamba 2's own: sizes, arguments, the layout of its tokens, modules that are called."""

import pytest
import timm
import torch
import torch.nn.functional as F

import vim_timm  # noqa: F401  registers the models
from vim_timm.layers import BiSSD, Layout, token_order
from vim_timm.layers.token_order import hidden_before


def parameters(name):
    return sum(p.numel() for p in timm.create_model(name, device='meta').parameters())


def build(**kwargs):
    torch.manual_seed(0)
    small = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, headdim=16, d_state=16, num_classes=5)
    return timm.create_model('vim2_tiny_patch16_224', **{**small, **kwargs}).eval()


def test_sizes():
    assert abs(parameters('vim2_tiny_patch16_224') / parameters('vim_tiny_patch16_224') - 1) < 0.1
    assert 0.4e6 < parameters('vim2_mnist') < 0.6e6
    larger = timm.create_model('vim2_mnist', embed_dim=256, depth=6)
    assert len(larger.blocks) == 6 and larger(torch.randn(1, 1, 28, 28)).shape == (1, 10)


@pytest.mark.parametrize(
    'arguments, sentence',
    [
        (
            dict(embed_dim=48, headdim=64, expand=2),
            r'headdim 64 does not divide the 96 channels .* use one of \[8, 16, 32, 48, 96\]',
        ),
        (dict(orders='col'), "orders must be 'row', 'column', 'both' or 'alternate', not 'col'"),
        (dict(conv='3d'), "conv must be '2d', '1d' or 'none'"),
        (dict(stem='conv', patch_size=6, img_size=36), 'patch_size must be 2, 4, 8 or 16, not 6'),
        (dict(stem='conv', dynamic_img_pad=True), "dynamic_img_pad needs stem 'patch'"),
        (dict(rope=True, d_state=18), 'rope needs a d_state divisible by 4, not 18: use 20'),
        (dict(mlp_ratio=-1), 'mlp_ratio must be 0 for none, or more'),
        (dict(expand=-1), 'expand must be a number above 0, not -1'),
        (dict(expand=0), 'expand must be a number above 0, not 0'),
        (
            dict(embed_dim=96, expand=0.1),
            'the 9 channels of width 96, expand 0.1: let width times expand be a multiple of',
        ),
        (dict(weight_init='early'), "weight_init must be '' or 'skip'"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else '',
)
def test_values_that_do_not_fit_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        build(**arguments)


@pytest.mark.parametrize(
    'arguments',
    [
        dict(orders='row'),
        dict(orders='column', conv='1d'),
        dict(orders='both', conv='none', mlp_ratio=0),
        dict(bc_norm=True, rope=True, class_token='middle', global_pool='token'),
        dict(class_token='double', stem='conv'),
    ],
    ids=str,
)
@pytest.mark.filterwarnings('ignore:.*torch.jit:FutureWarning')
def test_every_option_trains_scripts_and_takes_masked_images(arguments):
    model = build(**arguments)
    images = torch.randn(2, 3, 16, 16)
    logits = model(images)
    torch.testing.assert_close(torch.jit.script(model)(images), logits)
    keep = torch.tensor([[0, 3, 5, 6, 15], [1, 2, 7, 8, 9]])
    tokens, _ = model.encode(*model.embed(images), keep=keep)
    (logits.sum() + tokens.square().sum()).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing or all(name.startswith(('norm', 'head', 'fc_norm')) for name in missing)


def test_patches_are_all_of_the_grid_or_those_that_are_kept():
    model = build().eval()
    patches, grid = model.embed(torch.randn(1, 3, 16, 16))
    keep = torch.arange(5)[None]
    with pytest.raises(ValueError, match='8 patches are neither all of the grid nor the 5 of keep'):
        model.encode(patches[:, :8], grid, keep=keep)
    with pytest.raises(ValueError, match='visible patches of 1 images do not go with 2 images'):
        model.encode(patches.expand(2, -1, -1), grid, keep=keep)
    torch.testing.assert_close(
        model.encode(patches, grid, keep=keep)[0], model.encode(patches[:, :5], grid, keep=keep)[0]
    )


@pytest.mark.parametrize(
    'name, arguments, looks',
    [
        ('test_vim2', dict(), True),
        ('test_vim2', dict(conv='1d'), False),
        ('test_vim2', dict(rope=True), False),
        ('test_vim2', dict(bc_norm=True), False),
        ('test_vim2', dict(gap_decay=True), False),
        ('test_vim_hybrid', dict(), True),
        ('test_vim_hybrid', dict(ssm='mamba'), False),
    ],
    ids=str,
)
def test_neighbours_of_visible_patches_are_looked_up_for_mixers_that_use_them(name, arguments, looks, monkeypatch):
    model, asked = timm.create_model(name, img_size=64, **arguments), []
    monkeypatch.setattr(token_order, 'visible_neighbours', asked.append)
    model.encode(*model.embed(torch.randn(1, 3, 64, 64)), keep=torch.tensor([[0, 3, 5]]))
    assert bool(asked) == looks


def test_columns_of_an_image_are_the_rows_of_its_transpose():
    torch.manual_seed(0)
    row, column = (BiSSD(16, d_state=8, headdim=8, orders=o, conv='none') for o in ('row', 'column'))
    column.load_state_dict(row.state_dict())
    x = torch.randn(2, 3, 4, 16)
    turned = column(x.flatten(1, 2), Layout((3, 4), [], None)).unflatten(1, (3, 4))
    expected = row(x.transpose(1, 2).flatten(1, 2), Layout((4, 3), [], None)).unflatten(1, (4, 3)).transpose(1, 2)
    torch.testing.assert_close(turned, expected)


def test_a_hidden_patch_is_a_hole_in_the_convolution():
    torch.manual_seed(0)
    mixer = BiSSD(16, d_state=8, headdim=8)
    keep = torch.tensor([[0, 1, 4, 8], [2, 3, 5, 7]])
    x = torch.randn(2, 4, mixer.conv2d.in_channels)
    image = torch.zeros(2, 9, x.shape[-1]).scatter(1, keep[..., None].expand_as(x), x)
    whole = mixer._on_grid(image, Layout((3, 3), [], None))
    some = mixer._on_grid(x, Layout((3, 3), [], keep))
    torch.testing.assert_close(some, whole.gather(1, keep[..., None].expand_as(x)))


@pytest.mark.parametrize('order', ['row', 'column'])
def test_states_decay_over_hidden_patches_as_over_visible_ones(order):
    """A pair of patches meets the steps of all on the way, and those of each hidden one once more."""
    torch.manual_seed(0)
    mixer = BiSSD(8, d_state=4, headdim=4, expand=1, orders=order, conv='none', gap_decay=True).double()
    keep = torch.tensor([[0, 1, 4, 8], [2, 3, 5, 7]])
    x = torch.randn(2, 4, 8, dtype=torch.double)
    z, u, B, C, delta = mixer.in_proj(x).split([8, 8, 4, 4, 2], -1)
    u, B, C, dt = F.silu(u).unflatten(-1, (2, 4)), F.silu(B), F.silu(C), F.softplus(delta + mixer.dt_bias)
    places = keep if order == 'row' else keep % 3 * 3 + keep // 3
    steps = torch.zeros(2, 9, 2, dtype=torch.double)  # of every place of the grid in the order of the visit
    for image, visit in enumerate(places.tolist()):
        for token, place in enumerate(visit):
            before = max((other for other in visit if other < place), default=-1)
            steps[image, before + 1 : place + 1] = (dt * mixer.A_log.exp())[image, token]
    s = steps.cumsum(1).gather(1, places[..., None].expand(-1, -1, 2))
    decays = torch.exp(-(s[:, :, None] - s[:, None]).abs())
    y = torch.einsum('bin,bjn,bijh,bjh,bjhp->bihp', C, B, decays, dt, u) + mixer.D[:, None] * u
    wanted = mixer.out_proj(mixer.norm(y.flatten(2)) * F.silu(z))
    torch.testing.assert_close(mixer(x, Layout((3, 3), [], keep)), wanted)
    every, whole = torch.arange(9)[None], torch.randn(1, 9, 8, dtype=torch.double)
    torch.testing.assert_close(mixer(whole, Layout((3, 3), [], every)), mixer(whole, Layout((3, 3), [], None)))


def test_hidden_patches_are_counted_between_patches_alone():
    layout = Layout((3, 3), [2], torch.tensor([[0, 1, 4, 8], [2, 3, 5, 7]]))
    assert hidden_before(layout, False).tolist() == [[0, 0, 0, 2, 3], [0, 0, 0, 1, 1]]
    assert hidden_before(layout, True).tolist() == [[0, 2, 0, 0, 3], [0, 0, 0, 0, 3]]
    for kept in (0, 1):
        assert hidden_before(Layout((3, 3), [0, 1], layout.keep[:, :kept]), True).tolist() == 2 * [[0] * (2 + kept)]


def test_decay_over_gaps_needs_one_order():
    with pytest.raises(ValueError, match="gap_decay needs one order, 'row' or 'column'"):
        timm.create_model('test_vim2', orders='both', gap_decay=True)


@pytest.mark.parametrize('name', ['in_proj', 'conv2d', 'norm', 'out_proj'])
def test_a_hooked_module_is_called(name):
    model = build(depth=1)
    images, called = torch.randn(1, 3, 16, 16), []
    expected = model(images)
    module = model.blocks[0].mixer.get_submodule(name)
    module.register_forward_hook(lambda *_: called.append(1))
    torch.testing.assert_close(model(images), expected)
    module.register_forward_hook(lambda module, given, output: 0 * output)
    assert called and not torch.allclose(model(images), expected)


def test_activations_of_ten_thousand_stay_right():
    model = build(depth=1)
    with torch.no_grad():
        model.blocks[0].mixer.in_proj.weight.mul_(1e4)
    images = torch.randn(2, 3, 16, 16)
    expected = build(depth=1).double()
    expected.load_state_dict(model.state_dict())
    wanted = expected(images.double())
    error = (model(images).double() - wanted).norm() / wanted.norm()
    assert error < 1e-2


@pytest.mark.parametrize('built, asked', [
    (dict(stem='conv'), dict(stem='conv', in_chans=1)),
    (dict(stem='conv'), dict(stem='conv', num_classes=7)),
    (dict(head_hidden=8), dict(head_hidden=8, num_classes=7)),
])  # fmt: skip
def test_weights_fit_other_channels_and_classes(tmp_path, built, asked):
    sizes = dict(depth=1, embed_dim=32, img_size=16)
    torch.save(timm.create_model('vim2_nano_patch4_32', **sizes, **built).state_dict(), tmp_path / 'w.pth')
    overlay = dict(file=str(tmp_path / 'w.pth'), num_classes=10)
    model = timm.create_model('vim2_nano_patch4_32', pretrained=True, pretrained_cfg_overlay=overlay, **sizes, **asked)
    channels, classes = asked.get('in_chans', 3), asked.get('num_classes', 10)
    assert model(torch.randn(2, channels, 16, 16)).shape == (2, classes)
