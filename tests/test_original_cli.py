"""The original's command lines mean here what they meant there: with its defaults, or refused by name."""

import argparse
import shlex

import pytest
import torch

from vim_timm import original
from vim_timm.settings.flags import TRAIN, VALIDATE
from vim_timm.settings.parse import parse

MIDCLS = 'bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2'
TINY = f'vim_tiny_patch16_224_{MIDCLS}'
IMAGENET = '/root/autodl-tmp/Vim/imagenet_data'

# what main.py does when it is told nothing but the model, in train.py's words
TRAINING = dict(
    dataset='torch/image_folder', train_split='train', val_split='val', num_classes=1000, img_size=224, batch_size=64,
    epochs=300,
    opt='adamw', opt_eps=1e-8, opt_betas=None, weight_decay=0.05, clip_grad=None, momentum=0.9,
    lr=None, lr_base=5e-4, lr_base_size=512, lr_base_scale='linear', sched='cosine', warmup_lr=1e-6, min_lr=1e-5,
    warmup_epochs=5, cooldown_epochs=0, decay_rate=0.1, lr_noise=None,
    aa='rand-m9-mstd0.5-inc1', color_jitter=0.3, train_interpolation='bicubic', interpolation='bicubic',
    crop_pct=0.875, scale=[0.08, 1.0], hflip=0.5, reprob=0.25, remode='pixel', recount=1, aug_repeats=0,
    mixup=0.8, cutmix=1.0, cutmix_minmax=None, mixup_prob=1.0, mixup_switch_prob=0.5, mixup_mode='batch',
    smoothing=0.1, bce_loss=False, drop=0.0, drop_path=0.1,
    model_ema=True, model_ema_decay=0.99996, model_ema_force_cpu=False, model_ema_warmup=False,
    amp=False, max_nonfinite=1, seed=0, workers=10, pin_mem=True, output='', experiment='', resume='', pretrained=False,
    grad_checkpointing=False, model_kwargs={'decay_state': True},
)  # fmt: skip
EVALUATION = dict(
    split='val', num_classes=1000, img_size=224, batch_size=64, crop_pct=0.875, interpolation='bicubic',
    workers=10, pin_mem=True, amp=False, use_ema=False, model_kwargs={},
)  # fmt: skip

# every command of the guides to the original and to its CIFAR fork: line, processes, what differs from the above
GUIDES = {
    'basic training': (
        f'--model {TINY} --batch-size 128 --epochs 300 --lr 5e-4 --data-path /path/to/imagenet_data '
        '--output_dir ./output/vim_tiny --num_workers 8 --no_amp',
        1,
        dict(model='vim_tiny_patch16_224', batch_size=128, data_dir='/path/to/imagenet_data', output='./output',
             experiment='vim_tiny', workers=8),
    ),
    'one small GPU': (
        f'--model {TINY} --batch-size 64 --epochs 100 --lr 1e-4 --weight-decay 0.05 --warmup-epochs 5 '
        f'--data-path {IMAGENET} --output_dir ./output/vim_tiny_optimized --num_workers 4 --no_amp --drop-path 0.1',
        1,
        dict(model='vim_tiny_patch16_224', epochs=100, lr_base=1e-4, data_dir=IMAGENET, output='./output',
             experiment='vim_tiny_optimized', workers=4),
    ),
    'eight GPUs': (
        f'--model {TINY} --batch-size 128 --epochs 300 --lr 5e-4 --data-path {IMAGENET} '
        '--output_dir ./output/vim_tiny_distributed --no_amp',
        8,
        dict(model='vim_tiny_patch16_224', batch_size=128, data_dir=IMAGENET, output='./output',
             experiment='vim_tiny_distributed', aug_repeats=3),
    ),
    'evaluation': (
        f'--eval --model {TINY} --resume /path/to/checkpoint.pth --data-path {IMAGENET} --batch-size 256',
        1,
        dict(model='vim_tiny_patch16_224', checkpoint='/path/to/checkpoint.pth', data_dir=IMAGENET, batch_size=256),
    ),
    'evaluation at 384': (
        f'--eval --model vim_tiny_patch16_384_{MIDCLS} --input-size 384 --resume /path/to/checkpoint.pth '
        f'--data-path {IMAGENET}',
        1,
        dict(model='vim_tiny_patch16_384', checkpoint='/path/to/checkpoint.pth', data_dir=IMAGENET,
             img_size=384),
    ),
    'memory': (
        '--batch-size 64 --num_workers 4 --no_amp --pin-mem',
        1,
        dict(model='deit_base_patch16_224', data_dir='/datasets01/imagenet_full_size/061417/', workers=4,
             model_kwargs={}),
    ),
    'memory, more': (
        f'--model {TINY} --batch-size 32 --use-checkpoint --no_amp',
        1,
        dict(model='vim_tiny_patch16_224', batch_size=32, grad_checkpointing=True),
    ),
    'accuracy': (
        f'--model {TINY} --model-ema --smoothing 0.1 --mixup 0.8 --cutmix 1.0',
        1,
        dict(model='vim_tiny_patch16_224'),
    ),
    'stability': (
        f'--model {TINY} --lr 1e-4 --warmup-epochs 10 --weight-decay 0.01',
        1,
        dict(model='vim_tiny_patch16_224', lr_base=1e-4, warmup_epochs=10, weight_decay=0.01),
    ),
    'debug': (
        f'--model {TINY} --batch-size 4 --epochs 1 --lr 1e-4 --data-path {IMAGENET} --output_dir ./output/debug '
        '--num_workers 1 --no_amp --warmup-epochs 0',
        1,
        dict(model='vim_tiny_patch16_224', batch_size=4, epochs=1, lr_base=1e-4, data_dir=IMAGENET, output='./output',
             experiment='debug', workers=1, warmup_epochs=0),
    ),
    'CIFAR fork': (
        '--data-set CIFAR --model vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_rope_also_residual '
        '--data-path ./data --epochs 200 --lr 5e-4 --batch-size 640 --gpu 6',
        1,
        dict(model='vim_tiny_patch16_rope_ape_gap_224',
             dataset='torch/cifar100', val_split='validation', num_classes=100, data_dir='./data', epochs=200,
             batch_size=640),
    ),
}  # fmt: skip


def settings(line: str, world_size: int = 1) -> dict:
    """What train or validate understands when it is given the translation of a line."""
    args = original.build_parser().parse_args(shlex.split(line))
    translation = original.translate(args, set(), world_size)
    table = {'train': TRAIN, 'validate': VALIDATE}[translation.script]
    return vars(parse(translation.script, table, translation.arguments))


def run(line: str, capsys) -> tuple[int, str, str]:
    status = original.main(shlex.split(line))
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize('name', GUIDES)
def test_commands_of_the_guides_resolve_to_the_originals_settings(name):
    line, world_size, differences = GUIDES[name]
    resolved = settings(line, world_size)
    expected = {**(EVALUATION if '--eval' in line else TRAINING), **differences}
    assert {key: resolved[key] for key in expected} == expected


def test_learning_rate_scales_with_the_global_batch_unless_told_otherwise():
    scaled = settings('--model vim_tiny --lr 1e-3')
    assert (scaled['lr'], scaled['lr_base'], scaled['lr_base_size']) == (None, 1e-3, 512)
    assert settings('--model vim_tiny --lr 1e-3 --unscale-lr')['lr'] == 1e-3


@pytest.mark.parametrize('line, expected', [
    ('--no-model-ema', dict(model_ema=False)),
    ('--if_amp', dict(amp=True, amp_dtype='float16')),
    ('--no-pin-mem', dict(pin_mem=False)),
    ('--if_continue_inf', dict(max_nonfinite=1000000000)),
    ('--if_amp', dict(max_nonfinite=20)),
    ('--no-repeated-aug', dict(aug_repeats=0)),
    ('--bce-loss', dict(bce_loss=True, bce_target_thresh=0.0)),
    ('--ThreeAugment', dict(aa='3a', reprob=0.0, color_jitter=0.3)),
    ('--finetune start.pth', dict(pretrained=True, pretrained_path='start.pth')),
    ('--cooldown-epochs 30', dict(cooldown_epochs=0)),
    ('--drop 0.2', dict(drop=0.0, model_kwargs={'decay_state': True, 'pos_drop_rate': 0.2})),
    ('--if_random_token_rank', dict(model_kwargs={'decay_state': True, 'random_token_order': True})),
    ('--if_random_cls_token_position', dict(model_kwargs={'decay_state': True})),
    ('--if_random_cls_token_position --model vim_tiny_patch16_rope_ape_224',
     dict(model_kwargs={'decay_state': True, 'random_class_position': True})),
    ('--opt-betas 0.9 0.95 --clip-grad 1.0', dict(opt_betas=[0.9, 0.95], clip_grad=1.0)),
    ('--cutmix-minmax 0.2 0.8', dict(cutmix_minmax=[0.2, 0.8])),
    ('--start_epoch 3 --seed 7 --device cpu', dict(start_epoch=3, seed=7, device='cpu')),
    ('--output_dir out/', dict(output='.', experiment='out')),
    ('--input-size 32', dict(img_size=32, crop_pct=1.0, ratio=[1.0, 1.0])),
])  # fmt: skip
def test_flags_are_translated(line, expected):
    resolved = settings(f'--model vim_tiny_patch16_224 {line}', world_size=8)
    assert {key: resolved[key] for key in expected} == expected


@pytest.mark.parametrize('line', [
    '--cosub', '--attn-only', '--no-train-mode', '--if_nan2num', '--distillation-type hard',
    '--dist_url tcp://a:1', '--data-set INAT', '--data-set INAT19', '--ThreeAugment --src',
    '--finetune https://a.org/b.pth', '--resume https://a.org/b.pth', '--eval',
])  # fmt: skip
def test_flags_that_cannot_be_honoured_are_refused_by_name(line, capsys):
    status, out, err = run(f'--dry-run --model vim_tiny {line}', capsys)
    flag = shlex.split(line)[-1] if '--src' in line else shlex.split(line)[0]
    assert status != 0
    assert flag in err and len(err.strip().splitlines()) == 1
    assert out == ''


def test_unknown_flags_are_refused(capsys):
    status, out, err = run('--dry-run --no-such-flag', capsys)
    assert status == 2 and not out
    assert '--no-such-flag' in err and err.count('\n') == 1


def test_flags_that_change_nothing_are_said(capsys):
    _, out, _ = run('--dry-run --model vim_tiny --gpu 6 --resplit --world_size 4', capsys)
    for flag in ('--gpu', '--resplit', '--world_size'):
        assert f'note: {flag} changes nothing' in out


def test_cifar_is_said_to_be_cifar_100(capsys):
    _, out, _ = run('--dry-run --data-set CIFAR --model vim_tiny', capsys)
    assert 'CIFAR-100' in out and '--dataset torch/cifar10 ' in out


def test_printed_line_is_a_command(capsys):
    _, out, _ = run('--dry-run --model vim_tiny --data-path "my data"', capsys)
    words = shlex.split(out.splitlines()[-1])
    assert words[:3] == ['python', '-m', 'vim_timm.train']
    assert parse('train', TRAIN, words[3:]).data_dir == 'my data'


def test_image_folders_of_other_than_1000_classes_get_a_head_of_their_size(tmp_path, capsys):
    for name in ('a', 'b', 'c'):
        (tmp_path / 'train' / name).mkdir(parents=True)
    _, out, _ = run(f'--dry-run --model vim_tiny --data-path {tmp_path}', capsys)
    assert 'has 3 classes' in out and '--num-classes 3 ' in out


def test_distributed_lines_are_for_torchrun(capsys, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '8')
    _, out, _ = run('--dry-run --model vim_tiny', capsys)
    assert out.splitlines()[-1].startswith('torchrun --nproc_per_node=8 -m vim_timm.train ')
    monkeypatch.setenv('RANK', '1')
    assert run('--dry-run --model vim_tiny', capsys)[1] == ''


def test_training_state_of_the_original_is_not_resumed(tmp_path, capsys):
    path = tmp_path / 'checkpoint.pth'
    args = argparse.Namespace(model=TINY)
    torch.save({'model': {}, 'optimizer': {}, 'lr_scheduler': {}, 'epoch': 3, 'args': args}, path)
    status, _, err = run(f'--dry-run --model vim_tiny --resume {path}', capsys)
    assert status != 0 and '--resume' in err and '--finetune' in err


def test_translation_runs(monkeypatch, capsys):
    from vim_timm import train, validate

    calls = []
    monkeypatch.setattr(train, 'main', lambda argv: calls.append(('train', argv)))
    monkeypatch.setattr(validate, 'main', lambda argv: calls.append(('validate', argv)) or 2)
    assert run('main.py --model vim_tiny', capsys)[0] == 0
    with pytest.raises(SystemExit, match='2'):
        original.main(['--eval', '--resume', 'a.pth', '--model', 'vim_tiny'])
    assert [script for script, _ in calls] == ['train', 'validate']
    assert '--model' in calls[0][1] and '--checkpoint' in calls[1][1]
