"""The training loop. Its whole state is model, average, optimizer, scaler, the log's rows and (epoch, step)."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import TrainingTask
from timm.utils import distribute_bn, unwrap_model

from ..data import Batch, Loader, seed_everything
from ..errors import Preempted, TrainingStopped, UserError, explain
from ..models.adapt import check_fit
from ..models.checkpoint import class_names_in, has_average, select_weights
from ..settings import Process, Settings
from ..settings.flags import AUTO
from ..step import Arrivals, RecordedStep, Update
from ..tasks import Task
from . import checkpoint, log
from .build import learning_rate, registered
from .eval_batch import fit_batch
from .evaluate import Metric, Watch, evaluate
from .process import catch_signals
from .provenance import provenance
from .record import eval_batch_of, held_out_of, history_of, progress_of, rate_of, seconds_of


@dataclasses.dataclass
class Hooks:
    """Where your own code enters a run.

    Attributes:
        dataset: `dataset(split, training, args)` returns a map-style data set of (PIL image, target), or None for the
            data set that the flags name.
        loss: module called with (output, targets).
        metrics: further metrics by name, each a function of all outputs and targets; usable as --eval-metric.
        callback: called with the Trainer after every epoch's row is in `trainer.rows`.
        task: `task(model, args)` returns a `vim_timm.tasks.Task`, or a TrainingTask of timm's, in place of
            classification.
    """

    dataset: Callable[[str, bool, Settings], Any] | None = None
    loss: torch.nn.Module | None = None
    metrics: Mapping[str, Metric] = dataclasses.field(default_factory=dict)
    callback: Callable[['Trainer'], Any] | None = None
    task: Callable[[torch.nn.Module, Settings], TrainingTask] | None = None


class Trainer:
    """One run: `Trainer(...).run()`.

    Attributes:
        rows: the log, one dict an epoch.
        epoch, step: where training is; step counts batches of the epoch.
    """

    def __init__(
        self, args: Settings, process: Process, task: Task, optimizer: torch.optim.Optimizer,
        loaders: tuple[Loader, Loader], folder: str, hooks: Hooks,
    ):  # fmt: skip
        self.args, self.process, self.task, self.optimizer = args, process, task, optimizer
        (self.train_data, self.eval_data), self.hooks = loaders, hooks
        self.primary = process.primary
        self.scaler = torch.amp.GradScaler(process.device.type, enabled=process.autocast_dtype == torch.float16)
        self.batches = len(self.train_data)
        self.updates = -(-self.batches // args.grad_accum_steps)
        known = (*task.create_evaluator().metric_names, *hooks.metrics)
        if args.eval_metric not in known:
            raise UserError(f'--eval-metric must be one of {", ".join(known)}, not {args.eval_metric!r}')
        self.decreasing = task.decreasing(args.eval_metric)
        with explain('schedule'):
            options = scheduler_kwargs(args, decreasing_metric=self.decreasing)
            if learning_rate(args, process.world_size) == 0 and 'warmup_lr' not in args.chosen:
                options['warmup_lr'] = 0.0  # timm's default would be above it
            self.scheduler, self.epochs = create_scheduler_v2(optimizer, **options, updates_per_epoch=self.updates)
        self.metric = f'{"ema" if self.evaluates_ema() else "eval"}_{args.eval_metric}'
        self.saver = checkpoint.Saver(folder, args.checkpoint_hist, args.checkpoint_every, self.metric, self.decreasing)
        by_steps = 'log_interval' in args.chosen or args.save_images
        self.progress = log.Progress(self.primary, args.log_interval if by_steps else None)
        self.clock = log.Clock()
        self.rate: float | None = None  # images a second of the epoch
        self.last_rate = self._learning_rate()  # of the last update
        self.update = Update(args, process, task, optimizer, self.scaler)
        record = functools.partial(RecordedStep, self.update, self._forward_backward, args.grad_accum_steps > 1)
        self.recorded = record() if args.cuda_graph else None
        self.arrivals = Arrivals(process.device)
        self.signals: list[int] = []
        self.stopping = False  # since a signal to any rank, which all ranks know
        self.trackers = log.Trackers(args) if self.primary else None
        self.provenance, self.registered = provenance(process), registered(args)
        self.eval_batch = 0  # that --validation-batch-size auto has chosen
        self.rows: list[dict[str, Any]] = []
        self.epoch, self.step, self.nonfinite, self.skipped = args.start_epoch or 0, 0, 0, 0
        self._reset_loss()

    def _reset_loss(self, values: Sequence[float] = (0.0, 0.0)) -> None:
        """The epoch's loss so far on this rank: its sum over images, and their number."""
        device = self.process.device
        dtype = torch.float32 if device.type == 'mps' else torch.float64
        self.loss_sum = torch.tensor(values, device=device, dtype=dtype)

    def evaluates_ema(self) -> bool:
        """Whether the moving average is where the model is, and evaluated."""
        return self.args.model_ema and not self.args.model_ema_force_cpu

    @property
    def folder(self) -> str:
        """Where the run writes."""
        return self.saver.folder

    # State

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs, in timm's checkpoint format; every rank must call it."""
        self.arrivals.flush()
        losses = [self.loss_sum.tolist()] * self.process.world_size
        if self.process.world_size > 1:
            dist.all_gather_object(losses, losses[0])
        state = {
            'epoch': self.epoch - 1,
            'arch': self.args.model,
            'args': dict(vars(self.args)),
            **({'registered': self.registered} if self.registered else {}),
            'optimizer': self.optimizer.state_dict(),
            'version': 2,
            **self.task.get_checkpoint_state(),
            **(self.task.get_checkpoint_state(ema=True) if self.task.has_ema() else {}),
            'progress': {
                'epoch': self.epoch, 'step': self.step, 'loss': losses, 'nonfinite': self.nonfinite,
                'skipped': self.skipped, 'batch': [self.args.batch_size, self.process.world_size],
                'steps': self._steps, 'seconds': self.clock.seconds(), 'eval_batch': self.eval_batch,
                'rate': self.last_rate,
            },
            'history': self.rows,
            'class_names': self.train_data.classes,
            'data_config': {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in self.eval_data.data_config.items()
            },
            'provenance': self.provenance,
            **({'held_out': self.eval_data.bounds} if self.args.val_fraction else {}),
        }  # fmt: skip
        if self.scaler.is_enabled():
            state['amp_scaler'] = self.scaler.state_dict()
        if self.step == 0 and self.rows and self.rows[-1].get(self.metric) is not None:
            state['metric'] = self.rows[-1][self.metric]
        return state

    def resume(self, path: str, content: dict[str, Any]) -> None:
        """Go on from what a checkpoint of ours holds, at the very batch, or from the epoch after one of timm's."""
        if 'state_dict' not in content:
            raise UserError(f'{path} is no training checkpoint: start from it with --initial-checkpoint')
        checkpoint.check_masking(content.get('args'), self.args, path)
        checkpoint.check_classes(class_names_in(content, path), self.train_data.classes, path)
        checkpoint.check_held_out(content.get('args'), self.args, path)
        with explain(f'checkpoint {path} does not fit this run'):
            weights = select_weights(content)
            check_fit(weights, unwrap_model(self.task.get_eval_model()).state_dict(), f'checkpoint {path}')
            self.task.load_checkpoint_state(weights, content.get('task_state'))
            if self.task.has_ema():
                kept = has_average(content)  # else the average starts at the trained weights
                average, state = select_weights(content, use_ema=kept), f'task_state{"_ema" if kept else ""}'
                self.task.load_checkpoint_state(average, content.get(state), ema=True)
            self.rows = history_of(content, path, self.metric)
            self.epoch, self.step = progress_of(content, path)
            if self.args.start_epoch is not None:
                self.epoch, self.step = self.args.start_epoch, 0
            self.rows = [row for row in self.rows if row['epoch'] < self.epoch]  # the others come again
            if self.args.sched == 'plateau':  # the one schedule that is a function of the metrics so far
                for row in self.rows:
                    self._schedule(row['epoch'] + 1, row.get(self.metric))
            if not self.args.no_resume_opt:
                checkpoint.load_optimizer(self.optimizer, self.args, content, path)
                if self.scaler.is_enabled() and 'amp_scaler' in content:
                    self.scaler.load_state_dict(content['amp_scaler'])
        progress = content.get('progress', {})
        if self.step:
            size, world = progress['batch']
            if [size, world] != [self.args.batch_size, self.process.world_size]:
                raise UserError(
                    f'{path} is from the middle of an epoch: resume it with --batch-size {size} on {world} ranks'
                )
            checkpoint.check_order(content.get('args'), self.args, path)
            batches, accum = progress.get('steps', self._steps)
            if [batches, accum] != self._steps:
                raise UserError(
                    f'{path} is from the middle of an epoch: resume it with the same data, {batches} batches an epoch '
                    f'(not {self.batches}), and --grad-accum-steps {accum}'
                )
            self._reset_loss(progress['loss'][self.process.rank])
        self.nonfinite, self.skipped = progress.get('nonfinite', 0), progress.get('skipped', 0)
        self.last_rate = rate_of(content, path, self.last_rate)
        self.clock.before = seconds_of(content, path)
        if self.args.validation_batch_size == AUTO and (size := eval_batch_of(content, path)):
            self.eval_batch = size  # another one would round the sums otherwise
            self.eval_data.rebatch(size)
        self.progress.say(f'resumed from {path}: epoch {self.epoch}, step {self.step}')
        if remark := checkpoint.other_images(content, self.args, self.eval_data.data_config):
            self.progress.say(remark)
        before, now = held_out_of(content, self.args, path), self.eval_data.bounds
        if any(now.get(name, bound) > bound for name, bound in before.items()):
            self.progress.say(
                f'{path} held out of other images than these: some that are evaluated from now on it was trained on'
            )

    def _update_number(self, ahead: int = 0) -> int:
        return self.epoch * self.updates + -(-(self.step + ahead) // self.args.grad_accum_steps)

    def _schedule(self, epoch: int, metric: float | None) -> None:
        if self.scheduler is not None:
            self.scheduler.step(epoch, metric)

    def _learning_rate(self) -> float:
        """The learning rate that --lr names, before layers have their shares of it."""
        group = max(self.optimizer.param_groups, key=lambda group: group.get('lr_scale', 1.0))
        return group['lr'] / (group.get('lr_scale', 1.0) or 1.0)

    @property
    def _steps(self) -> list[int]:
        return [self.batches, self.args.grad_accum_steps]

    # Training

    def run(self) -> None:
        """Train to the end, early stop or a signal."""
        if self.scheduler is not None and self.args.sched != 'plateau':
            if self.epoch:  # no schedule is asked for epoch 0 or update 0: some would not say what a run begins with
                self.scheduler.step(self.epoch)
            if self._update_number():
                self.scheduler.step_update(self._update_number())
        if self.primary:
            log.write_history(self.folder, self.rows)
        if self.trackers:
            self.trackers.start(self.folder, self.epoch, self.epoch * self.batches + self.step)
        self.clock.go_on(self.clock.before)
        try:
            with catch_signals() as self.signals, self.progress:
                while not self.finished():
                    self._train_epoch()
                    self._finish_epoch()
                    self.task.end_epoch(self)
                    if self.hooks.callback:
                        self.hooks.callback(self)
                if self.epoch < self.epochs:
                    since = self._since_best()
                    self.progress.say(f'early stop: no better {self.args.eval_metric} in {since} evaluations')
        finally:
            if self.trackers:
                self.trackers.close()

    def finished(self) -> bool:
        """Whether all epochs are done, or the last --early-stop-patience evaluations brought nothing better."""
        patience = self.args.early_stop_patience
        return self.epoch >= self.epochs or bool(patience and self._since_best() >= patience)

    def _since_best(self) -> int:
        """Evaluations since the best one."""
        best, since = float('-inf'), 0
        for row in self.rows:
            if row.get(self.metric) is not None:
                value = -row[self.metric] if self.decreasing else row[self.metric]
                best, since = (value, 0) if value > best + self.args.early_stop_min_delta else (best, since + 1)
        return since

    def _train_epoch(self) -> None:
        """The rest of this epoch, from `self.step` on; nothing where only its evaluation is left."""
        args, accum = self.args, self.args.grad_accum_steps
        if self.step == self.batches:
            return
        self.task.train()
        self.update.clear()
        finite = torch.ones((), dtype=torch.bool, device=self.process.device)
        speed = log.Speed(self.process, (self.epochs - self.epoch) * self.batches - self.step)
        self.progress.wait_for(self.train_data.awaited)
        for batch in self.train_data.unfinished(self.epoch, self.step):
            if not speed.step:
                self._first(batch)
            last = self.step + 1 == self.batches
            group = min(accum, self.batches - self.step // accum * accum)
            update = last or (self.step + 1) % accum == 0
            prepared = self._prepared(batch)
            if self.recorded:
                number = self._update_number(ahead=1)
                loss, flags = self.recorded(prepared, number, bool(self.signals), finite, group, update)
            else:
                loss = self._forward_backward(prepared, group, update)
            known = torch.isfinite(loss)
            finite &= known
            self.loss_sum += torch.stack([loss.nan_to_num(0, 0, 0), known]) * len(batch.targets)
            speed.update(len(batch.images))
            self.progress.wait_for('') if speed.step == 1 else None
            self.step += 1
            if self.trackers and self.step % args.log_interval == 0:
                place = self.epoch * self.batches + self.step
                rate = self._learning_rate()
                self.arrivals.send(loss, functools.partial(self.trackers.step, place, rate, speed))
            if self.primary and (last or self.progress.due(self.step)):
                say = self.progress.say if last or self.progress.stays else self.progress.show
                rate = self._learning_rate()
                self.arrivals.send(loss, functools.partial(self._show, say, self.step, rate, speed))
                if args.save_images and (last or self.progress.stays):
                    self._save_images(self.train_data.finish(batch).images)
            if update:
                number = self._update_number()
                flags = flags if self.recorded else self.update(finite, number, bool(self.signals))
                self.arrivals.send(flags, functools.partial(self._settle, self.epoch, self.step))
                finite.fill_(True)
                if args.synchronize_step and self.process.device.type == 'cuda':
                    torch.cuda.synchronize()
                self.last_rate = self._learning_rate()
                if self.scheduler is not None:
                    self.scheduler.step_update(number)
            self.arrivals.advance()
            every = args.recovery_interval
            due = every and self.step // every > (self.step - group) // every
            if update and not last and (due or self.stopping):
                self._save_recovery()
        if self.step < self.batches:
            self.progress.say(
                f'epoch {self.epoch} had {self.step} steps, not {self.batches}: the data has fewer samples than it '
                'says (--train-num-samples)'
            )
        if self.process.world_size > 1 and args.dist_bn:
            distribute_bn(self.task.get_trainable_module(), self.process.world_size, args.dist_bn == 'reduce')
            if self.evaluates_ema():  # rank 0's, as in a checkpoint, so that a resumed run has no other
                distribute_bn(self.task.get_trainable_module(ema=True), self.process.world_size)
        self.arrivals.flush()
        self.rate = round(speed.rate(), 1)
        if self.stopping:
            self._save_recovery()
        self.train_data.unreadable.share(self.process.world_size)

    def _first(self, batch: Batch) -> None:
        """Before the first step of an epoch: say what it waits for, and show the run's first batch."""
        if self.epoch + self.step == 0 and self.trackers:
            self.trackers.first_batch(self.train_data.finish(batch).images)
        compiles = self.args.torchcompile or self.process.device.type == 'cuda'
        self.progress.wait_for(f'the first step{", which compiles" if compiles else ""}')

    def _prepared(self, batch: Batch) -> Batch:
        """Draw for the batch, and let all that is random in it and in the step depend on the step."""
        seed_everything(self.args.seed, self.epoch, self.step, self.process.rank, device=True)
        usual = type(self.task).prepare is Task.prepare
        return self.task.prepare(batch if usual else self.train_data.finish(batch), self.epoch)

    def _forward_backward(self, batch: Batch, group: int | torch.Tensor = 1, sync: bool = True) -> torch.Tensor:
        """Augment and mix one prepared batch, accumulate its gradient and return its loss."""
        batch = self.task.mixed(self.train_data.finish(batch))
        with contextlib.nullcontext() if sync else self.task.no_sync():
            with self.process.autocast():
                loss = self.task.training_loss(batch)
            self.scaler.scale(loss / group).backward()
        return loss.detach()

    def _settle(self, epoch: int, step: int, flags: list[float]) -> None:
        """Count what became of an update, when the host knows it."""
        skipped, stop = flags
        self.stopping = self.stopping or bool(stop)
        if not skipped:
            self.nonfinite = 0
            return
        self.nonfinite, self.skipped = self.nonfinite + 1, self.skipped + 1
        self.progress.say(f'epoch {epoch}, step {step}: loss or gradient is not finite, update skipped')
        if self.nonfinite >= self.args.max_nonfinite:
            raise TrainingStopped(
                f'{self.nonfinite} updates in a row had a non-finite loss or gradient: lower --lr, add --clip-grad 1 '
                'or --warmup-epochs, or use --amp-dtype bfloat16'
            )

    def _show(self, say: Callable[[str], None], step: int, rate: float, speed: log.Speed, loss: float) -> None:
        memory = log.peak_memory(self.process.device)
        say(f'epoch {self.epoch} [{step}/{self.batches}]  loss {loss:.4f}  lr {rate:.3g}  {speed}  memory {memory}')

    def _save_images(self, images: torch.Tensor) -> None:
        from torchvision.utils import save_image

        shown = images[:, : 3 if images.shape[1] >= 3 else 1]  # what JPEG has
        save_image(shown.float(), os.path.join(self.folder, f'train-batch-{self.step}.jpg'), normalize=True)

    def _save_recovery(self) -> None:
        """Save the state inside an epoch, and end the run if it is to stop."""
        state = self.state()
        path = self.saver.save_recovery(state) if self.primary else 'by rank 0'
        if self.stopping:
            if self.process.world_size > 1:
                dist.barrier()  # nobody may leave, and be missed, while rank 0 writes
            raise Preempted(f'stopped by a signal; saved {path}; go on with --resume', self.folder)

    def _finish_epoch(self) -> None:
        """Evaluate, step the schedule, write checkpoint and log."""
        args, total = self.args, self.loss_sum.clone()
        if self.process.world_size > 1:
            dist.all_reduce(total)
        mean = float(total[0] / total[1])  # not a number where no loss was finite
        row: dict[str, Any] = {'epoch': self.epoch, 'train_loss': mean}
        if (self.epoch + 1) % args.val_interval == 0 or self.epoch + 1 == self.epochs:
            try:
                row.update(self._evaluate('eval'))
                if self.evaluates_ema():
                    row.update(self._evaluate('ema'))
            except Preempted:
                self.stopping = True
                self._save_recovery()
        row['lr'] = self.last_rate
        row['skipped'] = self.skipped
        row['time'], row['images_per_second'] = self.clock.seconds(), self.rate
        self.rows.append(row)
        self._schedule(self.epoch + 1, row.get(self.metric))
        self.epoch, self.step = self.epoch + 1, 0
        self._reset_loss()
        state = self.state()
        if self.primary:
            self.saver.save_epoch(state)
            log.write_history(self.folder, self.rows)
        if self.trackers:
            self.trackers.log(row)

    def _evaluate(self, prefix: str) -> dict[str, Any]:
        """The columns of the log for the trained weights (eval) or their average (ema)."""
        if self.args.validation_batch_size == AUTO and not self.eval_batch:
            self.eval_batch = fit_batch(self.task, self.eval_data, self.process, self.progress)
        watch = Watch(self.progress, log.Speed(self.process, len(self.eval_data)), self.signals)
        result = evaluate(self.task, self.eval_data, self.process, prefix == 'ema', self.hooks.metrics, watch=watch)
        count = result.pop('count')
        names = [name for name in result if name != 'loss']
        self.progress.say(
            f'epoch {self.epoch} {prefix}: {self.task.describe(result, [*names, "loss"])}  ({count} images)'
        )
        return {f'{prefix}_{name}': value for name, value in result.items()}
