"""The factorized-attention transformer for many channels and its masked autoencoder."""

import pytest
import timm
import torch
from einops import rearrange
from torchvision.models.feature_extraction import create_feature_extractor

import vim_timm  # noqa: F401  registers the models
from vim_timm.layers.factorized import ChannelAttention
from vim_timm.layers.masking import random_masking
from vim_timm.models.factorized_mae import pad_images
from vim_timm.ops import use_scan_backend

SMALL = dict(img_size=16, patch_size=4, in_chans=3, embed_dim=32, depth=2, num_heads=4)
DECODER = dict(decoder_dim=32, decoder_depth=1, decoder_heads=4)


def make(**kwargs):
    return timm.create_model('mae_favit_small_patch16_224', **{**SMALL, **DECODER, **kwargs})


def draw_masks(batch=2, channels=3, patches=16):
    keep, mask = random_masking(torch.rand(batch * channels, patches), 0.75)
    return keep.view(batch, channels, -1), mask.view(batch, channels, patches)


def test_the_published_sizes():
    model = timm.create_model('mae_favit_small_patch16_224', device='meta')
    assert (model.in_chans, model.patch_size, model.embed_dim, model.mask_ratio) == (13, (16, 16), 256, 0.75)
    assert len(model.encoder.blocks) == len(model.decoder.blocks) == 6
    assert model.decoder.blocks[0].patch_attn.num_heads == 8 and model.loss == 'l1'
    assert sum(p.numel() for p in model.parameters()) == 19_156_224


def test_raw_outputs_of_blocks_of_channels_are_refused():
    for extractor in ('hook', 'fx'):
        with pytest.raises(ValueError, match='this FactorizedViT are not one class token'):
            timm.create_model('test_favit', features_only=True, feature_cls=extractor)


def test_init_weights_draws_whatever_stands_in_the_heads_place():
    model = make().encoder
    for head in (torch.nn.Linear(32, 10, bias=False), torch.nn.Sequential(torch.nn.BatchNorm1d(32))):
        model.head = head
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, float('nan'))
        model.init_weights()
        assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_channel_attention_is_attention_among_the_visible_tokens_of_a_patch():
    layer = ChannelAttention(8, 2).double()
    keep, _ = draw_masks()
    x = torch.randn(2, 3, keep.shape[2], 8, dtype=torch.float64)
    visible = torch.zeros(2, 3, 16, dtype=torch.bool).scatter(2, keep, True)
    output = layer(x, keep, visible)
    for b in range(2):
        for c in range(3):
            for t in range(keep.shape[2]):
                patch = keep[b, c, t]
                there = [(d, (keep[b, d] == patch).nonzero()) for d in range(3)]
                group = torch.stack([x[b, d, int(i)] for d, i in there if len(i)])
                own = [d for d, i in there if len(i)].index(c)
                expected = layer(rearrange(group, 'c d -> 1 c 1 d'))[0, own, 0]
                assert torch.allclose(output[b, c, t], expected, atol=1e-12)


def test_no_image_is_a_batch_too():
    model, none = make(), torch.rand(0, 3, 16, 16)
    pred, mask = model(none)
    assert pred.shape == (0, 48, 16) and mask.shape == (0, 48)
    assert model.unpatchify(model.patchify(none), (16, 16)).shape == none.shape
    assert model.forward_intermediates(none)[1][0].shape == (0, 32, 4, 4)


@pytest.mark.parametrize('size', [16, 18])
def test_torchvisions_extractor_takes_it(size):
    model = make(img_size=size, num_classes=5).encoder.eval()
    images = torch.rand(2, 3, size, size)
    found = create_feature_extractor(model, {'blocks.0.drop_path': 'block', 'head': 'logits'})(images)
    torch.testing.assert_close(found['logits'], model(images))
    assert found['block'].shape == (2, 3, 1 + len(range(0, size, 4)) ** 2, 32)


def test_a_scripted_classifier_gives_its_logits():
    model = timm.create_model('favit_small_patch16_224', **SMALL, num_classes=5, scriptable=True).eval()
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


def test_hidden_pixels_and_absent_channels_have_no_influence():
    model = make().double().eval()
    x, noise = torch.randn(2, 3, 16, 16, dtype=torch.float64), torch.rand(2, 48)
    present = torch.tensor([[True, False, True], [True, True, True]])
    pred, mask = model(x, noise, present)
    assert mask.view(2, 3, 16).sum(dim=2).tolist() == [[12, 16, 12], [12, 12, 12]]
    patches = model.patchify(x)
    other = model.unpatchify(torch.where(mask.unsqueeze(-1) > 0, torch.randn_like(patches), patches), (16, 16))
    assert torch.equal(model(other, noise, present)[0], pred)


def test_an_absent_channel_may_hold_no_numbers():
    model, x = make(), torch.rand(2, 3, 16, 16)
    present = torch.tensor([[True, False, True], [True, True, True]])
    noise = torch.rand(2, 48)
    expected, _ = model(x, noise, present)
    x[0, 1] = float('nan')
    pred, _ = model(x, noise, present)
    pred.sum().backward()
    assert torch.equal(pred, expected)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


def test_what_is_present_is_said_of_each_channel_of_each_image():
    model, x = make(), torch.rand(2, 3, 16, 16)
    for shape in ((3,), (1, 3), (2, 4)):
        with pytest.raises(ValueError, match=r'present is .*, not \(2, 3\)'):
            model(x, present=torch.ones(shape, dtype=torch.bool))


def test_an_image_smaller_than_a_patch_is_refused_at_any_size_too():
    for model in (make(dynamic_img_size=True), make(dynamic_img_size=True).encoder):
        assert model(torch.rand(1, 3, 4, 30))[0].isfinite().all()
        with pytest.raises(ValueError, match='smaller than a patch'):
            model(torch.rand(1, 3, 3, 30))


def test_masks_differ_between_channels():
    _, mask = make().eval()(torch.randn(2, 3, 16, 16))
    assert mask.shape == (2, 48) and mask.view(2, 3, 16).unique(dim=1).shape[1] == 3


def test_all_visible_tokens_equal_no_mask():
    model = make().double().encoder
    patches, grid = model.embed(torch.randn(2, 3, 16, 16, dtype=torch.float64))
    everything = torch.arange(16).expand(2, 3, -1)
    plain = model.encode(patches, grid)[0]
    assert torch.allclose(model.encode(patches, grid, everything)[0], plain, atol=1e-12)
    there = torch.ones(2, 3, dtype=torch.bool)
    assert torch.allclose(model.encode(patches, grid, present=there)[0], plain, atol=1e-12)


def test_whole_channels_are_dropped_in_training_only():
    model = make(channel_drop=0.5)
    x, noise = torch.randn(200, 3, 16, 16), torch.rand(200, 48 + 3)
    _, mask = model(x, noise)
    dropped = mask.view(200, 3, 16).all(dim=2)
    assert torch.equal(dropped, (noise[:, 48:] < 0.5) & (noise[:, 48:] < noise[:, 48:].amax(dim=1, keepdim=True)))
    assert 0.3 < dropped.double().mean() < 0.5 and not dropped.all(dim=1).any()
    assert model.noise_count((16, 16)) == 51
    model.eval()
    assert model.noise_count((16, 16)) == 48
    assert model(x)[1].sum() == 200 * 3 * 12


@pytest.mark.parametrize('size', [16, 18])
@pytest.mark.parametrize('channel_drop', [0.0, 0.5])
def test_every_parameter_that_trains_has_a_gradient(size, channel_drop):
    torch.manual_seed(0)
    model = make(img_size=size, channel_drop=channel_drop)
    with torch.no_grad():
        model.encoder.patch_embed.pad_value.fill_(0.3)
    pred, mask = model(torch.randn(4, 3, size, size))
    ((pred - 0.1).abs().mean(dim=-1) * mask).sum().backward()
    assert model.encoder.patch_embed.pad_value.requires_grad == (size == 18)
    assert not [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]


def test_padding_has_the_learned_value():
    model = make(img_size=18)
    embed = model.encoder.patch_embed
    with torch.no_grad():
        embed.pad_value.fill_(0.3)
    x = torch.randn(1, 3, 18, 18)
    padded = torch.full((1, 3, 20, 20), 0.3)
    padded[:, :, :18, :18] = x
    assert torch.allclose(embed(x), make().encoder.patch_embed.__class__.forward(resized(embed), padded), atol=1e-6)
    assert model.unpatchify(model.patchify(x), (18, 18)).equal(x)


def resized(embed):
    embed.set_input_size(20)
    return embed


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_padding_changes_no_pixel(dtype):
    images, value = torch.randn(2, 3, 18, 17).to(dtype), torch.full([1], 3.3, dtype=dtype, requires_grad=True)
    padded = pad_images(images, value, (4, 4))
    assert padded.shape == (2, 3, 20, 20) and torch.equal(padded[:, :, :18, :17], images)
    assert (padded[:, :, 18:] == value).all() and (padded[:, :, :, 17:] == value).all()
    padded.float().sum().backward()
    assert value.grad == 2 * 3 * (20 * 20 - 18 * 17)


def test_sigmoid_ends_in_pixels():
    pred, _ = make(sigmoid=True)(10 * torch.randn(2, 3, 16, 16))
    assert pred.min() >= 0 and pred.max() <= 1


def test_a_classifier_on_the_mean_of_the_channels():
    model = timm.create_model('favit_small_patch16_224', num_classes=5, **SMALL).eval()
    x = torch.randn(2, 3, 16, 16)
    assert model(x).shape == (2, 5) and model.forward_features(x).shape == (2, 17, 32)
    (feature,) = timm.create_model('favit_small_patch16_224', features_only=True, out_indices=[1], **SMALL)(x)
    assert feature.shape == (2, 32, 4, 4)
    model.load_state_dict(
        {**make().encoder.state_dict(), **{f'head.{k}': v for k, v in model.head.state_dict().items()}}
    )


def test_refusals():
    with pytest.raises(ValueError, match='channel_drop'):
        make(channel_drop=1.0)
    with pytest.raises(ValueError, match='of 3 channels'):
        make()(torch.randn(1, 4, 16, 16))
    with pytest.raises(ValueError, match='smaller than a patch'):
        make(img_size=3)
    encoder = make().encoder
    patches, grid = encoder.embed(torch.randn(2, encoder.in_chans, 16, 16))
    with pytest.raises(ValueError, match='does not go with patches of'):
        encoder.encode(patches, grid, torch.zeros(1, encoder.in_chans, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match='mlp_ratio must be'):
        make(mlp_ratio=0)
    with pytest.raises(ValueError, match='FactorizedViT'):
        make(encoder='test_vim', num_heads=None)


def test_the_padding_is_a_parameter_where_there_is_any():
    model = make()
    names = model.state_dict().keys()
    assert 'encoder.patch_embed.pad_value' in names - dict(model.named_parameters()).keys()
    model.set_input_size((18, 16))
    assert model.state_dict().keys() == names
    assert isinstance(model.encoder.patch_embed.pad_value, torch.nn.Parameter)
    model.set_input_size((16, 16))
    assert not [name for name, parameter in model.named_parameters() if name.endswith('pad_value')]


@pytest.mark.parametrize('size', ['img_size', 'patch_size'])
def test_a_size_that_is_no_whole_number_is_refused(size):
    with pytest.raises(ValueError, match=f'{size} must be a whole number of at least 1, not 16.0'):
        make().set_input_size(**{size: 16.0})


@pytest.mark.parametrize('side', [16, 18])
def test_images_of_whole_numbers_are_refused_with_and_without_padding(side):
    model = make(img_size=side).eval()
    with pytest.raises((RuntimeError, ValueError), match='floating point|Input type'):
        model(torch.zeros(1, 3, side, side, dtype=torch.uint8))


def test_half_precision():
    model = make().eval()
    x = torch.randn(2, 3, 16, 16)
    expected = model(x)[0], model.forward_features(x)
    half = model.to(torch.bfloat16)
    for output, wanted in zip((half(x.bfloat16())[0], half.forward_features(x.bfloat16())), expected):
        assert output.dtype == torch.bfloat16
        assert (output - wanted).abs().max() <= 0.05 * wanted.abs().max()


def test_attention_that_has_every_derivative_hides_what_the_kernel_hides():
    layer, x = ChannelAttention(16, 2), torch.randn(2, 3, 4, 16)
    places = torch.stack([torch.randperm(6)[:4] for _ in range(6)]).view(2, 3, 4)
    visible = torch.zeros(2, 3, 6, dtype=torch.bool).scatter(2, places, True)
    visible[:, 0] = False  # no channel may look at this one, which looks at the others and itself
    expected = layer(x, places, visible)
    with use_scan_backend('reference'):
        torch.testing.assert_close(layer(x, places, visible), expected)
