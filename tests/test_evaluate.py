"""What an epoch and its evaluation count: steps that were made, and outputs that are numbers."""

import math

import pytest
import torch
from torch.utils.data import IterableDataset

from vim_timm import train
from vim_timm.data import Digits
from vim_timm.engine import Hooks
from vim_timm.tasks import Task

RUN = (
    '--dataset digits --model test_vit --img-size 16 --in-chans 1 --device cpu --batch-size 64 --workers 0 --no-aug '
    '--opt sgd --lr 0 --epochs 2 --warmup-epochs 0'
)


@pytest.mark.parametrize('broken', [math.nan, math.inf])
def test_an_evaluation_with_outputs_that_are_no_numbers_has_no_accuracy_and_is_not_the_best(
    broken, few, tmp_path, monkeypatch, capsys
):
    """Of equal outputs topk takes any, so that such a model would be as good as chance, or as the largest class."""
    predict, calls = Task.predict, []

    def second_is_broken(self, batch, ema=False):
        calls.append(len(batch.targets))
        output = predict(self, batch, ema)
        output = torch.nn.functional.one_hot(batch.targets, 10).float() if len(calls) > 2 else output
        if len(calls) == 4:
            output[:3, 4:7] = broken
        return output

    monkeypatch.setattr(Task, 'predict', second_is_broken)
    arguments = train.parse_args([*RUN.split(), '--output', str(tmp_path), '--experiment', 'a'])
    rows = train.train(arguments).rows
    count = sum(calls[:2])
    assert len(calls) == 4 and all(math.isnan(rows[1][f'eval_{name}']) for name in ('top1', 'top5', 'loss'))
    assert math.isfinite(rows[0]['eval_top1'])
    assert torch.load(tmp_path / 'a' / 'model_best.pth.tar', weights_only=True)['epoch'] == 0
    assert f'outputs are not finite for 3 of {count} images' in capsys.readouterr().out


def test_minus_infinity_hides_a_class(few, tmp_path, monkeypatch):
    def hidden(self, batch, ema=False):
        output = torch.full((len(batch.targets), 10), -math.inf)
        return output.scatter_(1, batch.targets[:, None], 1.0)

    monkeypatch.setattr(Task, 'predict', hidden)
    arguments = train.parse_args([*RUN.split(), '--output', str(tmp_path), '--experiment', 'a'])
    assert train.train(arguments).rows[0]['eval_top1'] == 100


class Stream(IterableDataset):
    """Digits without an index, of which there are fewer than it says."""

    def __init__(self, dataset):
        self.dataset, self.image_mode = dataset, dataset.image_mode

    def __len__(self):
        return 200

    def __iter__(self):
        items = map(self.dataset.__getitem__, range(150))
        return ((self.transform(image), target) for image, target in items)


def test_an_epoch_of_a_stream_that_ends_before_its_time_is_said(tmp_path, capsys):
    arguments = train.parse_args([*RUN.split(), '--output', str(tmp_path), '--num-classes', '10'])
    hooks = Hooks(dataset=lambda split, training, args: Stream(Digits(training, 'L')) if training else None)
    assert len(train.train(arguments, hooks).rows) == 2
    assert 'epoch 1 had 2 steps, not 3: the data has fewer samples than it says' in capsys.readouterr().out
