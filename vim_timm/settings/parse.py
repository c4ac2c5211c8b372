"""From a command line to settings: defaults, then a recipe, then --config, then the flags that were given.

Whatever a setting comes from, it is checked against its row of the table.
"""

import argparse
import datetime
import importlib.resources
import os
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError, called, meant
from .flags import PATHS, USUAL, Row, batch_size, refused
from .parser import KeyValues, Parser, Refuse
from .ranges import ANY, Names, Range

RECIPES = importlib.resources.files('vim_timm') / 'recipes'
_UNSET = object()
_SOURCES = ('data', 'config', 'recipe')  # flags of every program, which name further settings


class Settings(argparse.Namespace):
    """Settings by name, read-only; `vars(settings)` are their plain values, as timm and checkpoints take them.

    Attributes:
        chosen: names of those that somebody chose.
    """

    __slots__ = ('chosen',)
    chosen: frozenset[str]

    def __init__(self, values: Mapping[str, Any], chosen: Iterable[str] = ()):
        vars(self).update(values)
        object.__setattr__(self, 'chosen', frozenset(chosen))

    def __setattr__(self, name: str, value: Any = None) -> None:
        raise AttributeError(f'settings are read-only: settings.replace({name}=...) makes others')

    __delattr__ = __setattr__  # type: ignore[assignment]

    def replace(self, **changes: Any) -> 'Settings':
        """The same settings but for some."""
        return Settings({**vars(self), **changes}, self.chosen)


class _Flag(NamedTuple):
    """A row of the table."""

    names: str
    kind: Any
    default: Any
    text: str
    range: Range | Names = ANY

    @property
    def name(self) -> str:
        return self.names.split()[0].lstrip('-').replace('-', '_')

    def check(self, value: Any, source: str = '') -> Any:
        """The value as the flag has it.

        Args:
            source: where it comes from, for the sentence that refuses it.

        Raises:
            UserError: the flag would not take it.
        """
        where = f'{source}: {self.names.split()[0]}' if source else self.names.split()[0]
        if self.kind is refused:
            raise UserError(f'{where} is not supported: {self.text}')
        if value is None and self.default is None:
            return None
        if isinstance(self.kind, tuple) and self.kind[0] != '?':
            if value not in self.kind:
                near = meant(str(value), self.kind)
                raise UserError(f'{where} must be one of {", ".join(self.kind)}, not {value!r}{near}')
            return value
        try:
            value = self._convert(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(f'{where} cannot be {reprlib.repr(value)}') from error
        of: Any = _numbers(value) if self.kind in (dict, batch_size) else value
        why = self.range.refusal(of) if self._has_range else ''
        if why:
            raise UserError(f'{where} {why}')
        return value

    @property
    def _has_range(self) -> bool:
        return self.kind in (int, float, batch_size, [int], [float], dict) or isinstance(self.range, Names)

    def _convert(self, value: Any) -> Any:
        kind = self.kind
        if isinstance(kind, list):
            values = value if isinstance(value, (list, tuple)) else [value]
            if not values and self.default != []:
                raise ValueError('no value')
            return [_plain(kind[0], item) for item in values]
        if kind is dict:
            if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
                raise TypeError('no key=value pairs')
            return value
        return _plain(str if isinstance(kind, tuple) else kind, value)


def _plain(kind: type, value: Any) -> Any:
    """A value that YAML or a checkpoint may have spelled otherwise (`1e-3` is a string in YAML), and no other one."""
    if kind is bool or isinstance(value, bool):
        fits = kind is bool and isinstance(value, bool)
    elif kind is str:
        fits = isinstance(value, (str, int, float, datetime.date))
    else:
        fits = isinstance(value, (str, int, float)) and (kind is float or isinstance(value, str) or value == int(value))
    if not fits:
        raise TypeError(f'not of type {kind.__name__}')
    return kind(value)


def _numbers(value: Any) -> list[float]:
    """All numbers in a value of lists and dicts, which YAML may have knotted with each other."""
    found, seen, waiting = [], set(), [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, (dict, list, tuple)) and id(item) not in seen:
            seen.add(id(item))
            waiting += item.values() if isinstance(item, dict) else item
        elif isinstance(item, (int, float)):
            found.append(item)
    return found


class _ListRecipes(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        for path in sorted(Path(str(RECIPES)).glob('*.yaml')):
            first = path.read_text(encoding='utf-8').splitlines()[0]
            print(f'{path.stem:24}{first.lstrip("# ")}')
        parser.exit()


def build_parser(program: str, table: Mapping[str, Sequence[Row]], description: str) -> Parser:
    """The parser of a table of flags. Defaults are left out of it: `parse` layers them."""
    parser = Parser(program, f'{called(program)} [DIR] [--recipe NAME] [flags]', description, USUAL)
    parser.add_argument('data', nargs='?', metavar='DIR', help='the same as --data-dir')
    parser.add_argument('--config', '-c', metavar='FILE', help='YAML file with settings')
    parser.add_argument('--recipe', metavar='NAME', help='settings that come with this package')
    parser.add_argument('--list-recipes', action=_ListRecipes, nargs=0, help='print their names and end')
    for title, rows in table.items():
        group = parser.add_argument_group(title)
        for names, kind, default, text, *_ in rows:
            told = kind in (bool, refused) or default in (None, '', [], {}) or '(default' in text
            shown = text if told else f'{text} (default: {default})'
            options = {**_action(kind), **({'metavar': 'PATH'} if names.split()[0] in PATHS else {})}
            group.add_argument(*names.split(), help=shown.replace('%', '%%'), **options)
    return parser


def _action(kind: Any) -> dict[str, Any]:
    if kind is bool:
        return dict(action='store_true')
    if kind is dict:
        return dict(action=KeyValues, nargs='*', metavar='KEY=VALUE')
    if kind is refused:
        return dict(action=Refuse, nargs='*')
    if isinstance(kind, list):
        return dict(type=kind[0], nargs='+', metavar='N')
    if isinstance(kind, tuple) and kind[0] == '?':
        return dict(type=str, nargs='?', const=kind[1])
    if isinstance(kind, tuple):
        return dict(choices=kind)
    return dict(type=kind, metavar='N' if kind in (int, float, batch_size) else 'X')


def parse(
    program: str,
    table: Mapping[str, Sequence[Row]],
    argv: Sequence[str],
    description: str = '',
    layer: tuple[str, Mapping[str, Any]] = ('', {}),
    fallback_recipe: str = '',
) -> Settings:
    """Settings for `argv`.

    Args:
        layer: settings between the defaults and a recipe, such as those of a checkpoint, and what they come from.
        fallback_recipe: the recipe where the command line names neither data, recipe nor --config.

    Raises:
        UserError: a setting is unknown, or no value of its flag.
    """
    flags = {flag.name: flag for rows in table.values() for flag in (_Flag(*row) for row in rows)}
    names = (*flags, *_SOURCES)
    namespace = build_parser(program, table, description).parse_args(
        argv, argparse.Namespace(**dict.fromkeys(names, _UNSET))
    )
    given = {name: getattr(namespace, name) for name in names if getattr(namespace, name) is not _UNSET}
    if given.get('data') is None:
        given.pop('data', None)
    elif given.setdefault('data_dir', given['data']) != given['data']:
        raise UserError(f'{given["data"]} and --data-dir {given["data_dir"]} are two data folders: give one')
    if not given.keys() & {'data_dir', 'dataset', 'recipe', 'config'}:
        _check_folders(given, flags)
        given['recipe'] = fallback_recipe
    source, inherited = layer
    given.update(_checked('', {name: given[name] for name in flags if name in given}, flags))
    chosen = {
        **_checked(source, inherited, flags),
        **_recipe(given.get('recipe'), flags),
        **_yaml(given.get('config'), flags),
        **given,
    }
    defaults = {name: flag.default for name, flag in flags.items() if flag.kind is not refused}
    return Settings({**dict.fromkeys(_SOURCES), **defaults, **chosen}, chosen)


def _check_folders(given: Mapping[str, Any], flags: Mapping[str, _Flag]) -> None:
    """Refuse a data folder that a flag with any number of values has taken for one of them."""
    for name, flag in flags.items():
        several, one = isinstance(flag.kind, list), isinstance(flag.kind, tuple) and flag.kind[0] == '?'
        for value in given.get(name) or () if several else [given.get(name)] if one else ():
            if isinstance(value, str) and os.path.isdir(value) and not os.path.exists(f'{value}/__init__.py'):
                raise UserError(
                    f'{flag.names.split()[0]} took the folder {value}: if it is the data, --data-dir {value}'
                )


def _checked(source: str, values: Mapping[str, Any], flags: Mapping[str, _Flag]) -> dict[str, Any]:
    return {name: flags[name].check(value, source) for name, value in values.items()}


def _recipe(name: str | None, flags: Mapping[str, _Flag]) -> dict[str, Any]:
    if not name:
        return {}
    path = RECIPES / f'{name}.yaml'
    if not path.is_file():
        known = sorted(Path(entry.name).stem for entry in RECIPES.iterdir() if entry.name.endswith('.yaml'))
        near = meant(name, known) or f'; there are {", ".join(known)}'
        raise UserError(f'there is no recipe {name!r}{near}')
    return _yaml(str(path), flags)


def _yaml(path: str | None, flags: Mapping[str, _Flag]) -> dict[str, Any]:
    """The settings in a YAML file."""
    if not path:
        return {}
    import yaml

    try:
        text = Path(path).read_text(encoding='utf-8')
        settings, tree = yaml.safe_load(text) or {}, yaml.compose(text, yaml.SafeLoader)
    except RecursionError as error:
        raise UserError(f'{path} is not a readable YAML file: it is nested too deeply') from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f'{path} is not a readable YAML file: {str(error).splitlines()[0]}') from error
    if not isinstance(settings, dict):
        raise UserError(f'{path} must hold one setting a line, `name: value`')
    settings = {str(key).replace('-', '_'): value for key, value in settings.items()}
    named = [key.value.replace('-', '_') for key, _ in tree.value] if tree else []  # a mapping keeps the last of each
    for key in settings:
        if named.count(key) > 1:
            raise UserError(f'{path}: {key} is set {named.count(key)} times')
        if key not in flags:
            raise UserError(f'{path}: there is no setting {key!r}{meant(key, flags)}')
    return _checked(path, settings, flags)
