"""argparse for every command line of the package: mistakes are sentences, help is short first."""

import argparse
import ast
import os
import re
import types
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..errors import UserError, called, meant

PUBLISHED = {'--pretrained': '--model NAME takes the published weights by itself'}

_TRUTH = {'true': True, 'yes': True, 'on': True, 'false': False, 'no': False, 'off': False}
_HELP = 'print the usual flags; `--help all`: every flag'


class Parser(argparse.ArgumentParser):
    """A parser that raises UserError, proposes the nearest name, and has a short help.

    Args:
        usual: flags that the short help shows; all where it is empty.
        elsewhere: flags of other programs, and what is done here instead.
    """

    def __init__(
        self, program: str, usage: str = '', description: str = '', usual: Collection[str] = (),
        elsewhere: Mapping[str, str] = types.MappingProxyType({}),
    ):  # fmt: skip
        super().__init__(
            called(program), usage=usage or None, description=description, add_help=False, allow_abbrev=False
        )
        self.usual, self.elsewhere = usual, elsewhere
        self.words: Sequence[str] = ()
        text = _HELP if usual else 'print this text'
        self.add_argument('--help', '-h', action=_Help, nargs='?', metavar='all', help=text, default=argparse.SUPPRESS)

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]
        self.words = list(args or ())
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        lost = next((word for word in self.words if repr(word) in message and os.path.isdir(word)), '')
        hint = f'if {lost} is the data: --data-dir {lost}' if lost else '--help lists the flags'
        raise UserError(f'{message}{self._meant(message)} ({hint})')

    def _meant(self, message: str) -> str:
        """What was probably meant by the flag or the choice that argparse's message complains of."""
        flag = re.match(r'unrecognized arguments: (-[^\s=]+)', message)
        if flag and flag[1] in self.elsewhere:
            return f'; {self.elsewhere[flag[1]]}'
        if flag:
            return meant(flag[1].replace('_', '-'), self._option_string_actions)
        choice = re.match(r"argument (\S+?)(?:/\S+)?: invalid choice: '(.*?)'", message)
        action = self._option_string_actions.get(choice[1]) if choice else None
        return meant(choice[2], action.choices) if choice and action and action.choices else ''

    def help_text(self, short: bool = False) -> str:
        """The help of all flags, or of the usual ones and what is no flag."""
        formatter = argparse.HelpFormatter(self.prog, max_help_position=32)
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        for group in self._action_groups:
            actions = [action for action in group._group_actions if not short or self._is_usual(action)]
            formatter.start_section(group.title)
            formatter.add_arguments(actions)
            formatter.end_section()
        if short and self.usual:
            formatter.add_text(f'Every flag: {self.prog} --help all')
        return formatter.format_help()

    def _is_usual(self, action: argparse.Action) -> bool:
        return not action.option_strings or isinstance(action, _Help) or bool({*action.option_strings} & {*self.usual})


class _Help(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        print(parser.help_text(short=bool(parser.usual) and values != 'all'), end='')
        parser.exit()


class Refuse(argparse.Action):
    """A flag that is known and cannot be honoured; its help says why."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        parser.error(f'{option_string} is not supported: {self.help}')


class KeyValues(argparse.Action):
    """`key=value` pairs as timm's `ParseKwargs` reads them: what is no Python literal is a string.

    But `false` and the other words of YAML are truth values, where a string would mean true whatever it says.
    """

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        found = {}
        for pair in values:
            key, sign, value = pair.partition('=')
            if not sign:
                parser.error(f'{option_string} takes key=value pairs, not {pair!r}')
            try:
                found[key] = _TRUTH[value.lower()] if value.lower() in _TRUTH else ast.literal_eval(value)
            except (ValueError, SyntaxError):
                found[key] = value
            except (RecursionError, MemoryError):
                parser.error(f'{option_string}: a value is nested too deeply')
        setattr(namespace, self.dest, found)


def check_average(args: Any) -> None:
    """Refuse --use-ema without a checkpoint, which alone may hold a moving average."""
    if args.use_ema and not args.checkpoint:
        raise UserError('--use-ema takes the moving average in a checkpoint: name it with --checkpoint')
