"""Every flag of timm's train.py has its default and meaning here, or is refused by name; none is ignored."""

import inspect

import pytest
from timm.optim import optimizer_kwargs
from timm.scheduler import scheduler_kwargs

from vim_timm import data, tasks, train
from vim_timm.engine import build, folder, log, loop, process
from vim_timm.errors import UserError
from vim_timm.settings import flags, masked, parse
from vim_timm.step import update

# Every flag of timm's train.py (as of 1.0.29, then those that came later) and its default.
TIMM = {
    '--data-dir': None, '--dataset': '', '--train-split': 'train', '--val-split': 'validation',
    '--train-num-samples': None, '--val-num-samples': None, '--dataset-download': False, '--class-map': '',
    '--input-img-mode': None, '--input-key': None, '--target-key': None, '--dataset-trust-remote-code': False,
    '--model': 'resnet50', '--pretrained': False, '--pretrained-path': None, '--initial-checkpoint': '', '--resume': '',
    '--no-resume-opt': False, '--num-classes': None, '--gp': None, '--img-size': None, '--in-chans': None,
    '--input-size': None, '--crop-pct': None, '--mean': None, '--std': None, '--interpolation': '',
    '--batch-size': 128, '--validation-batch-size': None, '--channels-last': False, '--fuser': '',
    '--grad-accum-steps': 1, '--grad-checkpointing': False, '--fast-norm': False, '--model-kwargs': {},
    '--head-init-scale': None, '--head-init-bias': None, '--torchcompile-mode': None, '--torchscript': False,
    '--torchcompile': None, '--device': 'cuda', '--amp': False, '--amp-dtype': 'float16', '--model-dtype': None,
    '--no-ddp-bb': False, '--synchronize-step': False, '--local_rank': 0, '--device-modules': None,
    '--opt': 'sgd', '--opt-eps': None, '--opt-betas': None, '--momentum': 0.9, '--weight-decay': 2e-5,
    '--clip-grad': None, '--clip-mode': 'norm', '--layer-decay': None, '--layer-decay-min-scale': 0,
    '--layer-decay-no-opt-scale': None, '--opt-kwargs': {}, '--sched': 'cosine', '--sched-on-updates': False,
    '--lr': None, '--lr-base': 0.1, '--lr-base-size': 256, '--lr-base-scale': '', '--lr-noise': None,
    '--lr-noise-pct': 0.67, '--lr-noise-std': 1.0, '--lr-cycle-mul': 1.0, '--lr-cycle-decay': 0.5,
    '--lr-cycle-limit': 1, '--lr-k-decay': 1.0, '--warmup-lr': 1e-5, '--min-lr': 0, '--epochs': 300,
    '--epoch-repeats': 0.0, '--start-epoch': None, '--decay-milestones': [90, 180, 270], '--decay-epochs': None,
    '--warmup-epochs': 5, '--warmup-prefix': False, '--cooldown-epochs': 0, '--patience-epochs': 10,
    '--decay-rate': 0.1, '--no-aug': False, '--train-crop-mode': None, '--scale': [0.08, 1.0],
    '--ratio': [0.75, 4 / 3], '--hflip': 0.5, '--vflip': 0.0, '--color-jitter': 0.4, '--color-jitter-prob': None,
    '--grayscale-prob': None, '--gaussian-blur-prob': None, '--aa': None, '--aug-repeats': 0, '--aug-splits': 0,
    '--jsd-loss': False, '--bce-loss': False, '--bce-sum': False, '--bce-target-thresh': None,
    '--bce-pos-weight': None, '--reprob': 0.0, '--remode': 'pixel', '--recount': 1, '--resplit': False,
    '--mixup': 0.0, '--cutmix': 0.0, '--cutmix-minmax': None, '--mixup-prob': 1.0, '--mixup-switch-prob': 0.5,
    '--mixup-mode': 'batch', '--mixup-off-epoch': 0, '--smoothing': 0.1, '--train-interpolation': 'random',
    '--drop': 0.0, '--drop-connect': None, '--drop-path': None, '--drop-block': None, '--bn-momentum': None,
    '--bn-eps': None, '--sync-bn': False, '--dist-bn': 'reduce', '--split-bn': False, '--model-ema': False,
    '--model-ema-force-cpu': False, '--model-ema-decay': 0.9998, '--model-ema-warmup': False, '--seed': 42,
    '--worker-seeding': 'all', '--log-interval': 50, '--val-interval': 1, '--recovery-interval': 0,
    '--checkpoint-hist': 10, '--workers': 4, '--save-images': False, '--pin-mem': False, '--no-prefetcher': False,
    '--output': '', '--experiment': '', '--eval-metric': 'top1', '--tta': 0, '--use-multi-epochs-loader': False,
    '--log-wandb': False, '--wandb-project': None, '--wandb-tags': [], '--wandb-resume-id': '',
    '--naflex-loader': False, '--naflex-train-seq-lens': [128, 256, 576, 784, 1024], '--naflex-max-seq-len': 576,
    '--naflex-patch-sizes': None, '--naflex-patch-size-probs': None, '--naflex-loss-scale': 'linear',
    '--kd-model-name': None, '--kd-distill-type': 'logit', '--kd-loss-type': 'kl', '--distill-loss-weight': None,
    '--task-loss-weight': None, '--kd-temperature': 4.0, '--kd-student-feature-dim': None,
    '--kd-teacher-feature-dim': None, '--kd-token-distill-type': 'soft',
    '--task': 'classification', '--target-format': None, '--pretrained-cfg-overlay': {}, '--loss': None,
    '--asl-gamma-pos': 1.0, '--asl-gamma-neg': 4.0, '--asl-clip': 0.05, '--asl-reduction': 'batchmean',
    '--poly-epsilon': 2.0, '--poly-gamma': 0.0, '--poly-alpha': None, '--twoway-tp': 4.0, '--twoway-tn': 1.0,
    '--db-neg-scale': 2.0, '--db-init-bias': 0.05, '--db-focal-gamma': 2.0, '--class-stats': None,
    '--loss-pos-weight': None, '--loss-class-weight': None, '--loss-weight-power': 1.0, '--loss-weight-beta': 0.999,
    '--loss-weight-max': None, '--multilabel-threshold': 0.5, '--persistent-workers': True,
    '--no-persistent-workers': True, '--train-img-sizes': None, '--train-batch-sizes': None,
    '--train-size-probs': None, '--train-size-schedule': 'constant', '--train-size-schedule-spread': 0.65,
    '--train-size-random-mix': 0.1, '--train-batches-per-epoch': None, '--variable-batch-loss-scale': 'none',
    '--naflex-patchify-channels-first': False,
}  # fmt: skip
SHORT = {'-b': '--batch-size', '-vb': '--validation-batch-size', '-j': '--workers', '--dr': '--decay-rate'}

ROWS = {row[0].split()[0]: row for rows in flags.TRAIN.values() for row in rows}
REFUSED = sorted(name for name, row in ROWS.items() if row[1] is flags.refused)


def name_of(flag: str) -> str:
    return flag.lstrip('-').replace('-', '_')


@pytest.fixture(scope='module')
def defaults():
    return vars(parse.parse('train.py', flags.TRAIN, ['--dataset', 'digits']))


@pytest.mark.parametrize('flag', TIMM)
def test_default_is_timms(flag, defaults):
    default = ROWS[flag][2] if flag in REFUSED else defaults[name_of(flag)]
    assert flag == '--dataset' or default == TIMM[flag] or default == pytest.approx(TIMM[flag])


@pytest.mark.parametrize('short', SHORT)
def test_short_names_are_timms(short):
    args = parse.parse('train.py', flags.TRAIN, ['--dataset', 'digits', short, '1'])
    assert getattr(args, name_of(SHORT[short])) == 1


@pytest.mark.parametrize('flag', REFUSED)
def test_refused_flag_is_named(flag, capsys):
    assert train.main([flag, '1']) != 0
    message = capsys.readouterr().err
    assert flag in message and len(message.strip().splitlines()) == 1


def test_unknown_flag_is_named(capsys):
    assert train.main(['--amp-impl', 'apex']) == 2
    assert '--amp-impl' in capsys.readouterr().err


@pytest.mark.parametrize('flag', sorted(ROWS.keys() - set(REFUSED) - {'--worker-seeding'}))
def test_no_flag_is_ignored(flag):
    """The code that runs a training, or timm's helper that it hands the settings to, reads the flag."""
    sources = [data.datasets, data.loading, loop, build, process, tasks.classification, tasks.masked, tasks, train, log]
    sources += [folder, masked, update, optimizer_kwargs, scheduler_kwargs]
    code = ' '.join(inspect.getsource(source) for source in sources)
    name = name_of(flag)
    by_timm = {'input_size', 'img_size', 'in_chans', 'crop_pct', 'mean', 'std', 'interpolation'}
    assert (
        f'args.{name}' in code
        or f'settings.{name}' in code
        or f"'{name}'" in code
        or f'cfg.{name}' in code
        or name in by_timm
    )


def test_yaml_config_is_checked_like_the_command_line(tmp_path):
    config = tmp_path / 'config.yaml'
    config.write_text('batch-size: 7\nlr: 1e-3\nscale: [0.5, 1]\n')
    args = parse.parse('train.py', flags.TRAIN, ['-c', str(config), '--lr', '0.5'])
    assert (args.batch_size, args.lr, args.scale) == (7, 0.5, [0.5, 1.0])
    assert {'batch_size', 'lr', 'scale'} <= args.chosen
    for text, word in (
        ('batchsize: 7', 'batchsize'),
        ('tta: 2', '--tta'),
        ('epochs: many', '--epochs'),
        ('- 1', 'YAML'),
    ):
        config.write_text(text)
        with pytest.raises(UserError, match=word if word != 'YAML' else 'one setting'):
            parse.parse('train.py', flags.TRAIN, ['-c', str(config)])


def test_yaml_lr_in_exponent_notation_is_a_number(tmp_path):
    config = tmp_path / 'config.yaml'
    config.write_text('lr: 1e-3\n')  # a string to YAML 1.1
    assert parse.parse('train.py', flags.TRAIN, ['-c', str(config)]).lr == 1e-3


def test_bare_command_line_is_the_digits_recipe():
    args = train.parse_args([])
    assert (args.model, args.dataset, args.recipe) == ('vim_nano_patch4_32', 'digits', 'digits')
    assert parse.parse('train.py', flags.TRAIN, ['--data-dir', 'x']).model == 'resnet50'


def test_flags_override_a_recipe():
    assert train.parse_args(['--recipe', 'digits', '--epochs', '3']).epochs == 3
