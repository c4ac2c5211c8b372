"""Command lines of the smaller programs, in one place so that they are read without what the programs import."""

import argparse
import os
from collections.abc import Sequence

from ..errors import UserError, called
from .parser import Parser
from .programs import train_settings


def doctor_parser() -> Parser:
    """The command line of `vim_timm.doctor`."""
    parser = Parser('doctor', description='What this machine can run, and why not: versions, devices, backends.')
    parser.add_argument('--weights', action='store_true', help='check the SHA-256 of published weights instead')
    return parser


def doctor(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments of `vim_timm.doctor`."""
    return doctor_parser().parse_args(argv)


def convert_parser() -> Parser:
    """The command line of `vim_timm.hub.convert`."""
    parser = Parser('convert', description='Rewrite a checkpoint of the original code (hustvl/Vim) as safetensors.')
    parser.add_argument('source', metavar='IN.pth', help='checkpoint of the original code')
    parser.add_argument('destination', metavar='OUT.safetensors')
    parser.add_argument('--model', default='', metavar='NAME', help='architecture (default: told by the file)')
    parser.add_argument('--use-ema', action='store_true', help='take the EMA weights')
    parser.add_argument('--sha256', default='', metavar='HEX', help="what IN.pth's SHA-256 has to be")
    return parser


def convert(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments of `vim_timm.hub.convert`."""
    args = convert_parser().parse_args(argv)
    if not args.destination.endswith('.safetensors'):
        raise UserError(f'{args.destination} must end in .safetensors')
    return args


def publish_parser() -> Parser:
    """The command line of `vim_timm.hub.publish`."""
    parser = Parser('publish', description='Write a trained model into a folder, and upload it to the Hub.')
    add = parser.add_argument
    add('checkpoint', nargs='?', help='training checkpoint, file of weights, or a folder that was written before')
    add('--repo-id', default='', metavar='ORG/NAME', help='repository on the Hub; with --all its owner')
    add('--dry-run', action='store_true', help='write the folder and stop')
    add('--output', default='', metavar='FOLDER', help='the folder (default: output/publish/NAME)')
    add('--private', action='store_true', help='make a new repository private')
    add('--use-ema', action='store_true', help='take the moving average in the checkpoint')
    add('--half', action='store_true', help='round the weights to float16')
    add('--model', default='', metavar='NAME', help='the model, where the file does not say')
    add('--license', default='apache-2.0', metavar='NAME', help="the weights' licence (default: %(default)s)")
    add('--data-dir', default='', metavar='DIR', help='where the evaluation finds the data now')
    add('--data-name', default='', metavar='NAME', help='what the card calls the data (default: by --dataset)')
    add('--results', default='', metavar='FILE', help='a result of validate.py in place of an evaluation')
    add('--no-evaluate', action='store_true', help='publish without an accuracy')
    add('--all', action='store_true', help="upload every weight that comes with the package to --repo-id's owner")
    add('--embed', default='', metavar='NAME.TAG', help='write the weight of this configuration into the package')
    return parser


def publish(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments of `vim_timm.hub.publish`."""
    args = publish_parser().parse_args(argv)
    if not (args.all or args.checkpoint):
        raise UserError('name a checkpoint, or say --all')
    owner, _, name = args.repo_id.partition('/')
    if not (args.all or args.embed or args.dry_run or (owner and name)):
        raise UserError('name the repository: --repo-id ORG/NAME, or write the folder only: --dry-run')
    return args


def compare_parser() -> Parser:
    """The command line of `vim_timm.compare`."""
    parser = Parser(
        'compare',
        description='Compare runs of training on one page: best numbers, curves over each other, settings that differ.',
    )
    parser.add_argument('runs', nargs='+', metavar='FOLDER', help='folder of a run, with its summary.csv and args.yaml')
    parser.add_argument(
        '--output', '-o', default='compare.html', metavar='FILE', help='the page (default: %(default)s)'
    )
    return parser


def compare(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments of `vim_timm.compare`."""
    args = compare_parser().parse_args(argv)
    if len(args.runs) < 2:
        raise UserError('name two runs or more to compare')
    folder = os.path.dirname(args.output)
    if folder and not os.path.isdir(folder):
        raise UserError(f'--output {args.output}: there is no such folder')
    return args


def data_parser() -> Parser:
    """The command line of `vim_timm.data`, without the flags of train.py."""
    parser = Parser(
        'data',
        f'{called("data")} [FOLDER] [--page FILE] [flags of train.py]',
        'Look at a data set before training: one page with counts, sizes, files that are no data, a picture a class, '
        'near-duplicates between the splits, and the first training batch as the model will see it.',
    )
    parser.add_argument('--page', default='data.html', metavar='FILE', help='the page (default: %(default)s)')
    return parser


def data(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments of `vim_timm.data`: its own, and as `settings` those of train.py."""
    args, rest = data_parser().parse_known_args(argv)
    folder = os.path.dirname(args.page)
    if folder and not os.path.isdir(folder):
        raise UserError(f'--page {args.page}: there is no such folder')
    args.settings = train_settings(rest)
    return args
