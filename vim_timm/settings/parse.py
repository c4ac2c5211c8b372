"""From a command line to settings: defaults, then a recipe, then --config, then the flags that were given."""

import argparse
import importlib.resources
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from timm.utils import ParseKwargs

from ..errors import UserError
from .flags import Row, refused

RECIPES = importlib.resources.files('vim_timm') / 'recipes'
_UNSET = object()


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f'{message} (--help lists every flag)')


class _Refuse(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        parser.error(f'{option_string} is not supported: {self.help}')


class _Kwargs(ParseKwargs):
    def __call__(self, parser, namespace, values, option_string=None):
        for value in values:
            if '=' not in value:
                parser.error(f'{option_string} takes key=value pairs, not {value!r}')
        super().__call__(parser, namespace, values, option_string)


class _ListRecipes(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        for path in sorted(Path(str(RECIPES)).glob('*.yaml')):
            print(f'{path.stem:24}{path.read_text().splitlines()[0].lstrip("# ")}')
        parser.exit()


def build_parser(program: str, table: Mapping[str, Sequence[Row]], description: str) -> argparse.ArgumentParser:
    """The parser of a table of flags. Defaults are left out of it: `parse` layers them."""
    usage = f'{program} [DIR] [--recipe NAME] [flags]'
    parser = _Parser(program, usage=usage, description=description, allow_abbrev=False)
    parser.add_argument('data', nargs='?', metavar='DIR', help='the same as --data-dir')
    parser.add_argument('--config', '-c', metavar='FILE', help='YAML file with settings')
    parser.add_argument('--recipe', metavar='NAME', help='settings that come with this package')
    parser.add_argument('--list-recipes', action=_ListRecipes, nargs=0, help='print their names and end')
    for title, rows in table.items():
        group = parser.add_argument_group(title)
        for names, kind, default, text in rows:
            shown = text if kind in (bool, refused) or default in (None, '', [], {}) else f'{text} (default: {default})'
            group.add_argument(*names.split(), help=shown.replace('%', '%%'), **_action(kind))
    return parser


def _action(kind: Any) -> dict[str, Any]:
    if kind is bool:
        return dict(action='store_true')
    if kind is dict:
        return dict(action=_Kwargs, nargs='*', metavar='KEY=VALUE')
    if kind is refused:
        return dict(action=_Refuse, nargs='*')
    if isinstance(kind, list):
        return dict(type=kind[0], nargs='+', metavar='N')
    if isinstance(kind, tuple) and kind[0] == '?':
        return dict(type=str, nargs='?', const=kind[1])
    if isinstance(kind, tuple):
        return dict(choices=kind)
    return dict(type=kind, metavar='N' if kind in (int, float) else 'X')


def parse(
    program: str,
    table: Mapping[str, Sequence[Row]],
    argv: Sequence[str],
    description: str = '',
    layer: Mapping[str, Any] | None = None,
    fallback_recipe: str = '',
) -> tuple[argparse.Namespace, set[str]]:
    """Settings for `argv`, and the names of those that somebody chose.

    Args:
        layer: settings between the defaults and a recipe, such as those of a checkpoint.
        fallback_recipe: the recipe where the command line names neither data, recipe nor --config.
    """
    parser = build_parser(program, table, description)
    actions = {action.dest: action for action in parser._actions if action.dest not in ('help', 'list_recipes')}
    namespace = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(actions, _UNSET)))
    given = {key: value for key, value in vars(namespace).items() if value is not _UNSET and key in actions}
    if given.get('data') is None:
        given.pop('data', None)
    else:
        given.setdefault('data_dir', given['data'])
    if not given.keys() & {'data_dir', 'dataset', 'recipe', 'config'}:
        given['recipe'] = fallback_recipe
    chosen = {**(layer or {}), **_recipe(given.get('recipe'), actions), **_yaml(given.get('config'), actions), **given}
    rows = [row for rows in table.values() for row in rows if row[1] is not refused]
    defaults = {names.split()[0].lstrip('-').replace('-', '_'): default for names, _, default, _ in rows}
    settings = {'data': None, 'config': None, 'recipe': None, **defaults, **chosen}
    return argparse.Namespace(**settings), set(chosen)


def _recipe(name: str | None, actions: Mapping[str, argparse.Action]) -> dict[str, Any]:
    if not name:
        return {}
    path = RECIPES / f'{name}.yaml'
    if not path.is_file():
        known = ', '.join(sorted(Path(entry.name).stem for entry in RECIPES.iterdir() if entry.name.endswith('.yaml')))
        raise UserError(f'there is no recipe {name!r}; there are {known}')
    return _yaml(str(path), actions)


def _yaml(path: str | None, actions: Mapping[str, argparse.Action]) -> dict[str, Any]:
    """The settings in a YAML file, checked against the flags and converted as the command line would."""
    if not path:
        return {}
    try:
        settings = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f'{path} is not a readable YAML file: {str(error).splitlines()[0]}') from error
    if not isinstance(settings, dict):
        raise UserError(f'{path} must hold one setting a line, `name: value`')
    settings = {str(key).replace('-', '_'): value for key, value in settings.items()}
    for key, value in settings.items():
        if key not in actions or key in ('data', 'config', 'recipe'):
            raise UserError(f'{path}: there is no setting {key!r}')
        settings[key] = _convert(path, actions[key], value)
    return settings


def _convert(path: str, action: argparse.Action, value: Any) -> Any:
    flag = action.option_strings[0]
    if isinstance(action, _Refuse):
        raise UserError(f'{path}: {flag} is not supported: {action.help}')
    if action.choices and value is not None and value not in action.choices:
        raise UserError(f'{path}: {flag} must be one of {", ".join(map(str, action.choices))}, not {value!r}')
    kind = action.type
    if not callable(kind) or value is None:
        return value
    try:
        return [kind(item) for item in value] if isinstance(value, list) else kind(value)
    except (TypeError, ValueError) as error:
        raise UserError(f'{path}: {flag} cannot be {value!r}') from error
