"""Nothing is lost on a crash: a run that is killed and resumed is bit for bit the run that never was.

`VIM_TIMM_KILLS` sets how many times the run is killed (20 in a thorough test).
"""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from logs import log_of, settled
from processes import TRAIN, VALIDATE, Python, finish, ranks

from vim_timm import train, validate
from vim_timm.data import Digits
from vim_timm.engine import Hooks
from vim_timm.engine.checkpoint import Saver
from vim_timm.errors import Preempted, UserError

KILLS = int(os.environ.get('VIM_TIMM_KILLS', '3'))
BASE = '--dataset digits --model test_vit --img-size 16 --in-chans 1 --device cpu --batch-size 64 --log-interval 100'
# Every source of randomness, and accumulation, average and clipping with it.
HARD = (
    '--opt adamw --lr 1e-3 --warmup-epochs 1 --aa rand-m9-mstd0.5-inc1 --reprob 0.25 --mixup 0.8 --cutmix 1.0 '
    '--drop-path 0.1 --model-ema --model-ema-decay 0.9 --grad-accum-steps 2 --clip-grad 1.0 --recovery-interval 4'
)
EASY = '--opt sgd --lr 0.05 --no-aug --smoothing 0 --warmup-epochs 0 --workers 0'


@pytest.fixture(autouse=True)
def one_thread():
    """Of each process, the one of the tests too: threads that wait for each other on a loaded machine run into the
    time limit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def words(folder, name, *flags):
    return [*BASE.split(), *flags, '--output', str(folder), '--experiment', name]


def here(folder, name, *flags):
    """Train in this process."""
    assert train.main(words(folder, name, *flags)) == 0


def start(folder, name, *flags):
    """Train in a process of its own."""
    return Python(TRAIN, *words(folder, name, *flags), output=folder / f'{name}.txt')


TORCHRUN = 'import sys; from torch.distributed.run import main; main(sys.argv[1:])'


def launch(folder, name, *flags):
    """Train in two processes of torchrun, which starts them from the command line."""
    arguments = ['--standalone', '--nproc-per-node', '2', '-m', 'vim_timm.train', *words(folder, name, *flags)]
    return Python(TORCHRUN, *arguments, output=folder / f'{name}.txt')


def wait_for(path, process):
    """Until there is such a file."""
    while not path.exists():
        assert process.poll() is None, 'it has ended'
        time.sleep(0.05)


def load(folder, name, file='last'):
    return torch.load(folder / name / f'{file}.pth.tar', weights_only=True)


def assert_same_run(folder, one, other):
    first, second = load(folder, one), load(folder, other)
    for key in ('state_dict', 'state_dict_ema'):
        assert first.get(key, {}).keys() == second.get(key, {}).keys()
        for name, tensor in first.get(key, {}).items():
            assert torch.equal(tensor, second[key][name]), f'{key} {name}'
    assert log_of(folder / one) == log_of(folder / other)
    names = [sorted(name for name in os.listdir(folder / run) if '.pth.tar' in name) for run in (one, other)]
    assert names[0] == names[1]


def run_killed_and_resumed(folder, *flags):
    """Train 'whole' once, and 'cut' with KILLS kills at any moment of its start or its first epochs."""
    finish([Python('', output=folder / 'first.txt')])  # whatever starts first takes longer
    started = time.time()
    whole = start(folder, 'whole', *flags)
    wait_for(folder / 'whole' / 'last.pth.tar', whole)
    an_epoch = time.time() - started  # most of it is starting up
    assert whole.wait()[0] == 0
    dice = random.Random(0)
    for _ in range(KILLS):
        process = start(folder, 'cut', *flags, '--resume', 'auto')
        time.sleep(dice.uniform(0.6, 1.2) * an_epoch)
        process.send_signal(signal.SIGKILL)
        process.wait()
    finish([start(folder, 'cut', *flags, '--resume', 'auto')])


@pytest.mark.timeout(300 + 90 * KILLS)
def test_killed_and_resumed_run_is_the_run_never_killed(tmp_path):
    flags = [*HARD.split(), '--workers', '2', '--epochs', str(3 + KILLS // 3)]
    flags += ['--checkpoint-hist', '2', '--checkpoint-every', '2']
    run_killed_and_resumed(tmp_path, *flags)
    assert_same_run(tmp_path, 'whole', 'cut')


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs an NVIDIA GPU')
@pytest.mark.timeout(300 + 90 * KILLS)
def test_killed_and_resumed_recorded_run_is_the_run_never_killed(tmp_path):
    flags = [*HARD.split(), '--model', 'vim_nano_patch4_32', '--img-size', '32', '--device', 'cuda', '--cuda-graph']
    flags += ['--amp', '--amp-dtype', 'bfloat16', '--data-in-memory', '--workers', '0']
    flags += ['--epoch-repeats', '4', '--epochs', str(3 + KILLS)]
    run_killed_and_resumed(tmp_path, *flags)
    assert_same_run(tmp_path, 'whole', 'cut')


STUCK = """
import time
from torch.utils.data import DataLoader
from vim_timm.data.workers import start_worker

class Stuck(list):
    def __getitem__(self, index):
        print('here', flush=True)
        time.sleep(600)

next(iter(DataLoader(Stuck([0]), num_workers=1, worker_init_fn=start_worker)))
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='elsewhere workers end when they next look for their parent')
def test_a_worker_ends_with_its_process_whatever_it_waits_for():
    process = subprocess.Popen([sys.executable, '-c', STUCK], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b'here\n'
    process.kill()
    assert process.communicate(timeout=200) == (b'', None)  # nobody holds the pipe any more


PREEMPTED = [*HARD.split(), '--workers', '2', '--epochs', '3']


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """A folder with the run `whole`, which nothing stopped."""
    folder = tmp_path_factory.mktemp('preempted')
    here(folder, 'whole', *PREEMPTED)
    return folder


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGUSR1])
def test_preempted_run_saves_and_says_so(number, whole):
    name = number.name
    process = start(whole, name, *PREEMPTED)
    wait_for(whole / name / 'last.pth.tar', process)
    process.send_signal(number)
    status, output = process.wait()
    assert status == 75, output
    assert '--resume' in output and any(file.startswith('recovery') for file in os.listdir(whole / name))
    here(whole, name, *PREEMPTED, '--resume', 'auto')
    assert_same_run(whole, 'whole', name)


FETCH = Digits.__getitem__


class Signalling(Digits):
    """The held-out digits; a scheduler announces the end of the job when the 100th is read for the `when`-th time."""

    times, when = 0, 0

    def __getitem__(self, index):
        if index == 100:
            Signalling.times += 1
            if Signalling.times == Signalling.when:
                signal.raise_signal(signal.SIGTERM)
        return FETCH(self, index)


@pytest.mark.parametrize('when', [1, 2, 3])
def test_signal_in_an_evaluation(when, tmp_path, capsys):
    """Of the trained weights, of their average, and of both in the next epoch."""
    flags = [*BASE.split(), *HARD.split(), '--workers', '0', '--epochs', '2', '--output', str(tmp_path)]
    flags += ['--sched-on-updates'] if when == 2 else []
    hooks = Hooks(dataset=lambda split, training, args: None if training else Signalling(train=False))
    Signalling.times = Signalling.when = 0
    train.train(train.parse_args([*flags, '--experiment', 'whole']), hooks)
    Signalling.times, Signalling.when = 0, when
    arguments = [*flags, '--experiment', 'cut', '--resume', 'auto']
    with pytest.raises(Preempted, match=f'recovery-{when // 3}-22'):
        train.train(train.parse_args(arguments), hooks)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    train.train(train.parse_args(arguments), hooks)
    assert f'epoch {when // 3}, step 22' in capsys.readouterr().out
    assert_same_run(tmp_path, 'whole', 'cut')


def test_signal_to_validate(tmp_path, monkeypatch, capsys):
    flags = [*BASE.split(), *EASY.split(), '--epochs', '1', '--output', str(tmp_path), '--experiment', 'a']
    assert train.main(flags) == 0
    Signalling.times, Signalling.when = 0, 1
    monkeypatch.setattr(Digits, '__getitem__', Signalling.__getitem__)
    flags = ['--checkpoint', str(tmp_path / 'a' / 'last.pth.tar'), *'--device cpu --workers 0 --batch-size 50'.split()]
    assert validate.main([*flags, '--results-file', str(tmp_path / 'results.csv')]) == 75
    assert 'stopped by a signal' in capsys.readouterr().err and not (tmp_path / 'results.csv').exists()


def test_silent_rank_is_waited_for_no_longer_than_the_timeout(tmp_path):
    flags = [*EASY.split(), '--epochs', '2000', '--batch-size', '32', '--dist-timeout', '5']
    first, second = ranks(TRAIN, *words(tmp_path, 'a', *flags), count=2, folder=tmp_path)
    try:
        wait_for(tmp_path / 'a' / 'last.pth.tar', first)
        second.send_signal(signal.SIGSTOP)
        status, output = first.wait(timeout=200)
    finally:
        second.send_signal(signal.SIGKILL)
        second.wait()
    assert status == 3 and 'another rank of this run died or hangs' in output, output
    assert 'Traceback' not in output
    load(tmp_path, 'a')  # whole


def test_signal_to_torchrun_saves_once(tmp_path):
    flags = [*EASY.split(), '--workers', '1', '--epochs', '50', '--batch-size', '32']
    process = launch(tmp_path, 'cut', *flags)
    wait_for(tmp_path / 'cut' / 'last.pth.tar', process)
    process.send_signal(signal.SIGTERM)
    output = process.wait(timeout=200)[1]
    assert 'saved' in output
    assert sum(name.startswith('recovery') for name in os.listdir(tmp_path / 'cut')) == 1


@pytest.mark.parametrize('workers', ['0', '2'])
def test_workers_do_not_change_the_run(workers, few, tmp_path):
    flags = [*BASE.split(), *HARD.split(), '--epochs', '1', '--output', str(tmp_path)]
    assert train.main([*flags, '--workers', '1', '--experiment', 'one']) == 0
    assert train.main([*flags, '--workers', workers, '--experiment', 'other']) == 0
    assert_same_run(tmp_path, 'one', 'other')


@pytest.mark.parametrize('more', [[], ['--model-ema-force-cpu']])
def test_an_average_in_two_bytes_is_rounded_alike_after_a_resume(more, tmp_path):
    flags = '--no-aug --workers 0 --opt adamw --lr 1e-3 --warmup-epochs 0 --model-dtype bfloat16 --model-ema'.split()
    here(tmp_path, 'whole', *flags, *more, '--epochs', '2')
    resumed = str(tmp_path / 'whole' / 'checkpoint-0.pth.tar')
    here(tmp_path, 'again', *flags, *more, '--epochs', '2', '--resume', resumed)
    whole, again = (torch.load(tmp_path / name / 'last.pth.tar')['state_dict_ema'] for name in ('whole', 'again'))
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


def test_log_is_cut_back_to_the_checkpoint(few, tmp_path):
    flags = [*BASE.split(), *EASY.split(), '--output', str(tmp_path), '--experiment', 'a', '--epochs', '3']
    assert train.main(flags) == 0
    whole = log_of(tmp_path / 'a')
    path = str(tmp_path / 'a' / 'checkpoint-0.pth.tar')
    assert train.main([*flags, '--resume', path]) == 0
    assert log_of(tmp_path / 'a') == whole


def test_epochs_that_come_again_are_once_in_the_log(few, tmp_path):
    flags = [*BASE.split(), *EASY.split(), '--output', str(tmp_path), '--experiment', 'a', '--epochs', '4']
    assert train.main(flags) == 0
    before = load(tmp_path, 'a')['history']
    assert train.main([*flags, '--resume', 'auto', '--start-epoch', '2']) == 0
    rows = json.loads((tmp_path / 'a' / 'summary.json').read_text())
    assert [row['epoch'] for row in rows] == [0, 1, 2, 3] and rows[:2] == before[:2]
    best = max(rows, key=lambda row: row['eval_top1'])['epoch']
    assert load(tmp_path, 'a', 'model_best')['epoch'] == best


def test_plateau_schedule_and_early_stop_survive_a_resume(few, tmp_path):
    flags = [
        *BASE.split(),
        *EASY.split(),
        '--output',
        str(tmp_path),
        '--epochs',
        '6',
        '--lr',
        '1e-9',
        '--sched',
        'plateau',
    ]
    flags += ['--patience-epochs', '0', '--early-stop-patience', '3']
    assert train.main([*flags, '--experiment', 'whole']) == 0
    assert (
        train.main([*flags, '--experiment', 'cut', '--resume', str(tmp_path / 'whole' / 'checkpoint-1.pth.tar')]) == 0
    )
    first, second = load(tmp_path, 'whole')['history'], load(tmp_path, 'cut')['history']
    assert settled(first) == settled(second) and len(first) == 4  # one evaluation, and three without a better one


@pytest.mark.parametrize('sched', ['multistep --decay-milestones 1 --lr 0.05', 'cosine --lr-noise 0 --lr 0.05'])
def test_a_run_resumed_in_its_first_epoch_begins_with_its_learning_rate(sched, tmp_path, monkeypatch):
    flags = [*BASE.split(), *EASY.split(), '--epochs', '2', '--recovery-interval', '4', '--output', str(tmp_path)]
    flags += ['--sched', *sched.split()]
    assert train.main([*flags, '--experiment', 'whole']) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Saver, 'save_epoch', lambda *_: sys.exit('stopped'))
        with pytest.raises(SystemExit):
            train.train(train.parse_args([*flags, '--experiment', 'cut']))
    for name, value in (('--seed', '7'), ('--aug-repeats', '2')):
        with pytest.raises(UserError, match=f'middle of an epoch: resume it with {name} '):
            train.train(train.parse_args([*flags, '--experiment', 'cut', '--resume', 'auto', name, value]))
    assert [name[:11] for name in os.listdir(tmp_path / 'cut') if '.pth.tar' in name] == ['recovery-0-']
    assert train.main([*flags, '--experiment', 'cut', '--resume', 'auto']) == 0
    assert_same_run(tmp_path, 'whole', 'cut')


def test_finished_run_resumes_to_nothing(few, tmp_path, capsys):
    flags = [*BASE.split(), *EASY.split(), '--output', str(tmp_path), '--experiment', 'a', '--epochs', '1']
    assert train.main([*flags, '--resume', 'auto']) == 0  # nothing there yet: a fresh run
    before = (tmp_path / 'a' / 'last.pth.tar').read_bytes()
    assert train.main([*flags, '--resume', 'auto']) == 0
    assert (tmp_path / 'a' / 'last.pth.tar').read_bytes() == before
    assert 'are done' in capsys.readouterr().out


@pytest.mark.parametrize('which', ['auto', 'last'])
def test_each_checkpoint_is_read_once(which, few, tmp_path, monkeypatch):
    flags = [*BASE.split(), *EASY.split(), '--output', str(tmp_path), '--experiment', 'a']
    assert train.main([*flags, '--epochs', '1']) == 0
    folder, read, load = tmp_path / 'a', [], torch.load
    (folder / 'recovery-1-0.pth.tar').write_bytes((folder / 'last.pth.tar').read_bytes())
    monkeypatch.setattr(torch, 'load', lambda file, **kwargs: read.append(file.name) or load(file, **kwargs))
    last = str(folder / 'last.pth.tar')
    assert train.main([*flags, '--epochs', '2', '--resume', 'auto' if which == 'auto' else last]) == 0
    assert read.count(last) == 1 and len(read) == len(set(read))


def test_two_processes_train_like_one(tmp_path):
    """Ten steps of SGD with momentum, weights to 1e-6; AdamW, losses to 1e-4; deterministic reruns are bit-equal."""
    steps = ['--epoch-repeats', '0', '--epochs', '1']
    for opt, lr in (('sgd', '0.01'), ('adamw', '1e-3')):
        flags = [*EASY.split(), *steps, '--opt', opt, '--lr', lr]
        here(tmp_path, f'{opt}-1', *flags, '--batch-size', '140')
        two = words(tmp_path, f'{opt}-2', *flags, '--batch-size', '70')
        finish(ranks(TRAIN, *two, count=2, folder=tmp_path))
        first, second = load(tmp_path, f'{opt}-1'), load(tmp_path, f'{opt}-2')
        assert abs(first['history'][0]['train_loss'] - second['history'][0]['train_loss']) < 1e-4
        if opt == 'sgd':
            for name, tensor in first['state_dict'].items():
                torch.testing.assert_close(tensor, second['state_dict'][name], rtol=0, atol=1e-6)
    again = words(tmp_path, 'again', *flags, '--batch-size', '70')
    finish(ranks(TRAIN, *again, count=2, folder=tmp_path))
    assert_same_run(tmp_path, 'adamw-2', 'again')


def test_an_average_with_batch_norm_is_evaluated_as_it_is_saved(tmp_path):
    flags = [*EASY.split(), '--model', 'test_resnet', '--model-ema', '--model-ema-decay', '0.5', '--epochs', '1']
    flags += ['--batch-size', '8']  # of which the ranks' statistics differ more
    finish(ranks(TRAIN, *words(tmp_path, 'a', *flags), count=2, folder=tmp_path))
    results = ['--results-file', str(tmp_path / 'a.json'), '--device', 'cpu', '--workers', '0', '--use-ema']
    assert validate.main(['--checkpoint', str(tmp_path / 'a' / 'last.pth.tar'), *results]) == 0
    result, row = json.loads((tmp_path / 'a.json').read_text()), load(tmp_path, 'a')['history'][0]
    assert result['loss'] == pytest.approx(row['ema_loss'], abs=2e-4)
    assert result['top1'] == pytest.approx(row['ema_top1'], abs=1e-3)


def test_evaluation_counts_every_image_once(tmp_path):
    """359 images do not divide by 2 or 3; the counts agree to the image."""
    here(tmp_path, 'a', *EASY.split(), '--epochs', '1')
    flags = ['--checkpoint', str(tmp_path / 'a' / 'last.pth.tar'), '--batch-size', '50', '--device', 'cpu']
    flags += ['--workers', '0', '--results-format', 'json', '--results-file']
    assert validate.main([*flags, str(tmp_path / '1.json')]) == 0
    finish(ranks(VALIDATE, *flags, str(tmp_path / '3.json'), count=3, folder=tmp_path))
    one, three = (json.loads((tmp_path / f'{ranks}.json').read_text()) for ranks in (1, 3))
    assert one['count'] == three['count'] == 359
    assert (one['top1'], one['top5']) == (three['top1'], three['top5'])


def test_dead_rank_ends_the_run(tmp_path):
    flags = [*EASY.split(), '--workers', '1', '--epochs', '200', '--batch-size', '32', '--dist-timeout', '20']
    process = launch(tmp_path, 'a', *flags)
    wait_for(tmp_path / 'a' / 'last.pth.tar', process)
    ranks = subprocess.run(['pgrep', '-P', str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    assert process.wait(timeout=200)[0] != 0
    load(tmp_path, 'a')  # whole
