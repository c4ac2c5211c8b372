"""A run has a folder of its own, uses the settings that it announces, and prints commands that re-make its numbers."""

import errno
import functools
import json
import multiprocessing
import os
import re
import shlex
import signal

import pytest
import torch
import yaml

from vim_timm import train, validate
from vim_timm.engine import Hooks
from vim_timm.engine.checkpoint import Saver
from vim_timm.engine.lock import NAME, FolderLock
from vim_timm.settings import programs

BASE = '--dataset digits --model test_vit --img-size 16 --in-chans 1 --device cpu --workers 0 --batch-size 179'
FLAGS = f'{BASE} --opt adamw --lr 1e-3 --warmup-epochs 0'.split()

pytestmark = pytest.mark.usefixtures('few')


@pytest.fixture
def start(tmp_path):
    def run(name, *more, hooks=None):
        arguments = [*FLAGS, '--output', str(tmp_path), '--experiment', name, *map(str, more)]
        return train.train(train.parse_args(arguments), hooks)

    return run


def load(folder, name='last'):
    return torch.load(f'{folder}/{name}.pth.tar', weights_only=True)


def settings_of(folder):
    with open(f'{folder}/args.yaml') as file:
        return yaml.safe_load(file)


class TestFolders:
    def test_another_run_of_the_same_name_gets_a_folder_of_its_own(self, start, tmp_path, capsys):
        start('a', '--epochs', 2)
        before = {name: (tmp_path / 'a' / name).read_bytes() for name in os.listdir(tmp_path / 'a')}
        for number in (2, 3):
            trainer = start('a', '--epochs', 1)
            assert trainer.folder == str(tmp_path / f'a-{number}')
            assert f'{tmp_path / "a"} holds a run already' in capsys.readouterr().out
        assert {name: (tmp_path / 'a' / name).read_bytes() for name in os.listdir(tmp_path / 'a')} == before
        assert load(tmp_path / 'a-3')['epoch'] == 0

    def test_a_run_that_was_killed_early_is_not_overwritten_either(self, start, tmp_path):
        (tmp_path / 'a').mkdir()
        (tmp_path / 'a' / 'args.yaml').write_text('')
        assert start('a', '--epochs', 1).folder == str(tmp_path / 'a-2')

    def test_a_folder_without_a_run_is_taken(self, start, tmp_path):
        (tmp_path / 'a').mkdir()
        (tmp_path / 'a' / 'notes.txt').write_text('mine')
        assert start('a', '--epochs', 1, '--overwrite').folder == start('b', '--epochs', 1).folder[:-1] + 'a'
        assert (tmp_path / 'a' / 'notes.txt').read_text() == 'mine'

    def test_overwrite_leaves_nothing_of_the_run_before(self, start, tmp_path):
        start('a', '--epochs', 3, '--checkpoint-every', 1)
        trainer = start('a', '--epochs', 1, '--overwrite')
        assert trainer.folder == str(tmp_path / 'a')
        names = {f'{name}.pth.tar' for name in ('last', 'model_best', 'checkpoint-0')}
        assert set(os.listdir(tmp_path / 'a')) == names | {'args.yaml', 'summary.csv', 'summary.json'}
        assert 'overwrite' not in settings_of(trainer.folder)  # else another run from these settings would do it again

    def test_resume_goes_on_in_its_folder_and_from_elsewhere_in_another(self, start, tmp_path):
        whole = start('a', '--epochs', 2)
        assert start('a', '--epochs', 3, '--resume', whole.saver.path('last')).folder == whole.folder
        assert start('a', '--epochs', 4, '--resume', 'auto').folder == whole.folder
        start('b', '--epochs', 1)
        assert start('b', '--epochs', 5, '--resume', whole.saver.path('last')).folder == str(tmp_path / 'b-2')

    @pytest.mark.parametrize('flags', [['--lr', 0], ['--no-resume-opt', '--checkpoint-hist', 1]])
    def test_a_run_from_elsewhere_keeps_the_best_of_its_own(self, flags, start, capsys):
        first = start('a', '--epochs', 2)
        first.rows[0]['eval_top1'] = first.rows[1]['eval_top1'] = 100.0
        content = load(first.folder)
        torch.save({**content, 'history': first.rows}, path := first.saver.path('better'))
        trainer = start('b', '--epochs', 4, *flags, '--resume', path)
        best = max((2, 3), key=lambda epoch: (trainer.rows[epoch]['eval_top1'], -epoch))
        assert load(trainer.folder, 'model_best')['epoch'] == best
        assert load(trainer.folder, f'checkpoint-{best}')['epoch'] == best
        train.farewell(trainer)
        assert f'{trainer.rows[best]["eval_top1"]:.2f} % in epoch {best}' in capsys.readouterr().out

    def test_the_best_stays_where_its_checkpoint_was_deleted(self, tmp_path):
        saver, rows = Saver(str(tmp_path), 1, 0, 'eval_top1', decreasing=False), []
        for epoch, top1 in enumerate((50, 90, 60, 70, 95)):
            rows.append({'epoch': epoch, 'eval_top1': top1})
            saver.save_epoch({'history': rows, 'epoch': epoch})
            assert load(tmp_path, 'model_best')['epoch'] == (0, 1, 1, 1, 4)[epoch]
            if epoch == 1:
                os.remove(saver.path('checkpoint-1'))

    def test_names_with_brackets(self, start, tmp_path, capsys):
        name = 'lr[1e-3]* {a}'
        start(name, '--epochs', 1)
        assert start(name, '--epochs', 2, '--resume', 'auto').rows[-1]['epoch'] == 1
        flags = ['--checkpoint', str(tmp_path / name), *'--workers 0 --device cpu --batch-size 512'.split()]
        flags += ['--model', 'test_vit', '--dataset', 'digits', '--img-size', '16', '--in-chans', '1']
        assert validate.main(flags) == 0
        assert len(json.loads(capsys.readouterr().out.split('--result')[1])) == 4


CHANGES = {
    'weight_decay': ('adamw', ['--weight-decay', '0.3'], 'weight_decay', 0.3),
    'betas': ('adamw', ['--opt-betas', '0.5', '0.6'], 'betas', [0.5, 0.6]),
    'eps': ('adamw', ['--opt-eps', '1e-3'], 'eps', 1e-3),
    'lr': ('adamw', ['--lr', '0.01'], 'lr', 0.01),
    'momentum': ('sgd', ['--momentum', '0.1'], 'momentum', 0.1),
    'opt_kwargs': ('nadamuon', ['--opt-kwargs', 'ns_steps=2'], 'ns_steps', 2),
}


class TestResumedSettings:
    @pytest.mark.parametrize(('name', 'sched'), [*((name, 'none') for name in CHANGES), ('lr', 'plateau')])
    def test_what_was_changed_is_in_force(self, name, sched, start):
        opt, flags, key, value = CHANGES[name]
        first = start('a', '--opt', opt, '--sched', sched, '--epochs', 1)
        trainer = start(
            'b', '--opt', opt, '--sched', sched, '--epochs', 3, *flags, '--resume', first.saver.path('last')
        )
        found = [
            list(group[key]) if isinstance(value, list) else group[key] for group in trainer.optimizer.param_groups
        ]
        assert value in found and all(item in (value, 0.0) for item in found)
        assert settings_of(trainer.folder)[name if name in trainer.args else f'opt_{name}'] is not None
        states = [load(run.folder)['optimizer'] for run in (first, trainer)]
        assert [group[key] for group in states[0]['param_groups']] != [
            group[key] for group in states[1]['param_groups']
        ]
        assert trainer.rows[-1]['lr'] == trainer.args.lr

    def test_moments_are_those_of_the_run(self, start):
        """A rate of zero leaves the weights alone; moments go on."""
        first = start('a', '--sched', 'none', '--epochs', 2)
        trainer = start('b', '--sched', 'none', '--epochs', 3, '--lr', 0, '--resume', first.saver.path('last'))
        one, other = load(first.folder), load(trainer.folder)
        assert all(torch.equal(value, other['state_dict'][name]) for name, value in one['state_dict'].items())
        steps = [state['optimizer']['state'][0]['step'].item() for state in (one, other)]
        assert steps[1] == steps[0] / 2 * 3

    @pytest.mark.parametrize(
        ('flags', 'words'),
        [
            (['--opt', 'sgd'], '--opt adamw'),
            (
                ['--weight-decay', '0'],
                'other groups of parameters (--weight-decay was 2e-05 there and is 0.0 here): give the same',
            ),
            (
                ['--layer-decay', '0.5'],
                'other groups of parameters (--layer-decay was None there and is 0.5 here): give the same',
            ),
            (
                ['--linear-probe'],
                'other groups of parameters (--linear-probe was False there and is True here): give the same',
            ),
        ],
    )
    def test_what_cannot_be_in_force_is_refused(self, flags, words, start, tmp_path, capsys):
        first = start('a', '--epochs', 1)
        more = [
            *FLAGS,
            '--output',
            str(tmp_path),
            '--experiment',
            'b',
            '--epochs',
            '2',
            '--resume',
            first.saver.path('last'),
        ]
        assert train.main([*more, *flags]) == 2
        assert words in capsys.readouterr().err and not (tmp_path / 'b').exists()
        assert train.main([*more, *flags, '--no-resume-opt']) == 0

    def test_the_middle_of_an_epoch_needs_the_same_steps(self, start, tmp_path, capsys):
        class Stop(Exception):
            pass

        def loss(output, target):
            if len(list(tmp_path.glob('a/recovery-*'))):
                raise Stop
            return torch.nn.functional.cross_entropy(output, target)

        module = torch.nn.Module()
        module.forward = loss
        flags = ['--batch-size', 89, '--recovery-interval', 2, '--grad-accum-steps', 2, '--epochs', 1]
        with pytest.raises(Stop):
            start('a', *flags, hooks=Hooks(loss=module))
        (path,) = tmp_path.glob('a/recovery-*')
        arguments = [*FLAGS, *map(str, flags), '--output', str(tmp_path), '--experiment', 'b', '--resume', str(path)]
        for name, value, said in (('--grad-accum-steps', 1, '4 batches an epoch'), ('--epoch-repeats', 2, '')):
            assert train.main([*arguments, name, str(value)]) == 2
            assert (said or f'resume it with {name} 0') in capsys.readouterr().err
        assert train.main(arguments) == 0

    def test_the_best_epoch_is_the_best_by_the_metric_of_now(self, start):
        first = start('a', '--epochs', 3, '--eval-metric', 'top1', '--lr', '1e-2')
        trainer = start('a', '--epochs', 4, '--eval-metric', 'loss', '--lr', 0, '--resume', first.saver.path('last'))
        best = min(trainer.rows, key=lambda row: row['eval_loss'])['epoch']
        assert load(trainer.folder, 'model_best')['epoch'] == best


@pytest.mark.parametrize('sched', ['cosine', 'none', 'step'])
def test_a_learning_rate_of_zero_is_zero(sched, start):
    trainer = start('a', '--lr', 0, '--epochs', 2, '--warmup-epochs', 1, '--sched', sched, '--opt', 'sgd')
    assert [row['lr'] for row in trainer.rows] == [0, 0]
    first, last = load(trainer.folder, 'checkpoint-0'), load(trainer.folder)
    assert all(torch.equal(value, last['state_dict'][name]) for name, value in first['state_dict'].items())


@pytest.mark.parametrize(
    ('metric', 'more'),
    [
        ('top1', []),
        ('loss', ['--model-ema', '--model-ema-decay', '0.8']),
        ('loss', ['--amp', '--amp-dtype', 'bfloat16', '--val-split', 'train']),
    ],
)
def test_the_printed_command_remakes_the_printed_number(metric, more, start, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    train.farewell(start("it's [a] run", '--epochs', 2, '--eval-metric', metric, *more))
    output = capsys.readouterr().out
    best = float(re.search(rf'best {metric}: ([\d.]+)', output).group(1))
    words = shlex.split(re.search(r'evaluate it: (.*)', output).group(1))
    first = programs.start('validate.py')
    assert words[: len(first)] == first and '--dataset' in words
    words = words[len(first) : words.index('--report')]
    assert validate.main([*words, '--workers', '0', '--device', 'cpu']) == 0
    found = json.loads(capsys.readouterr().out.split('--result')[1])[metric]
    assert found == pytest.approx(best, abs=0.006)


def hold(folder, pipe, then):
    lock = FolderLock(folder)
    pipe.send(lock.path)
    then()


def holding(folder, then):
    """Another process that holds the folder, then calls `then`."""
    context = multiprocessing.get_context('fork')
    ours, theirs = context.Pipe()
    process = context.Process(target=hold, args=(str(folder), theirs, then), daemon=True)
    process.start()
    assert ours.poll(60) and ours.recv()
    return process


@pytest.fixture
def other_run(tmp_path):
    """A folder that another process holds, and that process."""
    folder = tmp_path / 'held'
    folder.mkdir()
    process = holding(folder, signal.pause)
    yield folder, process
    process.kill()
    process.join()


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork')
@pytest.mark.filterwarnings('ignore:.*fork:DeprecationWarning')
class TestTwoRunsAtOnce:
    def test_a_folder_in_use_is_refused(self, other_run, capsys):
        folder, process = other_run
        before = set(os.listdir(folder))
        arguments = [*FLAGS, '--output', str(folder.parent), '--experiment', folder.name, '--epochs', '1']
        for more in ([], ['--resume', 'auto'], ['--overwrite']):
            assert train.main([*arguments, *more]) == 2
            assert f'another run (process {process.pid} on ' in capsys.readouterr().err
            assert set(os.listdir(folder)) == before

    def test_a_run_without_a_name_takes_the_next(self, other_run, monkeypatch):
        folder, _ = other_run
        monkeypatch.setattr('vim_timm.engine.folder.planned_folder', lambda *_: str(folder))
        monkeypatch.setattr(train, 'planned_folder', lambda *_: str(folder))
        trainer = train.train(train.parse_args([*FLAGS, '--epochs', '1']))
        assert trainer.folder == f'{folder}-2'

    def test_what_a_dead_run_held_is_free(self, tmp_path):
        holding(tmp_path, functools.partial(os._exit, 9)).join()
        assert (tmp_path / NAME).exists()
        lock = FolderLock(str(tmp_path))
        assert f'process {os.getpid()} on' in (tmp_path / NAME).read_text()
        lock.release()
        assert not (tmp_path / NAME).exists()

    def test_a_run_leaves_no_lock(self, start):
        assert NAME not in os.listdir(start('a', '--epochs', 1).folder)

    def test_a_file_system_without_locks(self, tmp_path, monkeypatch):
        def refuse(*_):
            raise OSError(errno.ENOLCK, 'No locks available')

        monkeypatch.setattr('fcntl.lockf', refuse)
        FolderLock(str(tmp_path)).release()


class TestFinishedRuns:
    def test_resumed_elsewhere_there_is_nothing_to_do(self, start, tmp_path, capsys):
        path = start('a', '--epochs', 1).saver.path('last')
        arguments = [*FLAGS, '--output', str(tmp_path), '--experiment', 'b', '--epochs', '1', '--resume', path]
        assert train.main(arguments) == 0
        assert 'all 1 epochs are done' in capsys.readouterr().out and not (tmp_path / 'b').exists()

    def test_curves_that_do_not_fit_on_the_disk_are_not_missed(self, tmp_path, capsys, monkeypatch):
        def full(path, content):
            raise OSError(errno.ENOSPC, 'No space left on device', path)

        monkeypatch.setattr('vim_timm.report.curves.write_atomically', full)
        assert train.main([*FLAGS, '--output', str(tmp_path), '--experiment', 'a', '--epochs', '1']) == 0
        assert 'no curves: [Errno 28] No space left' in capsys.readouterr().out
        assert (tmp_path / 'a' / 'model_best.pth.tar').exists()
