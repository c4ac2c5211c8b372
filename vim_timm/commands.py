"""The command lines: `vim-timm COMMAND ...`, `python -m vim_timm COMMAND ...`, and each program by itself.

A line is read before the program is imported that runs it, and torch and timm with it: `--help`, a typing error and a
value that is refused are answered at once.
"""

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from . import export, predict
from .errors import UserError, called, explain, meant, run
from .settings import parsers, programs
from .settings.parser import Parser
from .version import __version__

PROGRAM = 'vim-timm'
MODULES = ('original', 'run')  # programs that take command lines of other code bases, and are no commands
SHELLS = ('bash', 'zsh', 'tcsh')
FILES = {'PATH', 'FILE', 'DIR', 'FOLDER', 'IMAGE', 'IN.pth', 'OUT.safetensors'}  # metavars of what a shell completes


class Command(NamedTuple):
    """A command.

    Attributes:
        module: what has its `main(argv)`.
        parser: its command line.
        read: reads and checks one without torch and timm; raises UserError.
        text: what it does.
    """

    module: str
    parser: Callable[[], argparse.ArgumentParser]
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


COMMANDS = {
    'train': Command(
        'vim_timm.train', programs.train_parser, _train, 'train a model on your photos, public data or the digits'
    ),
    'validate': Command(
        'vim_timm.validate', programs.validate_parser, _validate, 'evaluate a checkpoint or published weights'
    ),
    'predict': Command('vim_timm.predict', predict.parser, predict.read, 'classify images'),
    'export': Command('vim_timm.export', export.parser, export.read, 'write a model as ONNX or torch.export'),
    'data': Command('vim_timm.data.__main__', parsers.data_parser, _data, 'look at a data set before training'),
    'compare': Command('vim_timm.compare', parsers.compare_parser, parsers.compare, 'compare runs of training'),
    'doctor': Command(
        'vim_timm.doctor', parsers.doctor_parser, parsers.doctor, 'say what this machine can run, and why not'
    ),
    'convert': Command(
        'vim_timm.hub.convert', parsers.convert_parser, parsers.convert, 'rewrite a checkpoint of the original code'
    ),
    'publish': Command(
        'vim_timm.hub.publish', parsers.publish_parser, parsers.publish, 'put a trained model on the Hugging Face Hub'
    ),
}


def main(name: str, argv: Sequence[str] | None = None) -> int:
    """Read and run the command line of one command, and return its exit status."""
    command, program = COMMANDS[name], []

    def read(words: Sequence[str]) -> None:
        command.read(words)
        program.append(importlib.import_module(command.module))

    named = {'train': programs.TRAIN_PROGRAM, 'validate': programs.VALIDATE_PROGRAM}.get(name, name)
    return run(read, named, argv) or program[0].main(argv)


def console(argv: Sequence[str] | None = None) -> int:
    """`vim-timm`: run the command that the first word names, and return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in COMMANDS:
        return main(words[0], words[1:])
    return run(_answer, '', words)


def parser() -> argparse.ArgumentParser:
    """The parser of all commands, as shells complete it."""
    result = Parser(called(''), f'{called("")} COMMAND ...', 'Vision Mamba for timm.')
    result.add_argument('--version', action='version', version=f'vim-timm {__version__}')
    result.add_argument('--print-completion', choices=SHELLS, help='print what completes these lines in a shell')

    def known(prog: str, **_: object) -> argparse.ArgumentParser:
        return COMMANDS[prog.rpartition(' ')[2]].parser()

    group = result.add_subparsers(title='commands', metavar='COMMAND', prog=called(''), parser_class=known)  # type: ignore[call-overload]
    for name, command in COMMANDS.items():
        group.add_parser(name, help=command.text)
    return result


def _answer(words: Sequence[str]) -> None:
    """What is said where no command is named."""
    if words and not words[0].startswith('-'):
        module = f'; it is python -m vim_timm.{words[0]}' if words[0] in MODULES else meant(words[0], COMMANDS)
        raise UserError(f'there is no command {words[0]!r}{module} (--help lists them)')
    args = parser().parse_args(words or ['--help'])
    if args.print_completion:
        print(completion(args.print_completion))


def completion(shell: str) -> str:
    """A script that completes the command lines in a shell.

    Raises:
        UserError: shtab is not installed.
    """
    with explain('--print-completion needs `pip install shtab`'):
        import shtab
    whole = parser()
    whole.prog = PROGRAM
    (commands,) = (action.choices for action in whole._actions if isinstance(action, argparse._SubParsersAction))
    for one in commands.values():
        for action in one._actions:
            if action.metavar in FILES:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    return shtab.complete(whole, shell)
