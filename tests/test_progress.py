"""Who watches a run learns every second what it is at, and Ctrl-C loses nothing."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from logs import log_of

from vim_timm import train
from vim_timm.data.workers import usual_workers
from vim_timm.engine import log
from vim_timm.engine.process import catch_signals
from vim_timm.settings import Settings

ROOT = Path(__file__).parents[1]
FLAGS = (
    '--dataset digits --model test_vit --img-size 16 --in-chans 1 --device cpu --workers 0 --batch-size 64 '
    '--opt adamw --lr 1e-3'
).split()


class Terminal:
    """Standard output that says it is a terminal."""

    def __init__(self):
        self.text = ''

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return True

    def lines(self):
        return [line for line in re.split(r'\r\x1b\[K|\n', self.text) if line]


@pytest.fixture
def progress(monkeypatch):
    """Makes a `Progress` in a terminal, and returns both; after pytest has set up its own output."""

    def start(interval=None):
        found = Terminal()
        monkeypatch.setattr(sys, 'stdout', found)
        return log.Progress(True, interval), found

    return start


@pytest.fixture
def now(monkeypatch):
    """Seconds on a clock that a test turns."""
    seconds = [100.0]
    monkeypatch.setattr(log.time, 'monotonic', lambda: seconds[0])
    return seconds


def due(progress, now, seconds):
    """Steps, one every tenth of a second, at which there is a line."""
    found = []
    for step in range(1, 10 * seconds + 1):
        now[0] += 0.1
        if progress.due(step):
            found.append(step)
            progress.show(f'step {step}')
    return found


def test_a_file_has_a_line_every_half_minute(now, capsys):
    assert due(log.Progress(True), now, 100) == pytest.approx([300, 600, 900], abs=4)
    assert capsys.readouterr().out.count('\n') == 3


def test_a_terminal_has_one_every_second(progress, now):
    shown, terminal = progress()
    assert due(shown, now, 5) == pytest.approx([10, 20, 30, 40], abs=5)
    assert '\n' not in terminal.text


def test_the_users_interval_counts_steps(now, capsys):
    assert due(log.Progress(True, 7), now, 100) == list(range(7, 1001, 7))
    capsys.readouterr()


def test_the_users_interval_leaves_its_lines_in_a_terminal(progress, now):
    shown, terminal = progress(25)
    found = due(shown, now, 5)
    assert {25, 50} <= set(found) and len(found) > 5
    assert terminal.text.count('\n') == 2 and 'step 25\n' in terminal.text


def test_other_ranks_say_nothing(now, capsys):
    assert due(log.Progress(False), now, 100) == []
    assert capsys.readouterr().out == ''


def test_what_is_waited_for_is_said(monkeypatch, progress):
    monkeypatch.setattr(log.Progress, 'SECOND', 0.02)
    shown, terminal = progress()
    with shown:
        shown.wait_for('a compiler')
        deadline = time.time() + 60
        while len(terminal.lines()) < 3 and time.time() < deadline:
            time.sleep(0.02)
    assert all(re.fullmatch(r'waiting for a compiler, \d+ s', line) for line in terminal.lines()) and terminal.lines()


def test_a_file_says_it_when_it_takes_long(monkeypatch, capsys):
    for name, seconds in (('SECOND', 0.02), ('PATIENCE', 0.1), ('LINE', 0.3)):
        monkeypatch.setattr(log.Progress, name, seconds)
    with log.Progress(True) as progress:
        progress.wait_for('data')
        time.sleep(1)
        progress.wait_for('')
        time.sleep(0.3)
    assert 1 < capsys.readouterr().out.count('waiting for data') < 20  # of 50 at each SECOND


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='POSIX')
def test_a_child_can_print_whatever_the_thread_is_at(monkeypatch):
    monkeypatch.setattr(log.Progress, 'SECOND', 1e-4)
    with log.Progress(True) as progress:
        progress.wait_for('children')
        for _ in range(50):
            child = os.fork()
            if not child:
                with progress.lock:
                    os._exit(0)
            assert os.waitpid(child, 0)[1] == 0


def test_processes_are_no_more_than_the_cores_unless_chosen(monkeypatch):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: set(range(3)), raising=False)
    assert usual_workers(Settings({'workers': 4})) == 3
    assert usual_workers(Settings({'workers': 2})) == 2
    assert usual_workers(Settings({'workers': 4}, ['workers'])) == 4
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
    assert usual_workers(Settings({'workers': 4})) == 1


def test_log_and_tensorboard_have_time_and_speed(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ['--epochs', '2', '--tensorboard', '--log-interval', '10', '--output', str(tmp_path), '--experiment', 'a']
    trainer = train.train(train.parse_args([*FLAGS, *flags]))
    first, second = trainer.rows
    assert 0 < first['time'] < second['time'] and first['images_per_second'] > 0
    resumed = train.train(train.parse_args([*FLAGS, *flags, '--epochs', '3', '--resume', 'auto']))
    assert resumed.rows[:2] == [first, second] and resumed.rows[2]['time'] > second['time']
    board = EventAccumulator(str(tmp_path / 'a' / 'tensorboard')).Reload()
    scalars = set(board.Tags()['scalars'])
    assert {'speed/seconds', 'speed/images_per_second', 'train/loss'} <= scalars
    steps = EventAccumulator(str(tmp_path / 'a' / 'tensorboard' / 'steps')).Reload()
    assert set(steps.Tags()['scalars']) == {'step/loss', 'step/lr', 'step/images_per_second'}
    assert [event.step for event in steps.Scalars('step/loss')] == [10, 20, 32, 42, 54, 64]
    assert board.Tags()['images'] == ['first batch'] and board.Tags()['tensors'] == ['settings/text_summary']


@pytest.mark.skipif(not hasattr(signal, 'SIGALRM'), reason='POSIX')
def test_ctrl_c_lands_in_the_list():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    with catch_signals() as caught:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # of a launcher, which repeats the terminal's
        assert caught == [signal.SIGINT]
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def start(folder, *flags):
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, '-u', '-m', 'vim_timm.train', *FLAGS, '--output', str(folder), *flags]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding='utf-8', env=environment, cwd=folder
    )


def read_until(process, text):
    seen = ''
    while text not in seen:
        line = process.stdout.readline()
        assert line, seen
        seen += line
    return seen


@pytest.mark.skipif(os.name != 'posix', reason='POSIX')
def test_ctrl_c_saves_and_prints_the_line_that_goes_on(tmp_path):
    train.train(train.parse_args([*FLAGS, '--epochs', '3', '--output', str(tmp_path), '--experiment', 'whole']))
    process = start(tmp_path, '--epochs', '3', '--log-interval', '1', '--experiment', 'a b')
    read_until(process, 'epoch 1 [2/')
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 75 and 'Traceback' not in output, output
    assert 'Ctrl-C: stopping after this step; once more ends at once' in output
    words = shlex.split(re.search('go on with: (.*)', output)[1])
    assert words[-4:] == ['--experiment', 'a b', '--resume', 'auto']
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    again = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, encoding='utf-8')
    assert again.returncode == 0 and 'resumed from' in again.stdout, again.stderr
    assert log_of(tmp_path / 'a b') == log_of(tmp_path / 'whole')
    assert not (tmp_path / 'a b-2').exists()


SLOW = """
import sys, time
from vim_timm import train
from vim_timm.data import Digits
from vim_timm.engine import Hooks

class Slow(Digits):
    def __getitem__(self, index):
        if len(self.labels) > 1000:
            print('reading', flush=True)
            time.sleep(600)
        return super().__getitem__(index)

args = train.parse_args(sys.argv[1:])
try:
    train.train(args, Hooks(dataset=lambda split, training, args: Slow(training)))
except KeyboardInterrupt:
    print('before the loop')
"""


@pytest.mark.skipif(os.name != 'posix', reason='POSIX')
def test_ctrl_c_twice_ends_at_once(tmp_path):
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    code = SLOW.replace('if len', "if hasattr(self, 'tried') and len").replace(
        '        return super()', '        self.tried = True\n        return super()'
    )  # the first image is tried before the loop
    process = subprocess.Popen(
        [sys.executable, '-u', '-c', code, *FLAGS, '--output', str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding='utf-8', env=environment,
    )  # fmt: skip
    read_until(process, 'reading')
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(1)
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 130 and 'ended at once' in output and 'Traceback' not in output, output


@pytest.mark.parametrize(
    'flags, expected',
    [
        (['--lr', '1'], ['--lr', '1', '--experiment', 'a', '--resume', 'auto']),
        (['--experiment', 'x', '--resume=auto', '--overwrite'], ['--experiment', 'a', '--resume', 'auto']),
        (['--experiment=x', '--resume', 'F', '-b', '2'], ['-b', '2', '--experiment', 'a', '--resume', 'auto']),
    ],
)  # fmt: skip
def test_the_line_that_goes_on(flags, expected, monkeypatch):
    args, folder = train.parse_args(flags), os.path.join('.', 'output', 'train', 'a')
    for begins in (['python', 'train.py'], ['python', '-X', 'dev', '-m', 'vim_timm.train']):
        monkeypatch.setattr(sys, 'orig_argv', [*begins, *flags])
        assert train.resuming_command(args, flags, folder) == [*begins, *expected]
    with monkeypatch.context() as console:
        console.setattr(sys, 'argv', ['/env/bin/vim-timm'])
        console.setattr(sys, 'orig_argv', ['/env/bin/python3.11', '/env/bin/vim-timm', 'train', *flags])
        assert train.resuming_command(args, flags, folder) == ['vim-timm', 'train', *expected]
    monkeypatch.setattr(sys, 'orig_argv', ['pytest'])
    assert train.resuming_command(args, flags, folder) == ['python', '-m', 'vim_timm.train', *expected]
    monkeypatch.setattr(sys, 'orig_argv', ['/bin/python', '-u', 'train.py', *flags])
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'none')
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
    assert train.resuming_command(args, flags, folder) == ['torchrun', '--nproc_per_node=2', 'train.py', *expected]
