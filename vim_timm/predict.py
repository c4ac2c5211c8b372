"""Classify images: `python -m vim_timm.predict IMAGE|FOLDER|GLOB... --model NAME | --checkpoint FILE | --onnx FILE`."""

from __future__ import annotations

import argparse
import glob
import os
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .errors import UserError, explain, run
from .settings.parser import PUBLISHED, Parser, check_average

if TYPE_CHECKING:
    from .engine.predict import Prediction, Predictor

PROGRAM = 'predict'
ENDINGS = ('.json', '.csv', '.html')


def predictor(
    model: str = '', checkpoint: str = '', onnx: str = '', use_ema: bool = False, device: str = '', **options: Any
) -> Predictor:
    """A `Predictor` of published weights, of a checkpoint or of an exported model.

    Args:
        model: a registered name, `hf-hub:ORG/NAME` or `local-dir:FOLDER`; with `checkpoint`, the model it is of.
        checkpoint: a training checkpoint, a file of weights, or a folder that was saved for the Hub.
        onnx: a file written by `vim_timm.export`.
        use_ema: take the moving average in the checkpoint.
        device: where to compute; '' for a CUDA device where there is one.
        options: `top`, `batch_size`, `features`, `pictures`, `explain` of `Predictor`.

    Raises:
        UserError: none or several of the three, or it cannot be read.
    """
    import torch

    import vim_timm  # noqa: F401  registers the models

    from .engine.predict import Predictor
    from .engine.saved import open_published, open_saved

    if bool(onnx) == bool(model or checkpoint):
        raise UserError('name the weights: --model NAME, --checkpoint FILE or --onnx FILE')
    if onnx:
        from .engine.graphs import open_onnx

        saved, session = open_onnx(onnx)
        classes = saved.record.get('num_classes', True)  # older files do not say
    else:
        saved = open_saved(checkpoint, model, use_ema) if checkpoint else open_published(model)
        classes, session = saved.model.num_classes, None
    if not classes:
        raise UserError(
            f'{onnx or checkpoint or model} is an encoder without a classifier, which knows no classes: fine-tune it '
            'first (train.py --pretrained --pretrained-path FILE)'
        )
    if session:
        return Predictor(saved, session, **options)
    device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    with explain(f'--device {device}'):
        return Predictor(saved, device=device, **options)


def parser() -> argparse.ArgumentParser:
    result = Parser(PROGRAM, description=__doc__, elsewhere=PUBLISHED)
    add = result.add_argument
    add('inputs', nargs='+', metavar='IMAGE', help='image, folder (with those in it), or pattern such as "*.jpg"')
    weights = result.add_argument_group('weights')
    weights.add_argument('--model', '-m', default='', metavar='NAME', help='published weights of this model')
    weights.add_argument('--checkpoint', default='', metavar='FILE', help='training checkpoint, or a file of weights')
    weights.add_argument('--onnx', default='', metavar='FILE', help='a model that vim_timm.export wrote')
    weights.add_argument('--use-ema', action='store_true', help='take the moving average in the checkpoint')
    add('--top', type=int, default=5, metavar='K', help='classes to name (default: %(default)s)')
    add('--output', '-o', default='', metavar='FILE', help='write predictions as .json, .csv or .html (contact sheet)')
    features = "write the model's pooled features to this .npy file, a row a picture (NaN where it could not be read)"
    add('--features', default='', metavar='FILE', help=features)
    looks = 'show where the model looks: in --output X.html, or as pictures in FOLDER'
    add('--explain', nargs='?', const='.', metavar='FOLDER', help=looks)
    add('--batch-size', '-b', type=int, default=32, metavar='N', help='images at once (default: %(default)s)')
    add('--device', default='', metavar='X', help='where to compute (default: cuda where there is one, else cpu)')
    return result


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot be meant, before anything is loaded."""
    if sum(map(bool, (args.checkpoint or args.model, args.onnx))) != 1:
        raise UserError('name the weights: --model NAME, --checkpoint FILE or --onnx FILE')
    check_average(args)
    if args.top < 1 or args.batch_size < 1:
        raise UserError('--top and --batch-size must be at least 1')
    if args.output and not args.output.endswith(ENDINGS):
        raise UserError(f'--output {args.output} must end in {", ".join(ENDINGS)}')
    if args.features and not args.features.endswith('.npy'):
        raise UserError(f'--features {args.features} must end in .npy')
    if args.explain == '.' and not args.output.endswith('.html'):
        raise UserError('--explain needs a place for its pictures: --explain FOLDER, or --output FILE.html')
    if args.onnx and (args.explain or args.features):
        raise UserError('--explain and --features look inside the model, which an ONNX file does not show')
    for name in ('output', 'features'):
        folder = os.path.dirname(getattr(args, name))
        if folder and not os.path.isdir(folder):
            raise UserError(f'--{name} {getattr(args, name)}: there is no such folder')
    for word in args.inputs:
        if not os.path.exists(word) and not glob.has_magic(word):
            raise UserError(f'there is no image {word}')


def read(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments of a command line, checked."""
    args = parser().parse_args(argv)
    check(args)
    return args


def predict(args: argparse.Namespace) -> list[Prediction]:
    """Classify what `args` name, print a line a picture, write the files that were asked for."""
    from tqdm import tqdm

    from .engine.explain import integrated_gradients
    from .engine.predict import image_files

    files = image_files(args.inputs)
    classify = predictor(
        args.model, args.checkpoint, args.onnx, args.use_ema, args.device, top=args.top, batch_size=args.batch_size,
        features=bool(args.features), pictures=args.output.endswith('.html') or args.explain is not None,
        explain=integrated_gradients if args.explain is not None else None,
    )  # fmt: skip
    found, width = [], min(48, max(map(len, files)))
    from .report.predictions import line

    terminal = sys.stdout.isatty()
    columns = shutil.get_terminal_size().columns
    with tqdm(total=len(files), unit='img', disable=not sys.stderr.isatty() or len(files) <= 1) as bar:
        for prediction in classify(files):
            text = line(prediction, width)
            tqdm.write(text[:columns] if terminal else text)
            found.append(prediction)
            bar.update()
    write(args, found)
    return found


def write(args: argparse.Namespace, found: Sequence[Prediction]) -> None:
    """Write --output, --features and --explain's pictures."""
    import io

    import numpy as np

    from .files import write_atomically
    from .report import predictions as report

    if args.explain and args.explain != '.':
        with explain(f'--explain {args.explain}'):
            os.makedirs(args.explain, exist_ok=True)
            for place, one in enumerate(found):
                if one.seen is not None and one.heat is not None:
                    stem = os.path.splitext(os.path.basename(one.file))[0]
                    report.overlay(one.seen, one.heat).save(os.path.join(args.explain, f'{place:04}-{stem}.png'))
    if args.features:
        width = max((one.features.size for one in found if one.features is not None), default=0)
        unread, file = np.full(width, np.nan, np.float32), io.BytesIO()
        np.save(file, np.stack([unread if one.features is None else one.features for one in found]))
        write_atomically(args.features, file.getvalue())
    if args.output.endswith('.json'):
        write_atomically(args.output, report.as_json(found))
    elif args.output.endswith('.csv'):
        write_atomically(args.output, report.as_csv(found))
    elif args.output:
        title = f'Predictions of {args.checkpoint or args.model or args.onnx}'
        write_atomically(args.output, report.contact_sheet(title, found))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""

    def body(words: Sequence[str]) -> None:
        args = read(words)
        found = predict(args)
        unread = [one for one in found if one.error]
        if unread and len(unread) == len(found):
            raise UserError('no image could be read')
        if unread:
            print(f'{len(unread)} of {len(found)} files could not be read', file=sys.stderr)

    return run(body, PROGRAM, argv)


if __name__ == '__main__':
    sys.exit(main())
