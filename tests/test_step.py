"""An update is timm's and torch's; the device takes or leaves it, and it is counted exactly, if late."""

import copy
import signal

import pytest
import timm
import torch
from logs import log_of
from processes import finish, ranks
from test_resume import BASE, EASY, HARD, assert_same_run, load
from timm.optim import muon as timm_muon

from vim_timm import train
from vim_timm.data.batch import Batch
from vim_timm.engine import Hooks
from vim_timm.engine.build import make_optimizer
from vim_timm.engine.checkpoint import Saver, load_optimizer
from vim_timm.errors import Preempted, TrainingStopped, UserError
from vim_timm.settings import Process
from vim_timm.step import Arrivals, RecordedStep, Update, batched, compile_task, fused_arguments, why_not
from vim_timm.step import update as step_update
from vim_timm.step.muon import BatchedMuon
from vim_timm.step.recorded import Recorded
from vim_timm.step.regions import regions
from vim_timm.tasks import make_task
from vim_timm.tasks.classification import _make_loss as make_loss

CONFIG = dict(mean=(0.2,), std=(0.5,), input_size=(1, 16, 16))


def start(flags):
    """Settings, a task with an average, and the optimizer of some flags."""
    torch.manual_seed(0)
    args = train.parse_args([*BASE.split(), '--warmup-epochs', '0', *flags.split()])
    model = timm.create_model('test_vit', num_classes=10, img_size=16, in_chans=1)
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    task = make_task(args, Process(), model, CONFIG)
    task.setup_ema(0.9)
    return args, task, make_optimizer(args, Process(), task)


def batches(count):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randn(8, 1, 16, 16, generator=generator), torch.randint(10, (8,), generator=generator)


def run(task, update, count, bad=()):
    """Losses of some steps; those in `bad` are there twice, first with images that are not numbers."""
    losses, number = [], 0
    for step, (images, targets) in enumerate(batches(count)):
        for attempt in (images * float('nan'), images) if step in bad else (images,):
            loss = task(attempt, targets)['loss']
            loss.backward()
            number += torch.isfinite(loss).item()
            update(loss.detach(), number)
            if torch.isfinite(loss):
                losses.append(loss.item())
    return losses


def ours(flags, count=20, bad=()):
    args, task, optimizer = start(flags)
    guarded = Update(args, Process(), task, optimizer, torch.amp.GradScaler('cpu', enabled=False))
    flags = []
    losses = run(task, lambda loss, n: flags.append(guarded(torch.isfinite(loss), n, False).tolist()), count, bad)
    assert [flag for flag, _ in flags] == [float(i in places(count, bad)) for i in range(count + len(bad))]
    return losses, task, optimizer


def places(count, bad):
    return [step + before for before, step in enumerate(sorted(bad))]


def tensors(task, optimizer):
    state = [value for p in task.parameters() for _, value in sorted(optimizer.state.get(p, {}).items())]
    return [*task.state_dict().values(), *(value for value in state if isinstance(value, torch.Tensor))]


@pytest.mark.parametrize(
    'clip', ['', '--clip-grad 0.5', '--clip-grad 0.01 --clip-mode value', '--clip-grad 0.1 --clip-mode agc']
)
@pytest.mark.parametrize('opt', ['adamw --lr 1e-3', 'sgd --lr 0.05', 'lamb --lr 1e-3'])
def test_twenty_steps_are_those_of_timm_and_torch(opt, clip):
    flags = f'--opt {opt} {clip}'
    losses, task, _ = ours(flags)
    args, plain, _ = start(flags)
    options = dict(fused=False) if opt.startswith(('adamw', 'sgd')) else {}
    optimizer = make_optimizer(args.replace(opt_kwargs=options), Process(), plain)

    def update(loss, number):
        if args.clip_grad:
            parameters = plain.get_clip_parameters(exclude_head='agc' in args.clip_mode)
            timm.utils.dispatch_clip_grad(parameters, args.clip_grad, mode=args.clip_mode)
        optimizer.step()
        optimizer.zero_grad()
        plain.update_ema(step=number)

    expected = run(plain, update, 20)
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-6)
    assert losses[-1] != losses[0]
    for mine, theirs in zip(task.state_dict().values(), plain.state_dict().values()):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    'opt',
    [
        'adamw --lr 1e-3',
        'adam --lr 1e-3',
        'sgd --lr 0.05',
        'momentum --lr 0.05',
        'lamb --lr 1e-3',
        'lookahead_adamw --lr 1e-3',
    ],
)
@pytest.mark.parametrize('bad', [(0,), (7,), (7, 8)])
@pytest.mark.parametrize('host', [('cpu',), ()])
def test_a_skipped_update_leaves_no_trace(opt, bad, host, monkeypatch):
    monkeypatch.setattr(step_update, 'HOST', host)
    flags = f'--opt {opt} --clip-grad 1'
    losses, *skipped = ours(flags, 12, bad)
    expected, *whole = ours(flags, 12)
    assert losses == expected
    assert all(map(torch.equal, tensors(*skipped), tensors(*whole)))


def test_which_optimizers_are_fused():
    cpu = torch.device('cpu')
    assert all(fused_arguments(name, cpu, {}) for name in ('adam', 'AdamW', 'sgd', 'momentum', 'nesterov'))
    assert not any(fused_arguments(name, cpu, {}) for name in ('lamb', 'nadamw', 'no_such', 'muon'))
    assert not fused_arguments('adamw', cpu, {'foreach': True}) and not fused_arguments('sgd', cpu, {'dampening': 0.1})
    assert not fused_arguments('adamw', torch.device('mps'), {})


@pytest.mark.parametrize('name', ['nadam', 'lookahead_nadam'])
def test_numbers_of_an_optimizer_keep_their_bits_in_a_resumed_run(name):
    args = start(f'--opt {name} --lr 1e-2')[0]
    model = torch.nn.Linear(6, 4).bfloat16()
    first, second = (timm.optim.create_optimizer_v2(model, name, lr=0.01) for _ in range(2))
    for _ in range(3):
        model(torch.ones(2, 6, dtype=torch.bfloat16)).sum().backward()
        first.step()
    load_optimizer(second, args, {'optimizer': copy.deepcopy(first.state_dict())}, 'a')
    before, after = (optimizer.state_dict()['state'] for optimizer in (first, second))
    for place, values in before.items():
        assert values['mu_product'].dtype == torch.float32
        assert all(torch.equal(value, after[place][key]) for key, value in values.items())


def test_ranks_of_an_optimizer_that_draws_numbers_keep_the_same_weights():
    args, weights = start('--opt kron --lr 1e-2')[0], []
    for rank in range(2):
        torch.manual_seed(0)
        model = torch.nn.Linear(6, 4)
        optimizer = make_optimizer(args, Process(rank=rank, world_size=2), make_task(args, Process(), model, CONFIG))
        for step in range(4):
            for p in model.parameters():
                p.grad = torch.full_like(p, step + 1.0)
            torch.manual_seed(rank)  # as the loop does
            optimizer.step()
        weights.append(model.weight.detach())
    assert torch.equal(*weights)


def test_state_of_another_memory_layout_is_taken_over():
    """torch's fused kernels for CPUs go through memory, whatever the strides."""
    after = []
    for layout in ('', ' --channels-last'):
        _, task, optimizer = ours('--opt adamw --lr 1e-3', 3)
        saved = copy.deepcopy({'optimizer': optimizer.state_dict(), 'args': {'opt': 'adamw'}})
        for group in saved['optimizer']['param_groups']:
            del group['fused']  # of a run before there was such a thing
        args, other, optimizer = start(f'--opt adamw --lr 1e-3{layout}')
        other.load_state_dict(task.state_dict())
        load_optimizer(optimizer, args, saved, 'file')
        update = Update(args, Process(), other, optimizer, torch.amp.GradScaler('cpu', enabled=False))
        run(other, lambda loss, n, update=update: update(torch.isfinite(loss), n, False), 2)
        assert all(group['fused'] for group in optimizer.param_groups)
        after.append(other.state_dict())
    for name, tensor in after[0].items():
        torch.testing.assert_close(after[1][name], tensor, rtol=1e-4, atol=1e-5)


@pytest.fixture
def late(monkeypatch):
    """The host learns of every step two steps later, as on a GPU."""
    begin = Arrivals.__init__

    def __init__(self, device):
        begin(self, device)
        self.lag = 2

    monkeypatch.setattr(Arrivals, '__init__', __init__)
    monkeypatch.setattr(step_update, 'HOST', ())


def test_arrivals_come_in_order_and_late(late):
    arrivals, got = Arrivals(torch.device('cpu')), []
    value = torch.zeros(())
    for step in range(4):
        arrivals.send(value.fill_(step), got.append)
        arrivals.advance()
        assert got == list(range(step - 1))
    arrivals.flush()
    assert got == [0, 1, 2, 3]


class Bad(torch.nn.Module):
    """Cross-entropy that is infinite, with a gradient that is not, in some steps of an epoch."""

    def __init__(self, steps, where=lambda: True):
        super().__init__()
        self.calls, self.steps, self.where = 0, steps, where

    def forward(self, output, target):
        loss = torch.nn.functional.cross_entropy(output, target)
        self.calls += self.training
        return loss + (float('inf') if self.training and self.calls in self.steps and self.where() else 0)


@pytest.mark.parametrize('precision', ['', '--amp'])
def test_counts_are_exact_although_they_come_late(late, precision, tmp_path, capsys, monkeypatch):
    """In the log, in messages and in checkpoints, the one of the very step that was skipped among them."""
    flags = [*BASE.split(), *EASY.split(), *precision.split(), '--output', str(tmp_path), '--epochs', '1']
    flags += ['--recovery-interval', '1', '--experiment', 'a']
    seen = []

    def keep(saver, state):
        seen.append(tuple(state['progress'][name] for name in ('step', 'skipped', 'nonfinite')))
        return ''

    monkeypatch.setattr(Saver, 'save_recovery', keep)
    trainer = train.train(train.parse_args(flags), Hooks(loss=Bad({3, 4, 22})))
    assert trainer.rows[0]['skipped'] == 3
    assert seen == [(step, min(max(step - 2, 0), 2), {3: 1, 4: 2}.get(step, 0)) for step in range(1, 22)]
    output = capsys.readouterr().out
    assert all(f'epoch 0, step {step}: loss or gradient' in output for step in (3, 4, 22))
    with pytest.raises(TrainingStopped, match='3 updates in a row'):
        arguments = train.parse_args([*flags[:-2], '--recovery-interval', '0', '--max-nonfinite', '3'])
        train.train(arguments, Hooks(loss=Bad({5, 7, 8, 9})))


@pytest.mark.parametrize('step', [5, 21, 22])
def test_stopped_by_a_signal_within_two_steps_and_resumed(late, step, tmp_path):
    """With updates of two steps each; the signal comes before the step, also one of the last two of an epoch."""
    flags = [*BASE.split(), *HARD.split(), '--recovery-interval', '0', '--workers', '0', '--epochs', '2']
    flags += ['--output', str(tmp_path)]
    assert train.train(train.parse_args([*flags, '--experiment', 'whole']))

    arguments = [*flags, '--experiment', 'cut', '--resume', 'auto']
    inner = make_loss(train.parse_args(arguments))

    class Signalling(torch.nn.Module):
        calls = 0

        def forward(self, output, target):
            self.calls += self.training
            if self.training and self.calls == step:
                signal.raise_signal(signal.SIGTERM)
            return inner(output, target)

    with pytest.raises(Preempted) as stopped:
        train.train(train.parse_args(arguments), Hooks(loss=Signalling()))
    saved = int(str(stopped.value).partition('recovery-0-')[2].partition('.')[0])
    assert step <= saved <= step + 3
    train.train(train.parse_args(arguments))
    assert_same_run(tmp_path, 'whole', 'cut')


ONE_RANK = """
import os, sys
from test_step import Bad
from vim_timm import train
from vim_timm.engine import Hooks

trainer = train.train(train.parse_args(sys.argv[1:]), Hooks(loss=Bad({3, 7}, lambda: os.environ['RANK'] == '1')))
total = sum(p.detach().double().abs().sum() for p in trainer.task.parameters())
print(f'rank {os.environ["RANK"]} skipped {trainer.skipped} weights {total:.17g}', flush=True)
"""


def test_all_ranks_skip_what_one_of_them_cannot_use(tmp_path):
    flags = [*BASE.split(), *EASY.split(), '--epochs', '1', '--batch-size', '32', '--output', str(tmp_path)]
    output = finish(ranks(ONE_RANK, *flags, '--experiment', 'a', count=2, folder=tmp_path))
    lines = sorted(line for line in output.splitlines() if line.startswith('rank '))
    assert len(lines) == 2 and all('skipped 2' in line for line in lines)
    assert lines[0].partition('weights')[2] == lines[1].partition('weights')[2]
    assert load(tmp_path, 'a')['progress']['skipped'] == 2


MUONS = {
    'muon': {}, 'nmuon': {}, 'adamuon': {}, 'nadamuon': {},
    'muon-batched': dict(conv_mode='batched', normalize_spatial=True, adjust_lr_fn='original'),
    'nadamuon-batched': dict(conv_mode='batched', adjust_lr_fn='rms_to_rms', scale_eps=True),
    'adamuon-plain': dict(adjust_lr_fn=None, ns_coefficients='polar_express', ns_steps=6, safety_factor=1.01),
}  # fmt: skip


class Mixed(torch.nn.Module):
    """Matrices of several shapes, a convolution, vectors, and parameters that have no gradient in some steps."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 3)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))
        self.wide = torch.nn.Linear(8, 24)
        self.seldom, self.rarely = (torch.nn.Parameter(torch.ones(24)) for _ in range(2))

    def forward(self, x, step):
        x = self.stem(x).mean((2, 3))
        for layer in self.layers:
            x = x + layer(x).relu()
        x = self.wide(x)
        parts = [x * self.seldom, x * self.rarely, x]
        return parts[step % 3].square().mean()


@pytest.fixture
def exact_muon(monkeypatch):
    """Newton-Schulz in float32: in bfloat16, in which timm iterates, one bit more or less becomes a hundred."""
    plain = timm_muon.zeropower_via_newtonschulz
    monkeypatch.setattr(
        timm_muon, 'zeropower_via_newtonschulz', lambda *args, **kwargs: plain(*args, **kwargs, dtype=torch.float32)
    )


@pytest.mark.parametrize('kind', MUONS)
def test_muon_in_batches_is_timms(kind, exact_muon):
    results = []
    for wrap in (lambda optimizer: optimizer, batched):
        torch.manual_seed(0)
        model = Mixed()
        name = kind.partition('-')[0]
        optimizer = wrap(timm.optim.create_optimizer_v2(model, name, lr=0.02, weight_decay=0.1, **MUONS[kind]))
        for step in range(6):
            model(torch.randn(4, 3, 5, 5), step).backward()
            optimizer.param_groups[0]['lr'] = 0.02 / (step + 1)
            if step == 3:  # as a checkpoint does
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            optimizer.step()
            optimizer.zero_grad()
        results.append((model.state_dict(), optimizer.state_dict()['state']))
    assert type(optimizer) is BatchedMuon
    (weights, state), (batch_weights, batch_state) = results
    for name, tensor in weights.items():
        torch.testing.assert_close(batch_weights[name], tensor, rtol=1e-4, atol=1e-5)
    assert {key: value.keys() for key, value in state.items()} == {k: v.keys() for k, v in batch_state.items()}
    for key, values in state.items():
        for name, value in values.items():
            torch.testing.assert_close(batch_state[key][name], value, rtol=1e-3, atol=1e-5, msg=f'{key} {name}')


def test_muon_of_timm_goes_on_in_batches():
    """A checkpoint of either is one of the other."""
    torch.manual_seed(0)
    model = Mixed()
    optimizers = [timm.optim.create_optimizer_v2(model, 'nadamuon', lr=0.02) for _ in range(2)]
    optimizers[1] = batched(optimizers[1])
    for step in range(4):
        model(torch.randn(4, 3, 5, 5), step).backward()
        first, second = optimizers[step % 2], optimizers[1 - step % 2]
        first.step()
        second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize('name', ['vim_nano_patch4_32', 'vim2_nano_patch4_32', 'test_vit', 'mae_vim_tiny_patch4_32'])
def test_a_block_is_compiled_once_for_all(name, monkeypatch):
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    args = train.parse_args(f'--dataset digits --model {name} --img-size 32 --num-classes 10 --device cpu'.split())
    model = timm.create_model(name, img_size=32, **({} if args.mae else dict(drop_path_rate=0.5, num_classes=10)))
    task = make_task(args, Process(), model, dict(mean=(0.2,) * 3, std=(0.5,) * 3, input_size=(3, 32, 32)))
    images, targets = torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.int64)
    batch = Batch(images, targets, torch.arange(12).view(4, 3))
    with torch.no_grad():
        expected = task.eval().predict(batch)
    names = task.get_checkpoint_state()['state_dict'].keys()
    torch._dynamo.reset()
    said = compile_task(task, backend, None)
    blocks = regions(model)
    kinds = 1 if name in ('vim_nano_patch4_32', 'test_vit') else 2  # encoder and decoder; rows and columns
    assert f'for all {len(blocks)}' in said and len(blocks) > 1 and ('2 kinds' in said) == (kinds == 2)
    task.train().training_loss(batch).backward()
    assert len(compiled) == kinds
    with torch.no_grad():
        torch.testing.assert_close(task.eval().predict(batch), expected)
    assert len(compiled) <= 3 * kinds
    assert task.get_checkpoint_state()['state_dict'].keys() == names
    torch._dynamo.reset()


def test_what_is_not_alike_is_compiled_whole():
    assert regions(timm.create_model('resnet18')) == []
    args, task, _ = start('--opt sgd --lr 0.1')
    assert 'the model' in compile_task(task, 'eager', 'reduce-overhead')


def test_drop_path_of_compiled_blocks_drops_as_many():
    torch.manual_seed(0)
    block = torch.nn.Sequential(timm.layers.DropPath(0.25), torch.nn.Linear(4, 4))
    model = torch.nn.ModuleList([block, copy.deepcopy(block)])
    args, task, _ = start('--opt sgd --lr 0.1')
    task.trainable_module = model
    compile_task(task, 'eager', None)
    dropped = model[0][0](torch.ones(10000, 2, 3))
    assert dropped.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert abs((dropped[:, 0, 0] == 0).float().mean() - 0.25) < 0.02 and (dropped == dropped[:, :1, :1]).all()
    assert torch.equal(model.eval()[0][0](torch.ones(3, 2)), torch.ones(3, 2))


@pytest.mark.parametrize('opt', ['adamw --lr 1e-3', 'sgd --lr 0.05', 'nadamuon --lr 1e-3'])
def test_a_recorded_step_is_the_step(opt, exact_muon, monkeypatch):
    """All but the recording itself, which a CPU has not: inputs that stay in place, rates on the device."""
    monkeypatch.setattr(step_update, 'HOST', ())
    losses, weights = {}, {}
    for recorded in (False, True):
        args, task, optimizer = start(f'--opt {opt} --clip-grad 1')
        update = Update(args, Process(), task, optimizer, torch.amp.GradScaler('cpu', enabled=False))

        def forward_backward(batch, group, task=task):
            loss = task.training_loss(batch)
            (loss / group).backward()
            return loss.detach()

        step, seen = RecordedStep(update, forward_backward) if recorded else None, []
        for number, (images, targets) in enumerate(batches(8), 1):
            for group in optimizer.param_groups:
                group['lr'] *= 0.9
            images = images * float('nan') if number in (1, 5) else images
            batch = Batch(images, targets, torch.zeros(8, 3, dtype=torch.int64))
            if recorded:
                loss, flags = step(batch, number, number == 3, torch.tensor(True))
            else:
                loss = forward_backward(batch, 1)
                flags = update(torch.isfinite(loss), number, number == 3)
            assert flags.tolist() == [float(number in (1, 5)), float(number == 3)]
            assert all(isinstance(group['lr'], float) for group in optimizer.param_groups)
            seen.append(loss.item())
        losses[recorded], weights[recorded] = seen, task.state_dict()
    torch.testing.assert_close(losses[True], losses[False], rtol=0, atol=1e-6, equal_nan=True)
    for name, tensor in weights[False].items():
        torch.testing.assert_close(weights[True][name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('bad', [{3}, {1, 44}])
def test_recorded_steps_accumulate_as_others(bad, tmp_path, monkeypatch):
    """Three steps an update, and one in the last of an epoch; a loss that is not finite spoils its whole update."""
    monkeypatch.setattr(train, 'why_not', lambda *_: '')
    flags = [*BASE.split(), *EASY.split(), '--grad-accum-steps', '3', '--epochs', '2', '--output', str(tmp_path)]
    results = []
    for more in ([], ['--cuda-graph']):
        trainer = train.train(train.parse_args([*flags, *more]), Hooks(loss=Bad(bad)))
        results.append((trainer.rows, trainer.task.state_dict()))
        if more:
            assert (trainer.recorded.part.calls, trainer.recorded.recorded.calls) == (28, 16)
    (rows, weights), (same_rows, same_weights) = results
    for row, same in zip(rows, same_rows, strict=True):
        assert row['skipped'] == same['skipped'] and row['train_loss'] == pytest.approx(same['train_loss'], rel=1e-4)
    assert rows[-1]['skipped'] == len(bad)
    for name, tensor in weights.items():
        torch.testing.assert_close(same_weights[name], tensor, rtol=1e-3, atol=1e-4)


def cut(flags, path, monkeypatch):
    """Train until the first recovery checkpoint of epoch 1, which goes to `path`."""

    class Done(Exception):
        pass

    def stop(saver, state):
        if state['progress']['epoch'] == 1:
            torch.save(state, path)
            raise Done
        return ''

    with monkeypatch.context() as patched, pytest.raises(Done):
        patched.setattr(Saver, 'save_recovery', stop)
        train.train(train.parse_args(flags))


@pytest.mark.parametrize('accum, more', [('1', ''), ('2', '--data-in-memory')])
def test_a_run_of_recorded_steps_resumes_bit_for_bit(accum, more, tmp_path, monkeypatch):
    """With data in memory the images that a recording sees are of 8 bits, and what becomes of them is a part of it."""
    monkeypatch.setattr(train, 'why_not', lambda *_: '')
    flags = [*BASE.split(), *HARD.split(), '--grad-accum-steps', accum, '--workers', '0', '--epochs', '2']
    flags += ['--output', str(tmp_path), *more.split()]
    plain = train.train(train.parse_args([*flags, '--experiment', 'plain', '--recovery-interval', '0']))
    flags += ['--cuda-graph']
    whole = train.train(train.parse_args([*flags, '--experiment', 'whole', '--recovery-interval', '0']))
    for row, same in zip(plain.rows, whole.rows, strict=True):
        assert row['train_loss'] == pytest.approx(same['train_loss'], rel=1e-3)
    eight_bits = [tensor.dtype == torch.uint8 for tensor in whole.recorded.recorded.inputs]
    assert any(eight_bits) == bool(more)
    assert whole.recorded.recorded.calls == (44 if accum == '1' else 22)

    cut([*flags, '--experiment', 'cut', '--recovery-interval', '15'], tmp_path / 'recovery', monkeypatch)
    train.train(train.parse_args([*flags, '--experiment', 'again', '--resume', str(tmp_path / 'recovery')]))
    first, second = load(tmp_path, 'whole'), load(tmp_path, 'again')
    for key in ('state_dict', 'state_dict_ema'):
        assert all(torch.equal(tensor, second[key][name]) for name, tensor in first[key].items())
    assert log_of(tmp_path / 'whole') == log_of(tmp_path / 'again')


@pytest.mark.parametrize(
    'flags, reason',
    [
        ('', 'not of cpu'),
        ('--opt lamb', '--opt lamb'),
        ('--grad-checkpointing', '--grad-checkpointing'),
        ('--model-ema', 'average of float32'),
    ],
)
def test_what_cannot_be_recorded_is_refused(flags, reason):
    args, task, optimizer = start(f'--opt adamw --lr 1e-3 {flags}')
    if '--model-ema' in flags:
        task.trainable_module_ema.to(torch.bfloat16)
    process = Process(torch.device('cuda' if flags else 'cpu'))
    assert reason in why_not(args, process, task, optimizer)
    assert why_not(args, Process(torch.device('cuda'), world_size=2), task, optimizer)
    if not flags:
        assert why_not(args, Process(torch.device('cuda')), task, optimizer) == ''


def test_batches_of_two_shapes_are_not_recorded():
    recorded = Recorded(lambda x: x + 1)
    assert recorded(torch.zeros(2)).tolist() == [1, 1]
    with pytest.raises(UserError, match='one shape'):
        recorded(torch.zeros(3))


def test_cuda_graph_without_cuda_is_one_sentence(tmp_path, capsys):
    assert train.main([*BASE.split(), *EASY.split(), '--cuda-graph', '--output', str(tmp_path / 'o')]) == 2
    assert '--cuda-graph' in capsys.readouterr().err and not (tmp_path / 'o').exists()
