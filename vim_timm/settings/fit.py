"""Settings that nobody chose and that follow from others, where timm's default would not serve."""

from .parse import Settings


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
    if args.warmup_epochs < args.epochs:
        return args, ''
    return args, f'the warm-up of {args.warmup_epochs} epochs does not end: there are {args.epochs} in all'
