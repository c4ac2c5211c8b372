"""A run's checkpoints, in timm's format: which there are, and which of them a model or a resumed run takes."""

import contextlib
import glob
import itertools
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ..errors import UserError, explain, shown
from ..files import duplicate, write_atomically
from ..models.checkpoint import read_checkpoint
from ..models.load import load_content
from .record import progress_of

EXTENSION = '.pth.tar'
GROUPING = ('weight_decay', 'layer_decay', 'layer_decay_no_opt_scale', 'linear_probe')  # settings that group parameters


def load_weights(model: torch.nn.Module, path: str, use_ema: bool | None = False) -> None:
    """Load a training checkpoint, a state dict or a safetensors file strictly into a model.

    Args:
        use_ema: take the moving average; None: where timm does.

    Raises:
        UserError: the file cannot be read, has no such weights, or those of another model.
    """
    content = read_checkpoint(path)
    with explain(f'checkpoint {path}'):
        load_content(model, content, use_ema, f'checkpoint {path}')


def check_classes(saved: list[str], here: list[str], path: str) -> None:
    """Refuse to go on with other classes than those of the checkpoint: its outputs would change their meaning."""
    for number, (theirs, ours) in enumerate(itertools.zip_longest(saved, here, fillvalue='')):
        if saved and here and theirs != ours:
            raise UserError(
                f'{path} was trained on other classes: number {number} is {theirs!r} there and {ours!r} in this data; '
                'start from its weights with --pretrained --pretrained-path'
            )


def check_held_out(saved: Any, args: Any, path: str) -> None:
    """Refuse to evaluate on images that the run has been trained on, since another share was held out before.

    Args:
        saved: settings in the checkpoint of `path`.
        args: settings of this run.
    """
    if not isinstance(saved, dict) or 'val_fraction' not in saved:
        return
    if not (saved['val_fraction'] or args.val_fraction):
        return
    for flag, theirs, ours in _changed(saved, args, ('val_fraction', 'seed', 'train_split')):
        raise UserError(
            f'{path} held out other images: {flag} was {theirs} there and is {ours} here, so that images it was '
            'trained on would be evaluated: give the same, or start from its weights with --pretrained '
            '--pretrained-path'
        )


def _changed(saved: dict[str, Any], args: Any, names: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """Flags that have another value than in a checkpoint's settings: name, value there, value here."""
    for name in names:
        theirs, ours = saved.get(name), getattr(args, name)
        if theirs != ours:
            yield f'--{name.replace("_", "-")}', shown(repr(theirs)), repr(ours)


def other_images(content: dict[str, Any], args: Any, data_config: dict[str, Any]) -> str:
    """A remark where a resumed run prepares its images otherwise than before, or evaluates another split; else ''."""
    saved, images = content.get('args'), content.get('data_config')
    if not isinstance(saved, dict) or not isinstance(images, dict):
        return ''
    names = ('dataset', 'val_split', 'input_img_mode', 'input_span')
    before = {**{name: saved.get(name) for name in names}, **images}
    now = {**{name: getattr(args, name) for name in names}, **data_config}
    found = [name for name in now if name in before and repr(_plain(before[name])) != repr(_plain(now[name]))]
    return f'other images than before ({", ".join(found)}): epochs of the log do not compare' if found else ''


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def check_masking(saved: Any, args: Any, path: str) -> None:
    """Refuse to go on with a masked autoencoder as a classifier, or the reverse, or with other losses than so far.

    Args:
        saved: settings in the checkpoint of `path`.
        args: settings of this run.
    """
    if not isinstance(saved, dict):
        return
    if 'mae' in saved and bool(saved['mae']) != args.mae:
        theirs, ours = ('masked pretraining', 'none') if saved['mae'] else ('a run without --mae', 'masked pretraining')
        raise UserError(
            f'{path} is of {theirs}, and this run is {ours}: start from its encoder with --pretrained --pretrained-path'
        )
    if not args.mae:
        return
    known = [name for name in ('mask_ratio', 'norm_pix_loss', 'mae_loss') if saved.get(name) is not None]
    for flag, theirs, ours in _changed(saved, args, known):
        raise UserError(
            f'{path} measured other losses: {flag} was {theirs} there and is {ours} here: give the same, or start from '
            'its weights with --pretrained --pretrained-path'
        )


def check_order(saved: Any, args: Any, path: str) -> None:
    """Refuse to go on inside an epoch whose images were drawn in another order: some would come twice, others never.

    Args:
        saved: settings in the checkpoint of `path`.
        args: settings of this run.
    """
    if not isinstance(saved, dict):
        return
    known = [name for name in ('seed', 'aug_repeats', 'epoch_repeats') if name in saved]
    for flag, theirs, _ in _changed(saved, args, known):
        raise UserError(f'{path} is from the middle of an epoch: resume it with {flag} {theirs}')


def load_optimizer(optimizer: torch.optim.Optimizer, args: Any, content: dict[str, Any], path: str) -> None:
    """Load an optimizer's state from a checkpoint; its learning rate, betas, ... stay those of this run.

    Args:
        args: settings of this run.

    Raises:
        UserError: the checkpoint of `path` is another optimizer's, or one of other groups of parameters.
    """
    before = content.get('args') or {}
    before = before if isinstance(before, dict) else vars(before)
    saved = before.get('opt')
    if isinstance(saved, str) and saved.lower() != args.opt.lower():
        raise UserError(
            f'{path} has the state of --opt {saved}, not of {args.opt}: --no-resume-opt takes its weights alone'
        )
    settings: list[dict[str, Any]] = [
        {key: value for key, value in group.items() if key != 'params' and not key.endswith('step')}  # those count
        for group in optimizer.param_groups
    ]
    saved = content['optimizer']
    both = (saved['param_groups'], optimizer.param_groups)
    theirs, ours = ([len(group['params']) for group in groups] for groups in both)
    if theirs != ours:
        known = [name for name in GROUPING if name in before]
        found = [f'{flag} was {there} there and is {here} here' for flag, there, here in _changed(before, args, known)]
        why = ', '.join(found) or ', '.join(f'--{name.replace("_", "-")}' for name in GROUPING) + ' change them'
        raise UserError(
            f'{path} has the state of other groups of parameters ({why}): give the same, or --no-resume-opt takes its '
            'weights alone'
        )
    groups = [{**there, **here} for there, here in zip(saved['param_groups'], settings)]
    optimizer.load_state_dict({**saved, 'param_groups': groups})
    inner = getattr(optimizer, '_base_optimizer', optimizer)  # of timm's Lookahead
    # torch gives numbers such as NAdam's mu_product the type of their parameter, in which they may lose bits
    for group, mine in zip(groups, optimizer.param_groups):
        for place, parameter in zip(group['params'], mine['params']):
            state = inner.state.get(parameter, {})
            for name, value in saved['state'].get(place, {}).items():
                if isinstance(value, torch.Tensor) and value.ndim == 0 < parameter.ndim and name in state:
                    state[name] = value.to(state[name].device, copy=True)


class Saver:
    """A run's checkpoints: last, model_best, the best `history`, every `every`-th epoch, and recovery in between.

    Which files there must be follows from the rows of the log and the folder, so that a resumed run has the same ones.
    """

    def __init__(self, folder: str, history: int, every: int, metric: str, decreasing: bool):
        self.folder, self.history, self.every = folder, max(1, history), every
        self.metric, self.sign = metric, (1 if decreasing else -1)

    def path(self, name: str) -> str:
        return os.path.join(self.folder, f'{name}{EXTENSION}')

    def recoveries(self) -> list[str]:
        return glob.glob(os.path.join(glob.escape(self.folder), f'recovery-*{EXTENSION}'))

    def newest(self) -> tuple[str, dict[str, Any]]:
        """The checkpoint that is furthest on and its content, or '' and {}."""
        newest: tuple[str, dict[str, Any]] = '', {}
        for path in (self.path('last'), *self.recoveries()):
            if os.path.isfile(path):
                content = read_checkpoint(path)
                if not newest[0] or progress_of(content, path) > progress_of(newest[1], newest[0]):
                    newest = path, content
        return newest

    def ranking(self, rows: list[dict[str, Any]]) -> list[int]:
        """Evaluated epochs, best first; the earlier one where they tie. Metrics that are not numbers do not count."""
        known = [(self.sign * row[self.metric], row['epoch']) for row in rows if row.get(self.metric) is not None]
        return [epoch for value, epoch in sorted(pair for pair in known if pair[0] == pair[0])]

    def kept(self, rows: list[dict[str, Any]]) -> list[int]:
        """`ranking` of the epochs that the folder has a file of: those before a run from elsewhere are not."""
        ranking, best = self.ranking(rows), self.path('model_best')
        there = [epoch for epoch in ranking if os.path.isfile(self.path(f'checkpoint-{epoch}'))]
        if there[:1] != ranking[:1] and os.path.isfile(best):  # the user may have deleted the best one's other name
            there.append(read_checkpoint(best, mmap=True)['epoch'])
        return [epoch for epoch in ranking if epoch in there]

    def save_epoch(self, state: dict[str, Any]) -> None:
        """Write the state at the end of an epoch, which its last row describes."""
        write_atomically(self.path('last'), lambda file: torch.save(state, file))
        self.tidy(state['history'])

    def tidy(self, rows: list[dict[str, Any]]) -> None:
        """Give `last` the further names that it deserves, and drop checkpoints that are no longer among the best."""
        epoch = rows[-1]['epoch']
        there = {epoch, *self.kept(rows[:-1])}
        kept = [known for known in self.ranking(rows) if known in there]
        if epoch in kept[: self.history]:
            duplicate(self.path('last'), self.path(f'checkpoint-{epoch}'))
        if kept and os.path.isfile(best := self.path(f'checkpoint-{kept[0]}')):
            duplicate(best, self.path('model_best'))
        if self.every and (epoch + 1) % self.every == 0:
            duplicate(self.path('last'), self.path(f'milestone-{epoch + 1}'))
        for path in [*(self.path(f'checkpoint-{dropped}') for dropped in kept[self.history :]), *self.recoveries()]:
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)

    def save_recovery(self, state: dict[str, Any]) -> str:
        """Write the state in the middle of an epoch; it takes the place of the recovery checkpoint before it."""
        path, before = self.path('recovery-{epoch}-{step}'.format(**state['progress'])), self.recoveries()
        write_atomically(path, lambda file: torch.save(state, file))
        for old in before:
            if old != path:
                os.remove(old)
        return path
