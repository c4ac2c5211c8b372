"""A task owns loss, evaluator and metric names: others than classification train without a line in `engine/`."""

import json

import numpy as np
import pytest
import timm.task
import torch
from logs import settled
from PIL import Image

from vim_timm import data, train
from vim_timm.data import Digits
from vim_timm.engine import Hooks
from vim_timm.errors import UserError
from vim_timm.settings import Process
from vim_timm.tasks import Task

BASE = '--dataset digits --model test_vit --img-size 16 --in-chans 1 --device cpu --workers 0 --batch-size 64'
FLAGS = f'{BASE} --opt adamw --lr 1e-3 --warmup-epochs 0 --epochs 3 --model-ema --model-ema-decay 0.9'.split()


class Relabelled(Digits):
    """The digits with another target."""

    def __init__(self, train, target):
        super().__init__(train)
        self.target, self.classes = target, None

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image, self.target(label)


def bits(label):
    """The digit's four bits: several labels an image."""
    return torch.tensor([float(label >> i & 1) for i in range(4)])


class ErrorEvaluator:
    """Mean squared error and mean absolute error of a number."""

    default_metric, metric_names = 'mse', ('mse', 'mae')

    def __init__(self, device):
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def update(self, output, target):
        error = (output[:, 0] - target).double()
        self.sums += torch.stack([(error**2).sum(), error.abs().sum(), torch.tensor(float(len(error)))])

    def summary(self):
        return dict(zip(self.metric_names, (self.sums[:2] / self.sums[2]).tolist()))

    def compute(self, distributed=False):
        return self.summary()


class Regression(Task):
    """How large the digit is; the task has a weight of its own, which its checkpoints keep beside the model."""

    lower_is_better = ('mse', 'mae')

    def __init__(self, model, settings):
        super().__init__(verbose=False)
        self.model = model
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.seed, self.seen, self.ended = settings.seed, [], []

    def get_eval_model(self, module=None, ema=False):
        return self.trainable_module_ema.module.model if ema else self.model

    def get_task_state(self, module=None, ema=False):
        return {'scale': (self.trainable_module_ema.module if ema else self).scale.detach()}

    def load_task_state(self, state, strict=True, module=None, ema=False):
        (self.trainable_module_ema.module if ema else self).scale.data.copy_(state['scale'])

    def training_loss(self, batch):
        self.seen += batch.keys.tolist()
        return ((self.scale * self.model(batch.images)[:, 0] - batch.targets) ** 2).mean()

    def predict(self, batch, ema=False):
        return (self.trainable_module_ema.module if ema else self).scale * super().predict(batch, ema)

    def create_evaluator(self, **kwargs):
        return ErrorEvaluator(self.device)

    def end_epoch(self, trainer):
        self.ended.append((trainer.epoch, trainer.folder))


def multi_label(model, settings):
    return timm.task.MultiLabelClassificationTask(model, verbose=False)


KINDS = {
    'multi-label': (bits, multi_label, ['--num-classes', '4', '--mixup', '0.2'], 'map', False),
    'regression': (lambda label: label / 9, Regression, ['--num-classes', '1'], 'mse', True),
}


@pytest.fixture(params=KINDS)
def kind(request, tmp_path):
    target, task, flags, metric, decreasing = KINDS[request.param]
    hooks = Hooks(dataset=lambda split, training, args: Relabelled(training, target), task=task)

    def start(name, *more):
        arguments = [*FLAGS, *flags, *more, '--output', str(tmp_path), '--experiment', name]
        return train.train(train.parse_args(arguments), hooks)

    return start, metric, decreasing


def load(trainer, name='last'):
    return torch.load(trainer.saver.path(name), weights_only=True)


def test_a_task_names_its_metrics_and_its_best_epoch(kind, capsys):
    start, metric, decreasing = kind
    trainer = start('a')
    train.farewell(trainer)
    rows = json.loads(open(f'{trainer.folder}/summary.json').read())
    names = trainer.task.create_evaluator().metric_names
    assert {f'{prefix}_{name}' for prefix in ('eval', 'ema') for name in names} <= rows[0].keys()
    assert 'eval_top1' not in rows[0]
    values = [row[f'ema_{metric}'] for row in rows]
    best = int(np.argmin(values) if decreasing else np.argmax(values))
    assert load(trainer, 'model_best')['epoch'] == best
    assert values[-1] < values[0] if decreasing else values[-1] > values[0]
    output = capsys.readouterr().out
    assert f'best {metric}: ' in output and f'epoch 2 ema: {metric} ' in output and 'top-1' not in output
    assert f'eval_metric: {metric}' in open(f'{trainer.folder}/args.yaml').read()


def test_a_task_resumes_bit_for_bit(kind):
    start, _, _ = kind
    whole = start('whole')
    cut = start('cut', '--resume', whole.saver.path('checkpoint-0'))
    first, second = load(whole), load(cut)
    assert settled(first['history']) == settled(second['history'])
    for key in ('state_dict', 'state_dict_ema', 'task_state', 'task_state_ema'):
        assert first.get(key, {}).keys() == second.get(key, {}).keys()
        assert all(torch.equal(value, second[key][name]) for name, value in first.get(key, {}).items())
    assert ('task_state' in first) == isinstance(whole.task, Regression)


def test_a_metric_of_another_task_is_refused(kind):
    start, metric, _ = kind
    with pytest.raises(UserError, match=f'--eval-metric must be one of .*{metric}.*, not .top1'):
        start('a', '--eval-metric', 'top1')


def test_a_task_knows_each_sample_and_each_epochs_end(tmp_path):
    hooks = Hooks(dataset=lambda split, training, args: Relabelled(training, float), task=Regression)
    arguments = [*FLAGS, '--num-classes', '1', '--epochs', '2', '--output', str(tmp_path), '--experiment', 'a']
    task = train.train(train.parse_args(arguments), hooks).task
    assert task.ended == [(1, str(tmp_path / 'a')), (2, str(tmp_path / 'a'))]
    keys = np.array(task.seen)
    for epoch in range(2):
        _, positions, places = keys[keys[:, 0] == epoch].T
        assert positions.tolist() == list(range(len(positions))) and len(set(places)) == len(places)


@pytest.mark.parametrize('memory', [[], ['--data-in-memory']])
@pytest.mark.parametrize('split', ['train', 'validation'])
def test_keys_name_the_samples(split, memory, tmp_path):
    """On every rank, and where some sample cannot be read."""
    for name in ('train', 'validation'):
        folder = tmp_path / name / 'a'
        folder.mkdir(parents=True)
        for i in range(8):
            Image.new('L', (16, 16), 10 * i).save(folder / f'{i}.png')
        (folder / '3.png').write_bytes(b'')
    training, config = split == 'train', dict(input_size=(1, 16, 16), mean=(0.0,), std=(1.0,))
    config.update(interpolation='bilinear', crop_pct=1.0)
    arguments = [*BASE.split(), '--dataset', '', '--data-dir', str(tmp_path), '--batch-size', '4', '--no-aug', *memory]
    args, seen = train.parse_args(arguments), []
    for rank in range(2):
        process = Process(rank=rank, world_size=2)
        dataset = data.make_dataset(args, split, training, 1)
        make = data.train_loader if training else data.eval_loader
        for batch in make(args, process, dataset, config).epoch(5):
            assert not batch.complete or (batch.places >= 0).all()
            seen += zip(batch.keys.tolist(), (batch.images[:, 0, 0, 0] * 25.5).round().tolist())
    assert sorted(position for (_, position, _), _ in seen) == list(range(8))
    assert {epoch for (epoch, _, _), _ in seen} == {5}
    assert all(place == level for (_, _, place), level in seen if place >= 0)
    assert (-1 in [place for (_, _, place), _ in seen]) != training
