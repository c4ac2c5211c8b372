"""Settings that nobody chose and that follow from others, where timm's default would not serve."""

from ..errors import UserError
from .flags import TRAIN
from .parse import Settings

# settings that say how something is done, by those of which one turns it on
SUBORDINATE = {
    ('model_ema',): ('model_ema_decay', 'model_ema_warmup', 'model_ema_force_cpu'),
    ('mixup', 'cutmix', 'cutmix_minmax'): ('mixup_prob', 'mixup_switch_prob', 'mixup_mode', 'mixup_off_epoch'),
    ('bce_loss', 'loss'): ('bce_sum', 'bce_target_thresh', 'bce_pos_weight'),
    ('reprob',): ('remode', 'recount'),
    ('early_stop_patience',): ('early_stop_min_delta',),
    ('kd_model_name',): (
        'kd_distill_type', 'kd_loss_type', 'distill_loss_weight', 'task_loss_weight', 'kd_temperature',
        'kd_student_feature_dim', 'kd_teacher_feature_dim', 'kd_token_distill_type',
    ),
}  # fmt: skip

# of timm's create_scheduler_v2 without --decay-epochs: epochs of a step, and the share of them for which wsd and rsqrt
# decay
_STEP_EPOCHS, _DECAY_SHARE = 90, 0.2


def _flag(name: str) -> str:
    return f'--{name.replace("_", "-")}'


def idle_settings(args: Settings) -> list[str]:
    """A remark for each thing that is off although somebody chose how it is done."""
    defaults = {row[0].split()[0]: row[2] for rows in TRAIN.values() for row in rows}
    remarks = []
    for switches, details in SUBORDINATE.items():
        chosen = [_flag(name) for name in details if getattr(args, name) != defaults[_flag(name)]]
        if chosen and not any(getattr(args, name) for name in switches):
            needed = ' or '.join(map(_flag, switches))
            remarks.append(f'{", ".join(chosen)}: nothing follows from it without {needed}')
    return remarks


def with_model(args: Settings) -> Settings:
    """The settings with a model of ours, where none was named: timm's default is a ResNet-50."""
    if 'model' in args.chosen:
        return args
    side = max([args.img_size or 0, *(args.input_size or [])[1:]])
    return args.replace(model='vim_tiny_patch4_32' if 0 < side <= 64 else 'vim_tiny_patch16_224')


def with_warmup(args: Settings) -> tuple[Settings, str]:
    """The settings with a warm-up of a fifth of the epochs at most, where nobody chose one, and what is to be said."""
    share = args.epochs // 5
    if args.warmup_epochs <= share or args.warmup_prefix or args.sched == 'none':
        return args, ''
    if 'warmup_epochs' not in args.chosen:
        warm = f'{share or "no"} epoch{"" if share == 1 else "s"} of warm-up, not {args.warmup_epochs}'
        said = f'{warm}, for there {"is" if args.epochs == 1 else "are"} {args.epochs} in all'
        return args.replace(warmup_epochs=share), f'{said} (--warmup-epochs sets it)'
    if args.warmup_epochs < args.epochs or args.cooldown_epochs or args.lr_cycle_limit > 1:  # with those there are more
        return args, ''
    return args, f'the warm-up of {args.warmup_epochs} epochs does not end: there are {args.epochs} in all'


def undecayed(args: Settings) -> str:
    """A remark where the schedule's decay, as timm reads the settings, falls behind the last epoch; else ''.

    Raises:
        UserError: the schedule cannot be: wsd's decay has no place in the epochs, or rsqrt's has no time scale.
    """
    if args.sched in ('step', 'multistep'):
        flag = '--decay-epochs' if args.sched == 'step' else '--decay-milestones'
        first = (
            (args.decay_epochs or _STEP_EPOCHS)
            if args.sched == 'step'
            else min(args.decay_milestones, default=args.epochs)
        )
        late = first >= args.epochs if args.sched_on_updates else first > args.epochs - 1  # the rate of its start
        return f'the learning rate does not decay in {args.epochs} epochs: {flag} is {first:g}' if late else ''
    if args.sched not in ('wsd', 'rsqrt'):
        return ''
    epochs = args.epochs if args.warmup_prefix else args.epochs - args.warmup_epochs
    decay = args.decay_epochs or _DECAY_SHARE
    decay = decay * epochs if decay < 1 else decay
    steps = decay if args.sched_on_updates else round(decay)
    if epochs < 1:
        raise UserError(f'--sched {args.sched} has no epoch after the warm-up: fewer --warmup-epochs')
    if steps > epochs:
        raise UserError(f'--sched {args.sched}: --decay-epochs {decay:g} is more than the {epochs} after the warm-up')
    if args.sched == 'rsqrt' and not args.warmup_epochs:
        raise UserError('--sched rsqrt takes its time scale from the warm-up: give --warmup-epochs 1 or more')
    if not steps:
        raise UserError(
            f'--sched {args.sched} decays over {decay:g} epochs, which is none: --decay-epochs 1 or more, or '
            '--sched-on-updates'
        )
    if steps > 1 or args.sched_on_updates or args.cooldown_epochs:
        return ''
    return (
        f'the decay of --sched {args.sched} begins with the last epoch, whose rate is still the one before it: '
        '--sched-on-updates, more --decay-epochs, or --cooldown-epochs 1'
    )
