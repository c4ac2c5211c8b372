"""Masked autoencoders from the command line: pretrain, look, measure, fine-tune."""

import csv
import json
import shutil
from types import SimpleNamespace

import pytest
import timm
import torch
from PIL import Image
from processes import TRAIN, VALIDATE, finish, ranks
from safetensors.torch import load_file
from test_resume import load

from vim_timm import export, predict, train, validate
from vim_timm.data import Batch
from vim_timm.data.unreadable import Unreadable
from vim_timm.errors import UserError
from vim_timm.hub import publish
from vim_timm.layers.pos_embed import resample_pos_embed
from vim_timm.models.masked_autoencoder import MaskedAutoencoder
from vim_timm.report.reconstruction import (
    Gallery,
    caption,
    hiding,
    measure,
    measure_bands,
    missing_numbers,
    reconstruct,
)
from vim_timm.settings import Process
from vim_timm.tasks.masked import MaskedImages, Reconstruction, patch_loss, psnr

MODEL = '--model vim_nano_patch4_32 --img-size 16 --in-chans 1 --model-kwargs depth=2 embed_dim=32'
BASE = (
    f'--dataset digits {MODEL} --device cpu --workers 0 --batch-size 359 --warmup-epochs 0 --log-interval 100'.split()
)
MAE = [*BASE, *'--mae --mask-ratio 0.5 --decoder-dim 32 --decoder-depth 1 --decoder-heads 4'.split()]
ADAM = [*MAE, *'--opt adamw --lr 1e-3'.split()]


def pretrain(folder, name, *flags, base=ADAM):
    arguments = [*base, *flags, '--output', str(folder), '--experiment', name]
    assert train.main(arguments) == 0
    return folder / name


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A short pretraining with everything on."""
    folder = tmp_path_factory.mktemp('mae')
    more = '--epochs 3 --model-ema --model-ema-decay 0.5 --gallery-interval 1 --tensorboard --norm-pix-loss'.split()
    return pretrain(folder, 'a', *more, '--save-encoder', str(folder / 'encoder.safetensors'))


def tiny(**kwargs):
    encoder = timm.create_model('vim_nano_patch4_32', img_size=16, in_chans=1, num_classes=0, depth=1, embed_dim=32)
    return MaskedAutoencoder(encoder, 0.5, decoder_dim=32, decoder_depth=1, decoder_heads=4, **kwargs)


def make_task(model=None, **kwargs):
    return MaskedImages(model or tiny(), {'input_size': (1, 16, 16), 'mean': (0.3,), 'std': (0.4,)}, **kwargs)


def make_batch(positions, epoch=0):
    images = torch.stack([torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(p)) for p in positions])
    keys = torch.tensor([(epoch, position, position) for position in positions])
    return Batch(images, torch.zeros(len(positions)), keys)


class TestTask:
    def test_masks_depend_on_seed_epoch_and_position_alone(self):
        def masks(task, batch):
            seen = []
            hook = task.autoencoder().register_forward_hook(lambda module, args, output: seen.append(output[1]))
            task.training_loss(batch)
            hook.remove()
            return seen[0]

        task = make_task(seed=1)
        mask = masks(task, make_batch([3, 4, 5]))
        assert torch.equal(mask[1:], masks(task, make_batch([4, 5])))
        assert not torch.equal(mask, masks(task, make_batch([3, 4, 5], epoch=1)))
        assert not torch.equal(mask, masks(make_task(seed=2), make_batch([3, 4, 5])))
        assert torch.equal(mask, masks(make_task(seed=1), make_batch([3, 4, 5])))

    def test_the_loss_of_a_batch_is_the_mean_of_its_parts(self):
        task = make_task()
        parts = [task.training_loss(make_batch(part)) for part in ([0, 1], [2, 3])]
        assert torch.allclose(task.training_loss(make_batch([0, 1, 2, 3])), sum(parts) / 2)

    def test_the_encoder_is_the_model_and_the_decoder_the_tasks(self):
        task, other = make_task(), make_task()
        task.setup_ema(0.5)
        state = task.get_checkpoint_state()
        assert state['state_dict'].keys() == task.autoencoder().encoder.state_dict().keys()
        other.load_checkpoint_state(state['state_dict'], state['task_state'])
        batch = make_batch([0, 1])
        assert torch.equal(task.predict(batch), other.predict(batch))
        average = task.get_checkpoint_state(ema=True)
        assert average['task_state_ema']['decoder'].keys() == state['task_state']['decoder'].keys()

    def test_predictions_are_of_hidden_pixels_in_0_to_1(self):
        task, batch = make_task(), make_batch([0, 1, 2])
        task.eval()
        result = task.reconstruct(batch)
        images = (batch.images * 0.4 + 0.3).clamp(0, 1)
        assert torch.allclose(result.images, images)
        hidden = result.mask.bool()
        assert hidden.sum(dim=(1, 2, 3)).tolist() == [128] * 3
        for i in range(3):
            difference = (result.output - images)[i][hidden[i]]
            scores = task.predict(batch)[i]
            assert torch.allclose(scores[1], difference.square().mean()) and scores[2].isclose(difference.abs().mean())
        assert torch.equal(result.composite[~hidden], images[~hidden])

    def test_infinite_predictions_are_no_pixels(self):
        model = tiny().eval()
        with torch.no_grad():
            model.decoder.pred.bias[:] = torch.inf
        assert make_task(model).predict(make_batch([0, 1])).isfinite().sum() == 0

    def test_normalized_targets_are_put_back_with_the_true_patchs_statistics(self):
        task, batch = make_task(norm_pix_loss=True), make_batch([0])
        model = task.eval().autoencoder()
        model.decoder.pred.weight.data.zero_()
        model.decoder.pred.bias.data.zero_()
        result = task.reconstruct(batch)
        means = model.patchify(batch.images).mean(dim=-1, keepdim=True).expand(-1, -1, 16)
        expected = (model.unpatchify(means, (16, 16)) * 0.4 + 0.3).clamp(0, 1)
        assert torch.allclose(result.output, expected, atol=1e-6)
        assert result.loss.item() == pytest.approx(15 / 16, rel=1e-3)  # the variance of n - 1

    def test_padding_does_not_count(self):
        real = torch.tensor([[[1.0, 0.0]]])
        pred, target = torch.tensor([[[1.0, 9.0], [1.0, 1.0]]]), torch.zeros(1, 2, 2)
        real = torch.cat([real, torch.ones(1, 1, 2)], dim=1)
        assert patch_loss(pred, target, torch.ones(1, 2), 'l1', real).item() == 1.0

    def test_psnr(self):
        assert psnr(torch.tensor(0.01)).item() == pytest.approx(20)


class TestTraining:
    def test_it_learns_and_shows_it(self, run):
        rows = json.loads((run / 'summary.json').read_text())
        assert rows[-1]['ema_loss'] < rows[0]['ema_loss'] and rows[-1]['train_loss'] < rows[0]['train_loss']
        assert {'eval_mse', 'eval_mae', 'eval_mean_psnr', 'eval_psnr_of_mean_mse'} <= rows[0].keys()
        pictures = [run / 'reconstruction.png', *(run / f'reconstruction-{epochs}.png' for epochs in (1, 2, 3))]
        assert all(path.read_bytes()[:4] == b'\x89PNG' for path in pictures)
        assert pictures[0].read_bytes() == pictures[3].read_bytes() != pictures[1].read_bytes()
        (events,) = (run / 'tensorboard').glob('events*')
        assert b'reconstruction' in events.read_bytes()

    def test_the_checkpoint_is_a_plain_encoder_for_timm(self, run):
        path = run / 'last.pth.tar'
        encoder = timm.create_model(
            'vim_nano_patch4_32', pretrained=True, pretrained_cfg_overlay=dict(file=str(path), num_classes=-1),
            img_size=16, in_chans=1, depth=2, embed_dim=32, num_classes=5,
        )  # fmt: skip
        average = torch.load(path, weights_only=True)['state_dict_ema']
        assert all(torch.equal(encoder.state_dict()[name], tensor) for name, tensor in average.items())
        saved = load_file(run.parent / 'encoder.safetensors')
        assert saved.keys() == average.keys() and all(torch.equal(saved[name], average[name]) for name in saved)

    def test_fine_tuning_and_linear_probing_start_from_it(self, run, tmp_path):
        flags = [*BASE, *'--opt adamw --lr 1e-3 --epochs 1'.split(), '--pretrained', '--pretrained-path']
        tuned = pretrain(tmp_path, 'tuned', str(run / 'last.pth.tar'), '--layer-decay', '0.7', base=flags)
        probed = pretrain(tmp_path, 'probed', str(run / 'last.pth.tar'), '--linear-probe', base=flags)
        start = torch.load(run / 'last.pth.tar', weights_only=True)['state_dict_ema']
        after = [torch.load(path / 'last.pth.tar', weights_only=True)['state_dict'] for path in (tuned, probed)]
        changed = [{name for name, tensor in start.items() if not torch.equal(state[name], tensor)} for state in after]
        assert changed[0] == start.keys() and not changed[1]
        assert after[1]['head.weight'].shape == (10, 32)

    def test_the_line_that_fine_tunes_prepares_images_alike(self, tmp_path, capsys):
        small = '--model mae_favit_small_patch16_224 --img-size 16 --in-chans 1 --mean 0.5 --std 0.25 --epochs 1'
        kwargs = (
            '--model-kwargs depth=1 embed_dim=32 num_heads=2 patch_size=8 decoder_dim=32 decoder_depth=1 sigmoid=no'
        )
        more = '--dataset digits --device cpu --workers 0 --batch-size 359 --opt adamw --lr 1e-3'
        pretrain(tmp_path, 'a', base=f'{small} {kwargs} {more}'.split())
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith('fine-tune it: '))
        words = line.removesuffix(' ...').split(' train.py ' if ' train.py ' in line else ' train ')[1].split()
        tuned = pretrain(tmp_path, 'b', '--epochs', '1', base=[*words, *more.split()])
        before, after = (torch.load(tmp_path / name / 'last.pth.tar', weights_only=True) for name in 'ab')
        assert after['data_config'] == before['data_config'] and tuned.exists()

    def test_an_encoder_is_exported_and_measured_at_another_size(self, tmp_path, capsys):
        """Whatever its decoder was told, and however the run named its channels."""
        small = '--model mae_favit_small_patch16_224 --input-size 1 16 16 --epochs 1'
        kwargs = '--model-kwargs depth=1 embed_dim=32 num_heads=2 patch_size=8 decoder_dim=32 decoder_depth=1'
        more = '--dataset digits --device cpu --workers 0 --batch-size 359 --opt adamw --lr 1e-3'
        run = pretrain(tmp_path, 'a', base=f'{small} {kwargs} {more}'.split()) / 'last.pth.tar'
        assert export.main(['--checkpoint', str(run), '--output', str(tmp_path / 'x.onnx')]) == 0
        flags = ['--checkpoint', str(run), '--mae', '--device', 'cpu', '--workers', '0']
        assert validate.main([*flags, '--img-size', '24']) == 0
        capsys.readouterr()
        assert validate.main([*flags, '--input-size', '3', '16', '16']) == 2
        assert 'another size (--num-classes, --img-size, --in-chans' in capsys.readouterr().err

    @pytest.mark.parametrize(('model', 'decoder'), [('mae_vim_tiny', 'vim'), ('mae_vim2_tiny', 'vim2')])
    def test_a_named_autoencoder_implies_it(self, model, decoder, tmp_path):
        wide = [flag.replace('vim_nano', model).replace('embed_dim=32', 'embed_dim=64') for flag in ADAM]
        named = [flag for flag in wide if flag != '--mae'] + ['--decoder', decoder]
        folder = pretrain(tmp_path, 'a', '--epochs', '1', base=named)
        assert load(tmp_path, 'a')['args']['mae'] and (folder / 'reconstruction.png').exists()
        assert validate.main(['--checkpoint', str(folder / 'last.pth.tar'), '--workers', '0', '--device', 'cpu']) == 0

    def test_half_precision_and_accumulation(self, tmp_path):
        flags = '--amp --amp-dtype bfloat16 --grad-accum-steps 2 --grad-checkpointing --epochs 1'.split()
        pretrain(tmp_path, 'a', *flags)
        assert 0 < load(tmp_path, 'a')['history'][0]['train_loss'] < 10

    def test_the_papers_augmentation_is_the_default(self):
        args = train.parse_args(ADAM)
        assert (args.scale, args.color_jitter, args.train_interpolation) == ([0.2, 1.0], 0.0, 'bicubic')
        assert train.parse_args([*ADAM, '--scale', '0.5', '1']).scale == [0.5, 1.0]
        assert train.parse_args(['--mae']).recipe == 'mae_digits'

    def test_a_resumed_run_is_bit_equal(self, tmp_path):
        flags = '--epochs 2 --model-ema --grad-accum-steps 2 --batch-size 200 --clip-grad 1'.split()
        pretrain(tmp_path, 'whole', *flags)
        pretrain(tmp_path, 'cut', *flags, '--resume', str(tmp_path / 'whole' / 'checkpoint-0.pth.tar'))
        first, second = load(tmp_path, 'whole'), load(tmp_path, 'cut')
        for part in ('task_state', 'task_state_ema'):
            one, other = (checkpoint[part]['decoder'] for checkpoint in (first, second))
            assert all(torch.equal(one[name], other[name]) for name in one)
        for name, tensor in first['state_dict'].items():
            assert torch.equal(tensor, second['state_dict'][name])

    def test_an_average_begins_with_the_trained_weights_where_there_was_none(self, tmp_path):
        pretrain(tmp_path, 'a', '--epochs', '1')
        more = ['--model-ema', '--model-ema-decay', '1', '--epochs', '2', '--resume', 'auto']
        pretrain(tmp_path, 'a', *more)
        saved = load(tmp_path, 'a')
        start = torch.load(tmp_path / 'a' / 'checkpoint-0.pth.tar', weights_only=True)
        for one, other in (
            (start['state_dict'], saved['state_dict_ema']),
            (start['task_state']['decoder'], saved['task_state_ema']['decoder']),
        ):
            assert all(torch.equal(one[name], other[name]) for name in one)

    @pytest.mark.parametrize('changed', ['--mask-ratio 0.75', '--mae-loss l1', ''])
    def test_a_run_goes_on_only_with_the_losses_that_it_measured(self, changed, run, tmp_path, capsys):
        line = [*ADAM, '--epochs', '4', '--resume', str(run / 'last.pth.tar'), '--output', str(tmp_path)]
        same = ['--norm-pix-loss'] if changed else []  # and without it, where nothing else is changed
        assert train.main([*line, *same, *changed.split()]) == 2
        flag = changed.split()[0] if changed else '--norm-pix-loss'
        assert f'measured other losses: {flag} was' in capsys.readouterr().err and not list(tmp_path.iterdir())
        if changed:
            assert train.main([*line, *same, '--mae-loss', 'mse']) == 0  # which was the usual one

    def test_pretraining_does_not_go_on_as_a_classifier_nor_the_reverse(self, run, tmp_path, capsys):
        assert train.main([*BASE, '--epochs', '1', '--output', str(tmp_path), '--experiment', 'plain']) == 0
        for base, path, message in (
            (BASE, run / 'last.pth.tar', 'is of masked pretraining, and this run is none: start from its encoder with'),
            (
                ADAM,
                tmp_path / 'plain' / 'last.pth.tar',
                'is of a run without --mae, and this run is masked pretraining',
            ),
        ):
            words = [*base, '--epochs', '4', '--output', str(tmp_path), '--experiment', 'b']
            assert train.main([*words, '--resume', str(path)]) == 2
            assert f'{path} {message}' in capsys.readouterr().err
            start = [*words, '--epochs', '1', '--overwrite', '--pretrained', '--pretrained-path', str(path)]
            assert train.main(start) == 0

    def test_an_encoder_s_file_tells_the_grid_of_its_positions(self, tmp_path):
        path = tmp_path / 'encoder.safetensors'
        base = ' '.join(ADAM).replace('--img-size 16 --in-chans 1', '--input-size 1 8 32').split()
        pretrain(tmp_path, 'long', '--epochs', '1', '--save-encoder', str(path), base=base)
        sizes = dict(img_size=16, in_chans=1, num_classes=10, depth=2, embed_dim=32)  # as many patches: 4 x 4 for 2 x 8
        overlay = dict(file=str(path), num_classes=-1)
        model = timm.create_model('vim_nano_patch4_32', pretrained=True, pretrained_cfg_overlay=overlay, **sizes)
        saved = load(tmp_path, 'long')['state_dict']['pos_embed']
        assert torch.equal(model.pos_embed, resample_pos_embed(saved, [4, 4], [2, 8], model.num_prefix_tokens))
        assert not torch.equal(model.pos_embed, saved)

    def test_a_finished_run_writes_its_encoder(self, run, tmp_path, capsys):
        shutil.copytree(run, tmp_path / 'a')
        more = '--epochs 3 --model-ema --model-ema-decay 0.5 --norm-pix-loss'.split()
        for place, name in (('auto', 'a'), (str(run / 'last.pth.tar'), 'b')):
            path = tmp_path / f'{name}.safetensors'
            pretrain(tmp_path, name, *more, '--resume', place, '--save-encoder', str(path))
            assert path.read_bytes() == (run.parent / 'encoder.safetensors').read_bytes()
            assert f'encoder: {path}' in capsys.readouterr().out

    def test_overwriting_leaves_no_picture_of_the_run_before(self, run, tmp_path):
        shutil.copytree(run, tmp_path / 'a')
        pretrain(tmp_path, 'a', '--epochs', '1', '--overwrite', '--gallery-interval', '0')
        assert not list((tmp_path / 'a').glob('reconstruction-[23].png'))

    def test_two_processes_train_like_one(self, tmp_path):
        """Ten steps of SGD without augmentation, weights to 1e-6, and no parameter is unused."""
        flags = [*MAE, *'--opt sgd --lr 0.05 --no-aug --epochs 2 --output'.split(), str(tmp_path)]
        assert train.main([*flags, '--batch-size', '280', '--experiment', 'one']) == 0
        finish(ranks(TRAIN, *flags, '--batch-size', '140', '--experiment', 'two', count=2, folder=tmp_path))
        first, second = load(tmp_path, 'one'), load(tmp_path, 'two')
        assert first['history'][-1]['eval_mse'] == pytest.approx(second['history'][-1]['eval_mse'], rel=1e-4)
        for one, other in (
            (first['state_dict'], second['state_dict']),
            (first['task_state']['decoder'], second['task_state']['decoder']),
        ):
            for name, tensor in one.items():
                torch.testing.assert_close(tensor, other[name], rtol=0, atol=1e-6)


class TestEvaluation:
    def test_predictions_are_read_as_they_were_trained(self, tmp_path, capsys):
        folder = pretrain(tmp_path, 'a', '--epochs', '1')
        flags = ['--checkpoint', str(folder / 'last.pth.tar'), '--device', 'cpu', '--workers', '0']
        assert validate.main([*flags, '--norm-pix-loss']) == 2
        assert 'was trained without --norm-pix-loss' in capsys.readouterr().err
        assert validate.main(flags) == 0

    def test_a_report(self, run, tmp_path):
        folder = tmp_path / 'report'
        folder.mkdir()
        for name in ('gallery_33.png', 'missing_channels.csv', 'gallery_mine.png'):
            (folder / name).write_text('of an earlier report, but the last')
        flags = ['--mae', '--checkpoint', str(run / 'last.pth.tar'), '--use-ema', '--device', 'cpu', '--workers', '0']
        results = ['--results-file', str(tmp_path / 'row.json'), '--results-format', 'json']
        assert validate.main([*flags, '--report', str(folder), *results]) == 0
        row = json.loads((tmp_path / 'row.json').read_text())
        logged = json.loads((run / 'summary.json').read_text())[-1]
        assert (row['mask_ratio'], row['count']) == (0.5, 359)
        for name in ('mse', 'mae', 'mean_psnr', 'psnr_of_mean_mse', 'loss'):
            assert row[name] == pytest.approx(logged[f'ema_{name}'], rel=1e-5)
        with open(folder / 'reconstruction.csv') as file:
            rows = list(csv.DictReader(file))
        assert [float(line['mask_ratio']) for line in rows] == [0.25, 0.5, 0.75, 0.9]
        assert all(0 < float(line['ssim_composite']) < 1 for line in rows)
        assert float(rows[0]['ssim_composite']) > float(rows[3]['ssim_composite'])
        report = json.loads((folder / 'report.json').read_text())
        assert report['result'] == row and len(report['ratios']) == 4
        pictures = {f'gallery_{percent}.png' for percent in (25, 50, 75, 90)}
        others = {'report.json', 'report.html', 'reconstruction.csv', 'gallery_mine.png'}
        assert {path.name for path in folder.iterdir()} == pictures | others
        assert 'oracle' in (folder / 'report.html').read_text()

    @pytest.mark.parametrize('damaged', [(1, 3), (0, 2, 4)])
    def test_no_process_waits_for_one_without_readable_images(self, damaged, run, tmp_path):
        folder = tmp_path / 'validation' / 'class'
        folder.mkdir(parents=True)
        for number in range(5):
            Image.new('L', (16, 16), 40 * number).save(folder / f'{number}.png')
        for number in damaged:
            (folder / f'{number}.png').write_bytes(b'')
        flags = f'--mae --checkpoint {run}/last.pth.tar --data-dir {tmp_path} --device cpu --workers 0'.split()
        one, two, report = (str(tmp_path / name) for name in ('one.csv', 'two.csv', 'report'))
        assert validate.main([*flags, '--results-file', one]) == 0
        finish(ranks(VALIDATE, *flags, '--results-file', two, '--report', report, count=2, folder=tmp_path))
        assert (tmp_path / 'one.csv').read_text() == (tmp_path / 'two.csv').read_text()
        assert (tmp_path / 'report' / 'gallery_50.png').exists() == (0 not in damaged)

    def test_metrics_by_hand(self):
        images, output = torch.rand(2, 3, 12, 12), torch.rand(2, 3, 12, 12)
        mask = torch.zeros(2, 3, 12, 12)
        mask[:, :, :4] = 1
        errors = Reconstruction(images, output, mask, torch.zeros(2)).errors()
        assert torch.allclose(errors[:, 0], (images - output)[:, :, :4].square().flatten(1).mean(dim=1))
        assert torch.allclose(errors[:, 1], (images - output)[:, :, :4].abs().flatten(1).mean(dim=1))

    def test_missing_channels(self):
        model = timm.create_model(
            'mae_favit_small_patch16_224', img_size=8, patch_size=4, in_chans=5, embed_dim=32, depth=1, num_heads=4,
            decoder_dim=32, decoder_depth=1, decoder_heads=4,
        )  # fmt: skip
        task = MaskedImages(model, {'input_size': (5, 8, 8), 'mean': (0.5,), 'std': (0.5,)})

        class Loader:
            unreadable = Unreadable(0)

            def epoch(self, epoch):
                yield Batch(torch.randn(6, 5, 8, 8), torch.zeros(6), torch.arange(18).view(6, 3))

            def __len__(self):
                return 1

        bands = measure_bands(task, Loader(), Process())
        assert [row['missing'] for row in bands] == missing_numbers(task) == [0, 1, 2, 4]
        assert 'mse_missing' not in bands[0] and all(row['mse_missing'] > 0 for row in bands[1:])
        row = measure(task, Loader(), Process(), 0.75)
        assert 'ssim_output' not in row and row['mse_of_neighbour'] > 0 and model.mask_ratio == 0.75


FACTORIZED = '--model mae_favit_small_patch16_224 --model-kwargs patch_size=8 embed_dim=32 depth=1 num_heads=4'


@pytest.mark.parametrize(
    ('flags', 'words'),
    [
        ('--mask-ratio 0', ['--mask-ratio', 'above 0']),
        ('--mask-ratio 1', ['below 1']),
        ('--mask-ratio 0.99', ['none of 16 patches']),
        ('--decoder-heads 5', ['5 heads']),
        ('--decoder lstm', ['--decoder']),
        ('--mixup 0.2', ['--mixup', 'labels']),
        ('--linear-probe', ['--linear-probe', 'labels']),
        ('--model resnet18 --model-kwargs', ['ResNet']),
        ('--img-size 3', ['3']),
        ('--channel-drop 0.2', ['MaskedAutoencoder has no channel_drop']),
        (f'{FACTORIZED} --decoder vim', ['FactorizedAutoencoder has no decoder']),
        (f'{FACTORIZED} --decoder-pos-embed learned'.replace('mae_', ''), ['no decoder_pos_embed']),
        (f'{FACTORIZED} sigmoid=True --mean 0 --std 1 --norm-pix-loss', ['sigmoid=True', 'leave one out']),
        ('--eval-metric top1', ['--eval-metric', 'mean_psnr']),
        ('--save-encoder nowhere/encoder.safetensors', ['nowhere']),
    ],
)
def test_mistakes_end_in_a_sentence(flags, words, tmp_path, capsys):
    assert train.main([*ADAM, *flags.split(), '--epochs', '1', '--output', str(tmp_path / 'output')]) != 0
    errors = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(errors) == 1 and all(word in errors[0] for word in words), errors
    assert not (tmp_path / 'output').exists()


def test_flags_of_masked_autoencoding_need_it(capsys):
    assert train.main([*BASE, '--mask-ratio', '0.5']) == 2
    assert 'add --mae' in capsys.readouterr().err
    assert validate.main(['--checkpoint', 'x.pth.tar', '--mask-ratios', '0.5']) == 2
    assert '--mask-ratios is for masked autoencoding: add --mae' in capsys.readouterr().err
    assert validate.main(['--checkpoint', 'x.pth.tar', '--mae', '--mask-ratios', '0.5']) == 2
    assert 'add --report FOLDER' in capsys.readouterr().err


def test_an_encoder_predicts_no_classes_and_has_no_accuracy(run, tmp_path, capsys):
    checkpoint = str(run / 'last.pth.tar')
    assert predict.main(['nothing.png', '--checkpoint', checkpoint]) == 2
    (tmp_path / 'nothing.png').touch()
    assert predict.main([str(tmp_path / 'nothing.png'), '--checkpoint', checkpoint]) == 2
    folder = tmp_path / 'hub'
    words = [checkpoint, '--output', str(folder), '--dry-run', '--repo-id', 'me/encoder']
    assert publish.main(words) == 0
    flags = ['--pretrained', '--dataset', 'digits', '--device', 'cpu', '--workers', '0']
    assert validate.main(['--model', f'local-dir:{folder}', *flags]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if 'error:' in line]
    assert 'knows no classes' in errors[1] and 'has no accuracy' in errors[2]
    assert timm.create_model(f'local-dir:{folder}', pretrained=True).num_classes == 0
    card = (folder / 'README.md').read_text()
    assert 'image-classification' not in card and 'softmax' not in card and '## Classes' not in card
    assert 'label_names' not in (folder / 'config.json').read_text()


def test_an_exported_encoder_predicts_no_classes(run, tmp_path, capsys):
    pytest.importorskip('onnxscript')
    path = str(tmp_path / 'encoder.onnx')
    (tmp_path / 'nothing.png').touch()
    assert export.main(['--checkpoint', str(run / 'last.pth.tar'), '--output', path]) == 0
    assert predict.main([str(tmp_path / 'nothing.png'), '--onnx', path]) == 2
    assert f'{path} is an encoder without a classifier, which knows no classes' in capsys.readouterr().err


def test_an_encoder_alone_is_refused(run, capsys):
    path = str(run.parent / 'encoder.safetensors')
    for model in (MODEL.split(), []):
        assert validate.main(['--mae', '--checkpoint', path, *model, '--dataset', 'digits', '--device', 'cpu']) == 2
        assert 'an encoder without its decoder' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('readable', 'said'), [(1, 'gallery: '), (0, 'no gallery: none of the images of the first process could be read')]
)
def test_a_gallery_shows_the_first_images_that_can_be_read(readable, said, capsys, tmp_path):
    batches = [make_batch([0, 1]), make_batch([2, 3])]
    for batch in batches[: 2 - readable]:
        batch.keys[:, 2] = -1
    loader = SimpleNamespace(epoch=lambda epoch: iter(part._replace(complete=False) for part in batches))
    trainer = SimpleNamespace(task=make_task(), epoch=1, folder=str(tmp_path), trackers=None)
    trainer.progress, trainer.evaluates_ema = SimpleNamespace(say=print), lambda: False
    gallery = Gallery(Process(), loader, 1)
    gallery.draw(trainer)
    assert said in capsys.readouterr().out
    assert (tmp_path / 'reconstruction.png').exists() == bool(readable)
    assert gallery.batch.places.tolist() == [2, 3] if readable else gallery.batch is None


def test_a_caption_counts_the_patches_that_are_hidden():
    """A mask ratio says no more than about how many: of 16 patches 90 % are 15."""
    task = make_task()
    assert caption(task, (16, 16)).startswith('Mask ratio 50 %: 8 of 16 patches (50 %) are hidden')
    with hiding(task, 0.9):
        assert caption(task, (16, 16)).startswith('Mask ratio 90 %: 15 of 16 patches (93.8 %) are hidden')


def test_pixels_that_are_no_numbers_are_refused():
    batch = make_batch([0, 7])
    batch.images[1, 0, 3, 3] = float('nan')
    with pytest.raises(UserError, match='image 7 .* not finite'):
        reconstruct(make_task(), Process(), batch, False)


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    base = [word if word != '16' else '8' for word in ADAM]
    return pretrain(tmp_path_factory.mktemp('few'), 'few', *'--epochs 1'.split(), base=base) / 'last.pth.tar'


class TestFewPatches:
    """Pictures of 8 pixels in patches of 4: of four patches a share of 90 % leaves none."""

    FLAGS = '--mae --device cpu --workers 0 --dataset digits --batch-size 359'.split()

    def test_the_console_says_how_many_are_hidden(self, tmp_path, capsys):
        """Not the ratio that was asked for: of four patches 60 % are three."""
        base = [{'16': '8', '0.5': '0.6'}.get(word, word) for word in ADAM]
        folder = pretrain(tmp_path, 'few', '--epochs', '1', base=base)
        assert 'input 1x8x8, 3 of 4 patches (75 %) hidden, on 1 x cpu' in capsys.readouterr().out
        assert validate.main([*self.FLAGS, '--checkpoint', str(folder / 'last.pth.tar')]) == 0
        assert ' * 3 of 4 patches (75 %) hidden: MSE ' in capsys.readouterr().out

    def test_a_report_leaves_out_what_hides_all(self, small, tmp_path, capsys):
        flags = [*self.FLAGS, '--checkpoint', str(small), '--report', str(tmp_path / 'report')]
        assert validate.main(flags) == 0
        assert 'not compared: 90 % hidden, which leaves no patch visible' in capsys.readouterr().out
        report = json.loads((tmp_path / 'report' / 'report.json').read_text())
        assert [row['mask_ratio'] for row in report['ratios']] == [0.25, 0.5, 0.75]

    def test_errors_that_are_not_finite_come_last_and_are_null_in_json(self, small, tmp_path, capsys):
        content = torch.load(small, weights_only=True)
        torch.save(content, tmp_path / 'b.pth.tar')
        content['state_dict']['norm.weight'].fill_(3e38)
        for name in ('a', 'c'):
            torch.save(content, tmp_path / f'{name}.pth.tar')
        flags = [*self.FLAGS, '--checkpoint', str(tmp_path), '--report', str(tmp_path / 'report')]
        assert validate.main([*flags, '--results-file', str(tmp_path / 'rows.json')]) == 0
        paths = [tmp_path / 'rows.json', *(tmp_path / 'report' / name / 'report.json' for name in 'ab')]
        rows, broken, whole = (json.loads(path.read_text(), parse_constant=pytest.fail) for path in paths)
        assert json.loads(capsys.readouterr().out.split('--result')[1], parse_constant=pytest.fail) == rows
        assert rows[0] == {**whole['result'], 'checkpoint': str(tmp_path / 'b.pth.tar')} and rows[0]['mse'] > 0
        assert rows[1]['mse'] is rows[2]['mse'] is broken['result']['mse'] is None

    def test_a_chosen_one_is_refused(self, small, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(validate.reconstruction, 'measure', lambda *_, **__: pytest.fail('measured'))
        flags = [*self.FLAGS, '--checkpoint', str(small), '--report', str(tmp_path / 'report')]
        assert validate.main([*flags, '--mask-ratios', '0.5', '0.9']) == 2
        error = capsys.readouterr().err
        assert '--mask-ratios' in error and 'leaves none of 4 patches' in error and error.count('\n') == 1


def test_a_gallery_of_an_average_on_the_host_shows_the_model_itself(tmp_path, monkeypatch):
    """Where the model is on another device, the average could not even take its images."""
    asked = []

    def watched(task, process, batch, ema, present=None):
        asked.append(ema)
        return reconstruct(task, process, batch, ema, present)

    monkeypatch.setattr('vim_timm.report.reconstruction.reconstruct', watched)
    pretrain(tmp_path, 'here', *'--epochs 1 --model-ema'.split())
    pretrain(tmp_path, 'host', *'--epochs 1 --model-ema --model-ema-force-cpu'.split())
    assert asked == [True, False]
