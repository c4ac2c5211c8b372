"""A training step on a GPU: it waits for nothing, counts exactly, and its recording is the step (`-m gpu`)."""

import warnings

import pytest
import torch
from test_step import Bad, cut

from vim_timm import train
from vim_timm.data.device_augment import FACTORS
from vim_timm.engine import Hooks
from vim_timm.engine.loop import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='needs an NVIDIA GPU'),
]

DATA = '--dataset digits --data-in-memory --img-size 32 --epochs 2 --warmup-epochs 0 --device cuda --log-interval 1000'
ALL = '--model-ema --model-ema-decay 0.9 --clip-grad 1 --drop-path 0.1'


def words(tmp_path, *flags):
    return [*DATA.split(), '--output', str(tmp_path), *(word for line in flags for word in line.split())]


def settings(tmp_path, *flags):
    return train.parse_args(words(tmp_path, *flags))


def poison(monkeypatch, epoch, step):
    """The images of a step are not numbers, as their colour jitter makes them."""
    prepared = Trainer._prepared

    def poisoned(trainer, batch):
        batch = prepared(trainer, batch)
        bad = (trainer.epoch, trainer.step) == (epoch, step)
        draws = batch.draws.clone()
        draws[:, FACTORS] = float('nan') if bad else draws[:, FACTORS]
        return batch._replace(draws=draws)

    monkeypatch.setattr(Trainer, '_prepared', poisoned)


@pytest.mark.parametrize('opt', ['adamw --lr 1e-3', 'sgd --lr 0.05', 'nadamuon --lr 1e-3', 'lamb --lr 1e-3'])
def test_skipped_updates_are_counted_exactly(opt, tmp_path):
    flags = ('--model vim_nano_patch4_32 --batch-size 64 --epochs 1', ALL, f'--opt {opt}')
    trainer = train.train(settings(tmp_path, *flags), Hooks(loss=Bad({1, 7, 8, 22})))
    assert trainer.rows[0]['skipped'] == 4
    assert all(torch.isfinite(parameter).all() for parameter in trainer.task.parameters())


def test_a_step_waits_for_nothing(tmp_path, monkeypatch):
    """Between the fifth and the last step of an epoch the host asks the device for no number."""
    whole = Trainer._forward_backward

    def watched(trainer, *args):
        torch.cuda.set_sync_debug_mode('warn' if 5 <= trainer.step < 25 else 'default')
        return whole(trainer, *args)

    monkeypatch.setattr(Trainer, '_forward_backward', watched)
    flags = '--model vim_nano_patch4_32 --batch-size 256 --epoch-repeats 5 --epochs 1 --opt adamw --lr 1e-3 --mixup 0.2'
    more = '--reprob 0.25 --amp --amp-dtype bfloat16'
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            train.train(settings(tmp_path, flags, more, ALL))
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert not {f'{w.filename}:{w.lineno}' for w in caught if 'called a synchronizing' in str(w.message)}


@pytest.mark.parametrize(
    'model, opt',
    [
        ('vim_nano_patch4_32', 'adamw --lr 1e-3'),
        ('vim_nano_patch4_32', 'adamw --lr 1e-3 --mixup 0.8 --cutmix 1 --reprob 0.25'),
        ('vim_nano_patch4_32', 'adamw --lr 1e-3 --grad-accum-steps 3'),
        ('vim2_nano_patch4_32', 'nadamuon --lr 1e-3'),
        ('vit_tiny_patch16_224 --model-kwargs patch_size=4 depth=2', 'sgd --lr 0.05'),
    ],
)
def test_a_recorded_step_is_the_step_and_resumes_bit_for_bit(model, opt, tmp_path, monkeypatch):
    poison(monkeypatch, 0, 6)
    flags = (f'--model {model} --batch-size 64 --smoothing 0 --deterministic --opt {opt}', ALL)
    plain = train.train(settings(tmp_path, *flags, '--experiment plain'))
    recorded = train.train(settings(tmp_path, *flags, '--experiment recorded --cuda-graph'))
    for ours, wanted in zip(recorded.rows, plain.rows, strict=True):
        assert ours['train_loss'] == pytest.approx(wanted['train_loss'], rel=1e-3)
        assert ours['skipped'] == wanted['skipped']
    assert plain.rows[0]['skipped'] == 1

    more = '--cuda-graph --experiment cut --recovery-interval 15'
    cut(words(tmp_path, *flags, more), tmp_path / 'recovery', monkeypatch)
    resumed = train.train(
        settings(tmp_path, *flags, '--cuda-graph --experiment again', f'--resume {tmp_path}/recovery')
    )
    for name, tensor in recorded.task.state_dict().items():
        assert torch.equal(tensor, resumed.task.state_dict()[name]), name
