"""What train.py and validate.py do when nothing goes wrong."""

import csv
import gzip
import json
import os
import re
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import timm
import torch
from logs import settled
from PIL import Image
from timm.data.loader import adapt_to_chs
from timm.task import ClassificationTask

from vim_timm import train, validate
from vim_timm.data import Digits
from vim_timm.engine import Hooks, build
from vim_timm.engine.checkpoint import Saver
from vim_timm.engine.saved import open_saved
from vim_timm.errors import TrainingStopped
from vim_timm.settings import Process
from vim_timm.tasks import adopt, make_task

BASE = '--device cpu --workers 0 --batch-size 64 --log-interval 100 --opt adamw --lr 1e-3 --epochs 1'
DIGITS = f'{BASE} --dataset digits --model test_vit --img-size 16 --in-chans 1'


@pytest.fixture
def run(tmp_path):
    """Train here and return (folder of the run, rows of its log)."""

    def start(flags, *more, name='a'):
        arguments = [*flags.split(), *more, '--output', str(tmp_path), '--experiment', name, '--overwrite']
        assert train.main(arguments) == 0
        return tmp_path / name, json.loads((tmp_path / name / 'summary.json').read_text())

    return start


@pytest.fixture
def evaluate(tmp_path):
    """Evaluate and return the result row."""

    def start(*flags):
        path = tmp_path / 'result.json'
        results = ['--results-file', str(path), '--results-format', 'json']
        assert validate.main([*map(str, flags), '--workers', '0', '--device', 'cpu', *results]) == 0
        return json.loads(path.read_text())

    return start


def make_images(root, classes=2, count=8, mode='RGB', size=32):
    """An image folder whose classes differ in brightness."""
    rng = np.random.default_rng(0)
    for split in ('train', 'validation'):
        for label in range(classes):
            folder = root / split / f'class{label}'
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 100, (size, size, 3)) + 150 * label / (classes - 1)
                Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(folder / f'{i}.png')
    return root


def test_digits_are_split_by_class():
    held_out, kept = Digits(train=False), Digits(train=True)
    assert len(held_out) + len(kept) == 1797
    share = [
        held_out.labels.count(digit) / (held_out.labels.count(digit) + kept.labels.count(digit)) for digit in range(10)
    ]
    assert min(share) > 0.19 and max(share) < 0.21
    image, label = kept[0]
    assert image.size == (8, 8) and image.mode == 'L' and 0 <= label < 10


@pytest.mark.parametrize('flags', ['', '--amp --amp-dtype bfloat16', '--no-prefetcher', '--channels-last'])
def test_validate_prints_what_training_saw(flags, run, evaluate):
    folder, rows = run(DIGITS, *flags.split())
    result = evaluate('--checkpoint', folder / 'last.pth.tar')
    assert result['top1'] == pytest.approx(rows[-1]['eval_top1'], abs=0.01)
    assert result['count'] == 359
    spelled = '--model test_vit --dataset digits --img-size 16 --in-chans 1 --num-classes 10'.split()
    assert evaluate(*spelled, '--checkpoint', folder / 'last.pth.tar', *flags.split())['top1'] == result['top1']


def test_a_checkpoint_holds_its_classes_and_how_its_images_were_prepared(run, evaluate, caplog, capsys):
    folder, rows = run(DIGITS, '--crop-pct', '0.8', '--std', '0.3')
    content = torch.load(folder / 'last.pth.tar', weights_only=True)
    config = content['data_config']
    assert content['class_names'] == list('0123456789')
    assert (config['input_size'], config['crop_pct'], config['std']) == ([1, 16, 16], 0.8, [0.3])
    assert config['mean'] == [pytest.approx(0.5)] and content['args']['mean'] is None  # the model's, for one channel
    content['data_config'].update(mean=[0.2], crop_mode='squash', interpolation='box')  # as if it published others
    path = folder / 'other.pth.tar'
    torch.save(content, path)
    saved = open_saved(str(path))
    assert saved.class_names == content['class_names']
    expected = dict(input_size=(1, 16, 16), mean=(0.2,), std=(0.3,), crop_pct=0.8, crop_mode='squash')
    assert saved.data_config == {**expected, 'interpolation': 'box'}
    row = evaluate('--checkpoint', path)
    assert (row['interpolation'], row['top1'] != rows[-1]['eval_top1']) == ('box', True)
    assert evaluate('--checkpoint', path, '--mean', '0.5')['interpolation'] == 'box'
    assert evaluate('--checkpoint', path, '--interpolation', 'bicubic')['interpolation'] == 'bicubic'
    assert not [record for record in caplog.records if 'does not match' in record.message]
    assert 'does not match' not in capsys.readouterr().err


def test_a_deprecated_model_name_stands_for_the_current_one(tmp_path, run, evaluate, capsys):
    old = 'vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2'
    root = make_images(tmp_path / 'images', count=2)
    folder, rows = run(f'{BASE} --model {old} --img-size 32 --batch-size 4', str(root))
    output = capsys.readouterr()
    assert 'vim_tiny_patch16_224: ' in output.out and 'is a deprecated' not in output.out + output.err
    saved = torch.load(folder / 'last.pth.tar', weights_only=True)
    assert saved['arch'] == saved['args']['model'] == 'vim_tiny_patch16_224'
    result = evaluate('--checkpoint', folder / 'last.pth.tar', '--model', old)
    assert result['model'] == 'vim_tiny_patch16_224'
    assert result['top1'] == pytest.approx(rows[-1]['eval_top1'], abs=0.01)


def test_evaluations_say_how_far_they_are(run, evaluate, capsys):
    folder, _ = run(DIGITS, '--log-interval', '3', '--validation-batch-size', '50')
    line = r'evaluation \[3/8\]  top-1 \d+\.\d\d %  \d+ img/s  ETA 0:00:\d\d\n'
    assert re.search(line, capsys.readouterr().out)
    evaluate('--checkpoint', folder / 'last.pth.tar', '--batch-size', '50', '--log-freq', '3')
    assert re.search(line, capsys.readouterr().out)


def test_validate_takes_the_average_when_asked(few, run, evaluate):
    folder, rows = run(DIGITS, *'--epochs 2 --model-ema --model-ema-decay 0.9'.split())
    assert evaluate('--checkpoint', folder / 'last.pth.tar')['top1'] == pytest.approx(rows[-1]['eval_top1'], abs=0.01)
    averaged = evaluate('--checkpoint', folder / 'last.pth.tar', '--use-ema')
    assert averaged['top1'] == pytest.approx(rows[-1]['ema_top1'], abs=0.01)


def test_files_of_a_run(run):
    folder, rows = run(
        DIGITS, *'--epochs 3 --checkpoint-hist 1 --checkpoint-every 2 --tensorboard --save-images'.split()
    )
    best = max(range(3), key=lambda i: (rows[i]['eval_top1'], -i))
    names = {name for name in os.listdir(folder) if not name.startswith('train-batch')}
    weights = {'last', 'model_best', f'checkpoint-{best}', 'milestone-2'}
    logs = {'summary.csv', 'summary.json', 'args.yaml', 'tensorboard', 'curves.png', 'curves.html'}
    assert names == {f'{name}.pth.tar' for name in weights} | logs
    assert torch.load(folder / 'model_best.pth.tar', weights_only=True)['epoch'] == best
    with open(folder / 'summary.csv') as file:
        table = list(csv.DictReader(file))
    assert [float(row['eval_top1']) for row in table] == [row['eval_top1'] for row in rows]


def test_settings_of_a_run_start_another(few, run, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    folder, rows = run(DIGITS.replace('--device cpu ', ''))
    assert settled(run(f'--config {folder / "args.yaml"}', name='b')[1]) == settled(rows)


def test_checkpoint_loads_in_timm(few, run):
    folder, _ = run(DIGITS)
    model = timm.create_model('test_vit', in_chans=1, img_size=16, num_classes=10)
    timm.models.load_checkpoint(model, str(folder / 'last.pth.tar'))


@pytest.mark.parametrize('model', ['test_vim', 'vim_nano_patch4_32'])
def test_vim_trains(model, few, run, evaluate):
    folder, rows = run(DIGITS, *f'--model {model} --img-size 16 --epochs 1 --batch-size 256 --drop-path 0.1'.split())
    assert np.isfinite(rows[0]['train_loss'])
    assert evaluate('--checkpoint', folder / 'last.pth.tar')['top1'] == pytest.approx(rows[0]['eval_top1'], abs=0.01)


@pytest.mark.parametrize(
    'flags',
    [
        '--amp',
        '--model-dtype bfloat16',
        '--layer-decay 0.8 --grad-checkpointing',
        '--torchcompile eager',
        '--aug-splits 2 --jsd-loss --aa rand-m9',
        '--aug-splits 3 --split-bn --model test_resnet --in-chans 3',
        '--bce-loss --bce-sum --bce-target-thresh 0.2 --bce-pos-weight 2',
        '--mixup 0.2 --cutmix 0.5 --mixup-mode pair --bce-loss',
        '--mixup 0.5 --cutmix-minmax 0.2 0.8 --mixup-mode elem',
        '--no-prefetcher --reprob 0.5 --recount 2 --remode rand',
        '--aug-repeats 3',
        '--epoch-repeats 1.5',
        '--sched-on-updates --lr-noise 0.1 0.9',
        '--sched wsd --decay-epochs 1 --epochs 2 --warmup-epochs 1',
        '--clip-grad 0.1 --clip-mode agc',
        '--opt lookahead_adam --opt-eps 1e-6 --opt-betas 0.9 0.99',
        '--model-ema --model-ema-force-cpu --model-ema-warmup',
        '--head-init-scale 0.001 --head-init-bias -4 --gp avg',
        '--model vim2_mnist --head-init-bias -4',
    ],
)
def test_flags_of_timm_train(flags, few, run):
    _, rows = run(DIGITS, *flags.split())
    assert np.isfinite(rows[-1]['train_loss'])


def test_loss_falls(run):
    _, rows = run(DIGITS, *'--epochs 3 --no-aug --smoothing 0 --warmup-epochs 0'.split())
    assert rows[2]['train_loss'] < 0.8 * rows[0]['train_loss']
    assert rows[2]['eval_top1'] > 50


@pytest.mark.parametrize(('batch', 'accumulated'), [('718', '2'), ('1436', '7')])  # an epoch has four steps
def test_accumulated_gradients_are_those_of_the_large_batch(batch, accumulated, run, capsys):
    flags = '--opt sgd --no-aug --smoothing 0 --warmup-epochs 0 --lr 0.01'
    large, _ = run(DIGITS, *flags.split(), '--batch-size', batch, name='large')
    small, _ = run(DIGITS, *flags.split(), '--batch-size', '359', '--grad-accum-steps', accumulated, name='small')
    assert capsys.readouterr().out.count(f'global batch {batch} = ') == 2
    one, other = (torch.load(folder / 'last.pth.tar', weights_only=True)['state_dict'] for folder in (large, small))
    assert max((one[name] - other[name]).abs().max() for name in one) < 1e-5


def test_the_log_has_the_learning_rate_of_the_flag_whatever_share_of_it_layers_have(few, run, capsys):
    _, rows = run(DIGITS, *'--layer-decay 0.5 --lr 2e-3 --warmup-epochs 0'.split())
    assert rows[0]['lr'] == pytest.approx(2e-3)
    assert 'lr 0.002 ' in capsys.readouterr().out


def test_the_log_has_the_learning_rate_of_the_last_update(few, run, capsys):
    _, rows = run(DIGITS, *'--sched-on-updates --lr 2e-3 --warmup-epochs 0 --epochs 2'.split())
    shown = re.findall(r'lr (\S+) ', capsys.readouterr().out)
    assert [f'{row["lr"]:.3g}' for row in rows] == shown and 0 < rows[1]['lr'] < rows[0]['lr'] < 2e-3


@pytest.mark.parametrize(
    ('flags', 'said'),
    [
        ('--model-ema-decay 0.9 --model-ema-warmup', '--model-ema-decay, --model-ema-warmup: nothing follows'),
        ('--model-ema --model-ema-decay 0.9', ''),
        ('--mixup-off-epoch 1', '--mixup-off-epoch: nothing follows from it without --mixup or --cutmix'),
        ('--cutmix 1 --mixup-off-epoch 1 --mixup-prob 1', ''),
        ('--kd-distill-type feature', 'without --kd-model-name'),
        ('--loss bce --bce-sum', ''),
    ],
)
def test_it_is_said_what_flags_do_nothing_without_another(flags, said, few, run, capsys):
    run(DIGITS, *flags.split())
    output = capsys.readouterr().out
    assert said in output and bool(said) == ('nothing follows' in output)


def test_mnist_of_28_by_28_pixels_and_one_channel(tmp_path, run, evaluate):
    raw = tmp_path / 'data' / 'MNIST' / 'raw'
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, count in (('train', 64), ('t10k', 32)):
        images, labels = rng.integers(0, 255, (count, 28, 28)), rng.integers(0, 10, count)
        for kind, header, values in (
            ('images-idx3', [2051, count, 28, 28], images),
            ('labels-idx1', [2049, count], labels),
        ):
            content = np.array(header, '>i4').tobytes() + values.astype(np.uint8).tobytes()
            (raw / f'{split}-{kind}-ubyte').write_bytes(content)
            (raw / f'{split}-{kind}-ubyte.gz').write_bytes(gzip.compress(content))
    data = ['--dataset', 'torch/mnist', '--data-dir', str(tmp_path / 'data')]
    folder, rows = run(BASE, *data, *'--model vim_nano_patch4_32 --img-size 28 --in-chans 1 --batch-size 32'.split())
    result = evaluate('--checkpoint', folder / 'last.pth.tar')
    assert result['count'] == 32 and result['img_size'] == 28
    assert result['top1'] == pytest.approx(rows[-1]['eval_top1'], abs=0.01)
    run(BASE, *data, *'--model test_vit --img-size 32 --batch-size 32'.split(), name='rgb')  # grey images, RGB model


@pytest.mark.filterwarnings('ignore:Exception ignored')  # timm leaves tar files open
def test_image_folder_and_tar(tmp_path, run, evaluate):
    root = make_images(tmp_path / 'images')
    flags = f'{BASE} --model test_vit --img-size 32 --batch-size 4'
    folder, rows = run(flags, str(root))
    assert torch.load(folder / 'last.pth.tar', weights_only=True)['state_dict']['head.weight'].shape[0] == 2
    assert evaluate('--checkpoint', folder / 'last.pth.tar')['count'] == 16
    archive = tmp_path / 'validation.tar'
    with tarfile.open(archive, 'w') as file:
        file.add(root / 'validation', '.')
    assert evaluate('--checkpoint', folder / 'last.pth.tar', '--data-dir', archive)['top1'] == pytest.approx(
        rows[-1]['eval_top1'], abs=0.01
    )


def test_valid_labels_and_metrics(tmp_path, few, run, evaluate):
    folder, _ = run(DIGITS)
    (tmp_path / 'labels.txt').write_text('\n'.join(map(str, range(10))))
    flags = [
        '--checkpoint',
        folder / 'last.pth.tar',
        '--valid-labels',
        tmp_path / 'labels.txt',
        '--metrics-avg',
        'macro',
    ]
    result = evaluate(*flags)
    assert 0 <= result['macro_f1_score'] <= 100
    assert evaluate(*flags, '--metrics-avg', 'micro')['micro_recall'] == pytest.approx(result['top1'], abs=0.01)


@pytest.mark.parametrize('labels', [[0, 10], [-1, 0], [7]])
def test_valid_labels_that_the_model_has_not_are_refused(labels, tmp_path, capsys):
    """Also where nobody knows the model's class names, and the data set has fewer classes than the labels say."""
    root = make_images(tmp_path / 'images', mode='RGB')
    model = timm.create_model('test_vit', num_classes=max(2, *labels) if len(labels) > 1 else 7)
    timm.models.save_for_hf(model, str(tmp_path / 'model'), safe_serialization=True)
    (tmp_path / 'labels.txt').write_text('\n'.join(map(str, labels)))
    flags = ['--model', f'local-dir:{tmp_path / "model"}', '--pretrained', '--workers', '0', '--device', 'cpu']
    assert validate.main([*flags, '--data-dir', str(root), '--valid-labels', str(tmp_path / 'labels.txt')]) == 2
    error = capsys.readouterr().err
    assert f'/labels.txt: the model has classes 0 to {model.num_classes - 1}\n' in error and error.count('\n') == 1


def test_folder_of_checkpoints(few, run, evaluate):
    folder, rows = run(DIGITS, '--epochs', '2')
    results = evaluate(
        '--checkpoint', folder, '--model', 'test_vit', '--dataset', 'digits', '--img-size', '16', '--in-chans', '1'
    )
    assert len(results) == 4 and results[0]['top1'] == pytest.approx(max(row['eval_top1'] for row in rows), abs=0.01)


def test_fine_tuning_from_a_checkpoint(tmp_path, few, run):
    folder, _ = run(DIGITS, '--epochs', '2')
    root = make_images(tmp_path / 'images', mode='L')
    for flag in ('--pretrained --pretrained-path',):
        run(f'{BASE} --model test_vit --img-size 16 --in-chans 1 --batch-size 4 --data-dir {root} {flag}',
            str(folder / 'last.pth.tar'), name='tuned')  # fmt: skip


def test_weights_of_otherwise_normalized_images_are_remarked_on(few, run, capsys):
    folder, _ = run(DIGITS, '--mean', '0.2', '--std', '0.9')
    remark = f'{folder}/last.pth.tar are of a run with --mean 0.2 --std 0.9, and this one has others'
    for flag in (['--pretrained', '--pretrained-path'], ['--initial-checkpoint']):
        for more in ([], ['--mean', '0.2', '--std', '0.9']):
            run(DIGITS, *flag, str(folder / 'last.pth.tar'), *more, name='tuned')
            assert (remark in capsys.readouterr().out) is (not more)


def test_weights_of_another_order_of_tokens_are_remarked_on(few, run, capsys):
    flags = f'{BASE} --dataset digits --model vim_nano_patch4_32 --img-size 16 --in-chans 1'
    small = ['--model-kwargs', 'depth=1', 'embed_dim=32']
    folder, _ = run(flags, *small, 'class_token=head', 'drop_path_rate=0.1')
    capsys.readouterr()
    for more, remarked in (([], True), (['class_token=head'], False)):
        run(flags, *small, *more, '--pretrained', '--pretrained-path', str(folder / 'last.pth.tar'), name='tuned')
        said = 'are of a run with --model-kwargs class_token=head, and this one has others' in capsys.readouterr().out
        assert said is remarked


def test_weights_of_a_run_that_read_other_pixels_are_remarked_on(few, run, capsys):
    flags = f'{BASE} --dataset digits --model vim_nano_patch4_32 --img-size 16 --model-kwargs depth=1 embed_dim=32'
    folder, _ = run(flags, '--input-img-mode', 'YCbCr')
    for more in ([], ['--input-img-mode', 'YCbCr']):
        run(flags, *more, '--pretrained', '--pretrained-path', str(folder / 'last.pth.tar'), name='tuned')
        said = 'are of a run with --input-img-mode YCbCr, and this one has others' in capsys.readouterr().out
        assert said is (not more)


def test_a_resumed_run_says_that_its_images_are_others(few, tmp_path, capsys):
    line = [*DIGITS.split(), '--output', str(tmp_path), '--experiment', 'a', '--resume', 'auto']
    for flags, changed in (('', ''), ('', ''), ('--mean 0.3 --val-split train', 'val_split, mean'), ('', '')):
        assert train.main([*line, *flags.split()]) == 0
        said = [text for text in capsys.readouterr().out.splitlines() if text.startswith('other images')]
        assert said == [f'other images than before ({changed}): epochs of the log do not compare'] * bool(changed)


def test_weights_of_a_run_whose_settings_are_none_of_ours_are_a_beginning(few, run, tmp_path):
    state = timm.create_model('test_vit', in_chans=1, img_size=16, num_classes=10).state_dict()
    torch.save({'state_dict': state, 'args': {'model': 'hf-hub:organisation/name'}}, tmp_path / 'w.pth')
    assert run(DIGITS, '--pretrained', '--pretrained-path', str(tmp_path / 'w.pth'))[1]


def test_early_stop(few, run):
    _, rows = run(
        DIGITS, *'--epochs 9 --lr 1e-9 --warmup-epochs 0 --early-stop-patience 2 --early-stop-min-delta 50'.split()
    )
    assert len(rows) == 3


def test_distillation_from_a_teacher(tmp_path, few, run):
    teacher = timm.create_model('test_vit', num_classes=10, img_size=16)
    timm.models.save_for_hf(teacher, tmp_path / 'teacher', safe_serialization=False)
    flags = ['--kd-model-name', f'local-dir:{tmp_path / "teacher"}', '--mean', '0.3', '--std', '0.4']
    for kind, channels in (('logit', '3'), ('feature', '3'), ('logit', '1'), ('feature', '1')):
        _, rows = run(DIGITS, *flags, '--kd-distill-type', kind, '--in-chans', channels)
        assert np.isfinite(rows[-1]['train_loss'])


@pytest.mark.parametrize(('kind', 'status'), [('logit', 2), ('feature', 0)])
def test_a_teacher_of_other_classes_teaches_features_alone(kind, status, tmp_path, few, capsys):
    """timm gives it a classifier of random weights for the student's."""
    teacher = timm.create_model('test_vit', num_classes=7, img_size=16)
    timm.models.save_for_hf(teacher, tmp_path / 'teacher', safe_serialization=False)
    flags = ['--kd-model-name', f'local-dir:{tmp_path / "teacher"}', '--kd-distill-type', kind, '--in-chans', '3']
    assert train.main([*DIGITS.split(), *flags, '--output', str(tmp_path)]) == status
    assert status == 0 or 'knows 7 classes, and the student learns 10' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('size', 'more', 'words'),
    [(224, '', '224'), (16, '--kd-distill-type feature --kd-teacher-feature-dim 7', 'not the 64')],
)
def test_a_teacher_that_cannot_teach_here_is_refused_before_a_run(size, more, words, tmp_path, few, capsys):
    teacher = timm.create_model('test_vit', num_classes=10, img_size=size, dynamic_img_size=False)
    timm.models.save_for_hf(teacher, tmp_path / 'teacher', model_args=dict(img_size=size, dynamic_img_size=False))
    flags = ['--kd-model-name', f'local-dir:{tmp_path / "teacher"}', *more.split(), '--in-chans', '3']
    assert train.main([*DIGITS.split(), *flags, '--output', str(tmp_path / 'runs')]) == 2
    error = capsys.readouterr().err
    assert 'error: knowledge distillation: ' in error and words in error and not (tmp_path / 'runs').exists()


def test_a_linear_probe_learns_from_features_of_a_teacher(tmp_path, few, run):
    teacher = timm.create_model('test_vit3', num_classes=10, img_size=16)
    timm.models.save_for_hf(teacher, tmp_path / 'teacher', model_args=dict(img_size=16))
    flags = ['--kd-model-name', f'local-dir:{tmp_path / "teacher"}', '--kd-distill-type', 'feature', '--linear-probe']
    _, rows = run(DIGITS, *flags, '--in-chans', '3')
    assert np.isfinite(rows[-1]['train_loss'])


@pytest.mark.parametrize('name', ['levit_128s', 'deit_tiny_distilled_patch16_224', 'repvit_m0_9', 'mambaout_femto'])
def test_classifiers_of_several_layers_and_those_that_timm_averages(name):
    """Logits are scaled, biased and probed, whatever layers make them."""

    def make(*flags):
        args = train.parse_args(['--data-dir', '.', '--model', name, '--num-classes', '3', *flags])
        torch.manual_seed(0)
        model = build.make_training_model(args, Process())
        return model, adopt(ClassificationTask(model, device=torch.device('cpu'), verbose=False))

    images, logits = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)), []
    for flags in (['0'], ['0', '--head-init-scale', '3'], ['5', '--head-init-scale', '0']):
        model, _ = make('--head-init-bias', *flags)
        logits.append(model.eval()(images))
    torch.testing.assert_close(logits[1], 3 * logits[0])
    torch.testing.assert_close(logits[2], torch.full_like(logits[0], 5))
    model, task = make('--linear-probe')
    task.linear_probe = True
    trained = {name.split('.')[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and trained <= {'head', 'head_dist'}
    task.train()
    training = {name.split('.')[0] for name, module in model.named_modules() if name and module.training}
    assert trained <= training <= {'head', 'head_dist'}


@pytest.mark.parametrize('channels', [1, 3])
def test_a_teacher_sees_images_normalized_as_it_wants_them(channels):
    size = (channels, 16, 16)
    args = train.parse_args(f'{DIGITS} --kd-model-name teacher'.split())
    models = [timm.create_model('test_vit', img_size=16, in_chans=channels) for _ in range(2)]
    args = args.replace(kd_model_name=models[1], num_classes=1000)
    config = dict(mean=(0.2,) * channels, std=(0.5,) * channels, input_size=size)
    task = make_task(args, Process(), models[0], config)
    images = torch.rand(2, *size)
    seen = task.teacher.normalize_input((images - 0.2) / 0.5, task.student_mean, task.student_std)
    mean, std = (
        torch.tensor(adapt_to_chs(models[1].pretrained_cfg[name], channels))[:, None, None] for name in ('mean', 'std')
    )
    torch.testing.assert_close(seen, (images - mean) / std, atol=1e-5, rtol=1e-5)


class Counted(torch.nn.Module):
    """Cross-entropy that is not a number for some calls."""

    def __init__(self, bad):
        super().__init__()
        self.calls, self.bad = 0, bad

    def forward(self, output, target):
        self.calls += 1
        loss = torch.nn.functional.cross_entropy(output, target)
        return loss * float('nan') if self.calls in self.bad else loss


def test_an_epoch_without_a_finite_loss_has_none_in_the_log(few, tmp_path):
    arguments = [*DIGITS.split(), '--output', str(tmp_path), '--experiment', 'a']
    trainer = train.train(train.parse_args(arguments), Hooks(loss=Counted(range(100))))
    assert trainer.rows[0]['skipped'] == trainer.batches and np.isnan(trainer.rows[0]['train_loss'])
    (row,) = json.loads((tmp_path / 'a' / 'summary.json').read_text(), parse_constant=pytest.fail)
    assert row['train_loss'] is None and row['eval_loss'] == trainer.rows[0]['eval_loss']


@pytest.mark.parametrize('precision', ['', '--amp --amp-dtype bfloat16', '--amp'])
def test_updates_with_a_loss_that_is_not_finite_are_skipped(precision, tmp_path):
    flags = [*DIGITS.split(), *precision.split(), '--output', str(tmp_path)]
    trainer = train.train(train.parse_args([*flags, '--experiment', 'a']), Hooks(loss=Counted({3, 4, 9})))
    assert trainer.rows[0]['skipped'] == 3 and np.isfinite(trainer.rows[0]['train_loss'])
    assert all(torch.isfinite(parameter).all() for parameter in trainer.task.parameters())
    with pytest.raises(TrainingStopped, match='2 updates in a row'):
        arguments = train.parse_args([*flags, '--experiment', 'b', '--max-nonfinite', '2'])
        train.train(arguments, Hooks(loss=Counted({3, 5, 6})))


def test_hooks(tmp_path):
    """Your own data set, loss, metric and callback."""

    class Squares(torch.utils.data.Dataset):
        classes = ['dark', 'bright']

        def __len__(self):
            return 64

        def __getitem__(self, index):
            return Image.new('RGB', (32, 32), (200 * (index % 2),) * 3), index % 2

    seen = []
    hooks = Hooks(
        dataset=lambda split, training, args: Squares(),
        loss=torch.nn.CrossEntropyLoss(),
        metrics={'errors': lambda logits, targets: (logits.argmax(1) != targets).sum()},
        callback=lambda trainer: seen.append(trainer.rows[-1]['eval_errors']),
    )
    flags = [*BASE.split(), '--model', 'test_vit', '--img-size', '32', '--epochs', '2', '--eval-metric', 'errors']
    trainer = train.train(train.parse_args([*flags, '--data-dir', 'mine', '--output', str(tmp_path)]), hooks)
    assert len(seen) == 2 and trainer.args.num_classes == 2


def test_ranking_prefers_the_earlier_epoch():
    rows = [dict(epoch=i, eval_top1=value) for i, value in enumerate([1, 3, 3, None, 2])]
    assert Saver('', 3, 0, 'eval_top1', decreasing=False).ranking(rows) == [1, 2, 4, 0]
    assert Saver('', 3, 0, 'eval_top1', decreasing=True).ranking(rows) == [0, 4, 1, 2]


def test_run_registers_models_for_a_script(tmp_path):
    script = tmp_path / 'script.py'
    script.write_text('import sys, timm\nprint(timm.is_model("vim_tiny_patch16_224"), sys.argv[1:], __name__)\n')
    command = [sys.executable, '-m', 'vim_timm.run', str(script), '--flag', '1']
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output.strip().endswith("True ['--flag', '1'] __main__")


@pytest.mark.parametrize('words', [[], ['--help'], ['missing.py']])
def test_run_without_a_script_says_how_it_is_called(words):
    command = [sys.executable, '-X', 'importtime', '-m', 'vim_timm.run', *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert '| torch\n' not in done.stderr  # which takes seconds
    assert done.returncode and done.stderr.endswith('usage: python -m vim_timm.run SCRIPT ARGS...\n')
    assert ('there is no script missing.py; ' in done.stderr) == (words == ['missing.py'])
    assert 'Traceback' not in done.stderr


def test_recipes_are_listed_and_taken(capsys):
    with pytest.raises(SystemExit):
        train.main(['--list-recipes'])
    assert 'digits' in capsys.readouterr().out
