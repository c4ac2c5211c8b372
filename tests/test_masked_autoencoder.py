"""Masked autoencoders: the original's numbers, any encoder, only visible tokens, timm's verbs."""

import golden_data
import pytest
import timm
import torch
from test_golden_layers import close

import vim_timm  # noqa: F401  registers the models
from vim_timm.layers.masking import random_masking, take_tokens
from vim_timm.layers.patches import normalize_patches, patchify
from vim_timm.models import masked_autoencoder
from vim_timm.models.checkpoint import CheckpointError
from vim_timm.models.masked_autoencoder import MaskedAutoencoder, checkpoint_filter_fn
from vim_timm.tasks.masked import patch_loss

LOSSES = golden_data.groups('mae/loss.npz')
WHOLE = sorted((golden_data.root() / 'mae').glob('model_*.npz'))
DECODER = dict(decoder_dim=32, decoder_depth=1, decoder_heads=4)
TINY = {  # small versions of every kind of encoder
    'mae_vim_tiny_patch4_32': dict(depth=2, embed_dim=32, **DECODER),
    'vim_nano_patch4_32': dict(depth=2, embed_dim=32),
    'mae_vim_small_patch16_224': dict(img_size=64, depth=2, embed_dim=32, decoder='vim', **DECODER),
    'vim_tiny_patch16_rope_ape_gap_224': dict(img_size=64, depth=2, embed_dim=32),
    'mae_vim2_tiny_patch4_32': dict(depth=2, embed_dim=32, expand=2, d_state=16, decoder='vim2', **DECODER),
    'mae_vim2_tiny_patch16_224': dict(
        img_size=64, depth=2, embed_dim=32, expand=2, d_state=16, class_token='middle', **DECODER
    ),
    'mae_vim_hybrid_small_patch16_224': dict(img_size=64, depth=2, embed_dim=32, num_heads=2, **DECODER),
    'vim_hybrid_tiny_patch4_32': dict(depth=2, embed_dim=32, num_heads=2),
    'test_vit': dict(img_size=64),
    'test_vit2': dict(img_size=64),
    'test_vit3': dict(img_size=64),
    'deit_tiny_distilled_patch16_224': dict(img_size=64, depth=2),
    'vit_tiny_patch16_224': dict(img_size=64, depth=2, global_pool='avg'),
    'vit_medium_patch16_reg4_gap_256': dict(img_size=64, depth=2, embed_dim=64, num_heads=2),
}


def make(name, **kwargs):
    model = timm.create_model(name, num_classes=0, **{**TINY[name], **kwargs})
    return model if name.startswith('mae_') else MaskedAutoencoder(model, **DECODER)


def images(model, batch=2):
    return torch.randn(batch, model.in_chans, *model.patch_embed.img_size)


def original(path):
    """The original's masked autoencoder as ours in float64, and its arrays."""
    arrays, meta = golden_data.load(path)
    encoder = timm.create_model(
        'vit_tiny_patch16_224',
        num_classes=0,
        norm_layer=lambda *args, **kwargs: torch.nn.LayerNorm(*args, **{**kwargs, 'eps': meta['layernorm_eps']}),
        **{key: meta[key] for key in ('img_size', 'patch_size', 'embed_dim', 'depth', 'num_heads', 'mlp_ratio')},
    )
    decoder = dict(decoder_dim=meta['decoder_embed_dim'], decoder_depth=meta['decoder_depth'])
    model = MaskedAutoencoder(encoder, meta['mask_ratio'], decoder_heads=meta['decoder_num_heads'], **decoder).double()
    state = golden_data.split(arrays, 'state')
    weights = checkpoint_filter_fn({name: torch.from_numpy(value) for name, value in state.items()}, model)
    model.load_state_dict(weights)
    return model, arrays, meta


@pytest.mark.parametrize('path', WHOLE, ids=lambda path: path.stem)
def test_the_originals_predictions_loss_and_gradients(path):
    model, arrays, meta = original(path)
    x, noise = torch.from_numpy(arrays['input']).double(), torch.from_numpy(arrays['noise'])
    pred, mask = model(x, noise)
    assert torch.equal(mask, torch.from_numpy(arrays['mask']))
    close(pred, arrays['pred'])
    target = model.patchify(x)
    if meta['norm_pix_loss']:
        target = normalize_patches(target)[0]
    loss = patch_loss(pred, target, mask).mean()
    close(loss, arrays['loss'])
    loss.backward()
    gradients = golden_data.split(arrays, 'grad')
    for name, expected in gradients.items():
        close(model.get_parameter(masked_autoencoder._from_original(name)).grad, expected)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    own = {masked_autoencoder._from_original(name) for name in gradients}
    assert trained - own == {'encoder.pos_embed'}  # which the original does not train


@pytest.mark.parametrize('path', WHOLE, ids=lambda path: path.stem)
def test_the_originals_features_in_scan_order(path):
    model, arrays, _ = original(path)
    noise = torch.from_numpy(arrays['noise'])
    keep, _ = random_masking(noise, model.mask_ratio)
    latent = torch.from_numpy(arrays['latent'])
    by_noise = noise.argsort(dim=1)[:, : keep.shape[1]]
    in_order = take_tokens(latent[:, 1:], by_noise.argsort(dim=1))
    visible = model._embed(torch.from_numpy(arrays['input']).double(), keep)
    close(model._encode(*visible, keep), torch.cat([latent[:, :1], in_order], dim=1).numpy())


@pytest.mark.parametrize('case', LOSSES)
def test_the_originals_loss(case):
    arrays, meta = LOSSES[case]
    pred = torch.from_numpy(arrays['pred']).double().requires_grad_()
    target = patchify(torch.from_numpy(arrays['imgs']).double(), (meta['patch_size'],) * 2)
    if meta['norm_pix_loss']:
        target = normalize_patches(target)[0]
    loss = patch_loss(pred, target, torch.from_numpy(arrays['mask']).double()).mean()
    close(loss, arrays['loss'])
    loss.backward()
    close(pred.grad, arrays['grad_pred'])


@pytest.mark.parametrize('name', TINY)
def test_hidden_pixels_have_no_influence(name):
    model = make(name).eval()
    x = images(model)
    pred, mask = model(x)
    patches = model.patchify(x)
    other = model.unpatchify(torch.where(mask.unsqueeze(-1) > 0, torch.randn_like(patches), patches), x.shape[2:])
    assert not torch.equal(x, other)
    assert torch.equal(model(other)[0], pred)


@pytest.mark.parametrize('name', TINY)
def test_every_parameter_that_trains_has_a_gradient(name):
    model = make(name)
    pred, mask = model(images(model))
    (pred.square().mean(dim=-1) * mask).sum().backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not without


@pytest.mark.parametrize('name', TINY)
def test_verbs_are_the_encoders(name):
    model = make(name).eval()
    encoder, x = model.encoder, images(model)
    assert model.num_classes == 0
    assert torch.equal(model.forward_features(x), encoder.forward_features(x))
    assert torch.equal(model.forward_head(model.forward_features(x)), encoder(x))
    assert all(map(torch.equal, *(m.forward_intermediates(x, intermediates_only=True) for m in (model, encoder))))
    for attribute in ('num_features', 'head_hidden_size', 'embed_dim', 'num_prefix_tokens', 'feature_info'):
        assert getattr(model, attribute) == getattr(encoder, attribute)
    model.reset_classifier(7)
    assert model.num_classes == 7 and model.forward_head(model.forward_features(x)).shape == (2, 7)
    own = {name for name, _ in model.named_parameters()}
    kept = {name for name in model.no_weight_decay() & own if not name.startswith('decoder.blocks')}
    assert kept == {f'encoder.{name}' for name in encoder.no_weight_decay()} & own | {'decoder.mask_token'}


def test_evaluation_has_fixed_masks_and_training_random_ones():
    model = make('mae_vim_tiny_patch4_32').eval()
    x = images(model)
    pred, mask = model(x)
    assert pred.shape == (2, 64, 48) and mask.shape == (2, 64) and mask.sum() == 2 * 48
    again = model(x)
    assert torch.equal(again[0], pred) and torch.equal(again[1], mask)
    assert torch.equal(model(x[:1])[1], mask[:1])
    model.train()
    assert not torch.equal(model(x)[1], model(x)[1])


def test_the_encoder_sees_visible_tokens_in_scan_order(monkeypatch):
    model = make('mae_vim_tiny_patch4_32').eval()
    seen = []
    encode = model.encoder.encode
    monkeypatch.setattr(model.encoder, 'encode', lambda *args: seen.append(args) or encode(*args))
    lengths = []
    model.encoder.blocks[0].register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
    _, mask = model(images(model))
    ((_, grid, keep),) = seen
    assert grid == (8, 8) and lengths == [17]
    assert torch.equal(keep, torch.stack([row.eq(0).nonzero()[:, 0] for row in mask]))


def test_all_tokens_visible_is_the_plain_encoder():
    model = make('mae_vim_tiny_patch4_32').double().eval()
    x = images(model).double()
    everything = torch.arange(64).expand(2, -1)
    visible = model._embed(x, everything)
    assert torch.allclose(model._encode(*visible, everything), model.forward_features(x), atol=1e-12)


def test_sizes_channels_and_learned_positions():
    model = make(
        'mae_vim_tiny_patch4_32', img_size=(16, 24), patch_size=(8, 4), in_chans=5, decoder_pos_embed='learned'
    )
    assert model(torch.randn(2, 5, 16, 24))[0].shape == (2, 12, 160)
    assert 'decoder.pos_embed' in model.no_weight_decay()
    model.set_input_size((32, 24))
    pred, _ = model(torch.randn(2, 5, 32, 24))
    assert pred.shape == (2, 24, 160)
    pred.sum().backward()
    assert model.decoder.pos_embed.grad.any()
    flexible = make('mae_vim_tiny_patch4_32', dynamic_img_size=True)
    assert flexible(torch.randn(1, 3, 40, 24))[0].shape == (1, 60, 48)


def test_a_decoder_that_scans_keeps_its_states_from_decay():
    names = make('mae_vim_small_patch16_224').no_weight_decay()
    assert {'decoder.blocks.0.mixer.A_log', 'decoder.blocks.0.mixer.D_b', 'encoder.blocks.1.mixer.A_b_log'} <= names
    names = make('mae_vim2_tiny_patch4_32').no_weight_decay()
    assert {'decoder.blocks.0.mixer.A_log', 'decoder.blocks.0.mixer.dt_bias'} <= names


@pytest.mark.parametrize('dim', [32, 48, 100])
def test_decoders_of_any_width_that_positions_take(dim):
    model = make('mae_vim2_tiny_patch4_32', decoder_dim=dim)
    assert model(images(model))[0].shape == (2, 64, 48)


@pytest.mark.parametrize('name', ['mae_vim_small_patch16_224', 'mae_vim2_tiny_patch4_32'])
def test_weights_are_drawn_anew_after_meta_construction(name):
    model = make(name, device='meta').to_empty(device='cpu')
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float('nan'))
    model.init_weights()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert not list(model.buffers()) and model(images(model))[0].isfinite().all()


def test_pruned_features_leave_no_parameter_without_use():
    features = make('mae_vim_tiny_patch4_32', features_only=True, out_indices=[0])
    sum(f.sum() for f in features(torch.randn(2, 3, 32, 32))).backward()
    assert not [name for name, parameter in features.named_parameters() if parameter.grad is None]


def test_layers_by_depth():
    model = make('mae_vim_tiny_patch4_32')
    layer = model.group_matcher()
    assert layer('encoder.patch_embed.proj.weight') < layer('encoder.blocks.0.norm.weight')
    assert (
        layer('encoder.blocks.0.norm.weight') < layer('encoder.blocks.1.norm.weight') <= layer('decoder.embed.weight')
    )


def test_recomputed_activations_change_nothing():
    model, x = make('mae_vim_tiny_patch4_32'), torch.randn(1, 3, 32, 32)
    noise, gradients = torch.rand(1, 64), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x, noise)[0].square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert torch.allclose(*gradients)


class TestRefusals:
    @pytest.mark.parametrize('ratio', [0.0, 1.0, -0.5, 1.5])
    def test_ratio(self, ratio):
        with pytest.raises(ValueError, match='above 0 and below 1'):
            make('mae_vim_tiny_patch4_32', mask_ratio=ratio)

    def test_a_mask_that_leaves_no_token(self):
        model = make('mae_vim_tiny_patch4_32', mask_ratio=0.99)
        with pytest.raises(ValueError, match='leaves none of 64 patches visible'):
            model(images(model))

    def test_channels(self):
        with pytest.raises(ValueError, match='no batch of images of 3 channels'):
            make('mae_vim_tiny_patch4_32')(torch.randn(1, 4, 32, 32))

    def test_noise(self):
        with pytest.raises(ValueError, match='a number for each patch'):
            make('mae_vim_tiny_patch4_32')(torch.randn(1, 3, 32, 32), torch.rand(1, 63))

    def test_an_image_smaller_than_a_patch(self):
        with pytest.raises(ValueError, match='image size 2 cannot be tiled'):
            make('mae_vim_tiny_patch4_32', img_size=2)

    @pytest.mark.parametrize('name', ['mae_vim_tiny_patch4_32', 'test_vit'])
    @pytest.mark.parametrize('size', ['img_size', 'patch_size'])
    def test_a_size_that_is_no_whole_number(self, name, size):
        with pytest.raises(ValueError, match=f'{size} must be a whole number of at least 1, not 16.0'):
            make(name).set_input_size(**{size: 16.0})

    def test_overlapping_patches(self):
        with pytest.raises(ValueError, match='side by side'):
            MaskedAutoencoder('vim_tiny_patch16_stride8_224', img_size=64, depth=1)

    def test_layers_before_the_patches(self):
        encoder = timm.create_model('vit_tiny_r_s16_p8_224', depth=1)
        with pytest.raises(ValueError, match='side by side .* other layers before them, a HybridEmbed'):
            MaskedAutoencoder(encoder)

    def test_patches_dropped_twice(self):
        with pytest.raises(ValueError, match='patch_drop_rate does not go'):
            MaskedAutoencoder('test_vit', patch_drop_rate=0.5)

    def test_other_models(self):
        with pytest.raises(ValueError, match='not ResNet'):
            MaskedAutoencoder(timm.create_model('resnet18'))

    def test_unknown_arguments(self):
        with pytest.raises(TypeError, match='no_such_argument'):
            make('mae_vim_tiny_patch4_32', no_such_argument=1)
        with pytest.raises(TypeError, match='img_size'):
            MaskedAutoencoder(timm.create_model('test_vit'), img_size=32)

    def test_an_unknown_decoder(self):
        with pytest.raises(ValueError, match="not 'lstm'"):
            make('mae_vim_tiny_patch4_32', decoder='lstm')

    def test_decoder_width(self):
        with pytest.raises(ValueError, match='5 heads do not divide'):
            make('mae_vim_tiny_patch4_32', decoder_heads=5)
        for size in ('decoder_dim', 'decoder_depth', 'decoder_heads'):
            for wrong in (0, -1):
                with pytest.raises(ValueError, match=f'{size} must be a whole number of at least 1, not {wrong}'):
                    make('mae_vim_tiny_patch4_32', **{size: wrong})


class TestCheckpoints:
    def test_whole_state_dicts_load(self):
        model, other = make('mae_vim_tiny_patch4_32'), make('mae_vim_tiny_patch4_32')
        other.load_state_dict(checkpoint_filter_fn(model.state_dict(), other))
        assert torch.equal(other.decoder.mask_token, model.decoder.mask_token)

    def test_training_checkpoints_load(self):
        model, other = make('mae_vim_tiny_patch4_32'), make('mae_vim_tiny_patch4_32')
        content = {'state_dict': model.encoder.state_dict(), 'task_state': {'decoder': model.decoder.state_dict()}}
        other.load_state_dict(checkpoint_filter_fn(content, other))
        x = images(model)
        assert torch.equal(other.eval()(x)[0], model.eval()(x)[0])

    def test_an_encoder_alone_is_refused(self):
        model = make('mae_vim_tiny_patch4_32')
        with pytest.raises(CheckpointError, match='an encoder without its decoder'):
            checkpoint_filter_fn(model.encoder.state_dict(), model)

    def test_another_decoder_is_refused(self):
        model, other = make('mae_vim_tiny_patch4_32'), make('mae_vim_tiny_patch4_32', decoder_dim=48)
        with pytest.raises(CheckpointError, match='decoder'):
            checkpoint_filter_fn(model.state_dict(), other)


@pytest.mark.parametrize('encoder', ['test_vit', 'vim_nano_patch4_32'])
def test_checkpointing_computes_blocks_of_encoder_and_decoder_again(encoder):
    sizes = dict(img_size=16, depth=1, embed_dim=32) if encoder.startswith('vim') else {}
    model = MaskedAutoencoder(encoder, decoder_dim=32, decoder_depth=1, decoder_heads=2, **sizes).train()
    model.set_grad_checkpointing()
    calls = []
    for part, blocks in (('encoder', model.encoder.blocks), ('decoder', model.decoder.blocks)):
        blocks[0].register_forward_pre_hook(lambda *_, part=part: calls.append(part))
    size = model.encoder.patch_embed.img_size
    model(torch.randn(2, 3, *size))[0].sum().backward()
    assert sorted(calls) == ['decoder', 'decoder', 'encoder', 'encoder']


def test_an_encoder_is_left_alone_by_a_constructor_that_fails():
    encoder = timm.create_model('vim_nano_patch4_32', num_classes=10, depth=1, embed_dim=32)
    with pytest.raises(ValueError):
        MaskedAutoencoder(encoder, decoder_dim=510)
    assert all(parameter.requires_grad for parameter in encoder.parameters())
