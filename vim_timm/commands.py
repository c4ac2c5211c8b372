"""The command lines: `vim-timm COMMAND ...`, `python -m vim_timm COMMAND ...`.

A line is read before the program is imported that runs it, and torch and timm with it: `--help`, a typing error and a
value that is refused are answered at once.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .errors import run
from .settings import parsers, programs

PROGRAM = 'vim-timm'


class Command(NamedTuple):
    """A command.

    Attributes:
        module: what has its `main(argv)`.
        read: reads and checks its command line without torch and timm; raises UserError.
        text: what it does.
    """

    module: str
    read: Callable[[Sequence[str]], object]
    text: str


def _train(argv: Sequence[str]) -> None:
    programs.check_data(programs.train_settings(argv))


def _validate(argv: Sequence[str]) -> None:
    args = programs.validate_settings(argv)
    if args.chosen & {'data_dir', 'dataset'}:  # else those that the checkpoint names
        programs.check_data(args)


def _data(argv: Sequence[str]) -> None:
    programs.check_data(parsers.data(argv).settings)


def _predict(argv: Sequence[str]) -> None:
    from . import predict

    predict.check(predict.parser().parse_args(argv))


def _export(argv: Sequence[str]) -> None:
    from . import export

    export.check(export.parser().parse_args(argv))


COMMANDS = {
    'train': Command('vim_timm.train', _train, 'train a model on your photos, a public data set, or the digits'),
    'validate': Command('vim_timm.validate', _validate, 'evaluate a checkpoint or published weights, with a report'),
    'predict': Command('vim_timm.predict', _predict, 'classify images'),
    'export': Command('vim_timm.export', _export, 'write a model as ONNX or torch.export'),
    'data': Command('vim_timm.data.__main__', _data, 'look at a data set before training'),
    'doctor': Command('vim_timm.doctor', parsers.doctor, 'what this machine can run, and why not'),
    'convert': Command('vim_timm.hub.convert', parsers.convert, 'rewrite a checkpoint of the original code'),
    'publish': Command('vim_timm.hub.publish', parsers.publish, 'put a trained model on the Hugging Face Hub'),
}


def main(name: str, argv: Sequence[str] | None = None) -> int:
    """Read and run the command line of one command, and return its exit status."""
    command, program = COMMANDS[name], []

    def read(words: Sequence[str]) -> None:
        command.read(words)
        program.append(importlib.import_module(command.module))

    return run(read, name, argv) or program[0].main(argv)
