"""Export a model: `python -m vim_timm.export --model NAME | --checkpoint FILE --output FILE.onnx|FILE.pt2`."""

import argparse
import os
import sys
from collections.abc import Sequence

from .errors import UserError, run
from .settings.parser import PUBLISHED, Parser, check_average

PROGRAM = 'export'
ENDINGS = ('.onnx', '.pt2')


def parser() -> argparse.ArgumentParser:
    result = Parser(PROGRAM, description=__doc__, elsewhere=PUBLISHED)
    add = result.add_argument
    add('--model', '-m', default='', metavar='NAME', help='published weights of this model')
    add('--checkpoint', default='', metavar='FILE', help='training checkpoint, or a file of weights')
    add('--use-ema', action='store_true', help='take the moving average in the checkpoint')
    add('--output', '-o', required=True, metavar='FILE', help='.onnx for ONNX, .pt2 for torch.export')
    add('--batch-size', '-b', type=int, default=0, metavar='N', help='images at once (default: any number)')
    add('--opset', type=int, metavar='N', help="version of ONNX's operators (default: torch's)")
    return result


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot be meant, before anything is loaded."""
    if not args.output.endswith(ENDINGS):
        raise UserError(f'--output {args.output} must end in {" or ".join(ENDINGS)}')
    if not os.path.isdir(os.path.dirname(args.output) or '.'):
        raise UserError(f'--output {args.output}: there is no such folder')
    if not (args.model or args.checkpoint):
        raise UserError('name the weights: --model NAME or --checkpoint FILE')
    check_average(args)


def read(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments of a command line, checked."""
    args = parser().parse_args(argv)
    check(args)
    return args


def export(args: argparse.Namespace) -> None:
    """Write the file, compare it with the model, and say how much they differ."""
    import vim_timm  # noqa: F401  registers the models

    from .engine.graphs import export_onnx, export_torch
    from .engine.saved import open_published, open_saved

    if args.checkpoint:
        saved = open_saved(args.checkpoint, args.model, args.use_ema)
    else:
        saved = open_published(args.model)
    if args.output.endswith('.onnx'):
        difference = export_onnx(saved, args.output, args.batch_size, args.opset)
    else:
        difference = export_torch(saved, args.output, args.batch_size)
    size = os.path.getsize(args.output)
    print(f'{args.output}: {size / 1e6:.1f} MB, logits within {difference:.1e} of the model, relative to the largest')


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""

    def body(words: Sequence[str]) -> None:
        args = read(words)
        export(args)

    return run(body, PROGRAM, argv)


if __name__ == '__main__':
    sys.exit(main())
