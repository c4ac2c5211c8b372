"""The house keeps its shape: imports point one way, files are short, signatures too, every variable is documented."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / 'vim_timm'
SOURCES = sorted(PACKAGE.rglob('*.py'))

# Each may import itself and what stands before it; `ground` stands under all.
GROUND = ('console', 'errors', 'files', 'lazy', 'version')
FLOORS = ('ops', 'layers', 'settings', 'models', 'data', 'tasks', 'step', 'engine', 'report', 'hub')


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix('').parts
    return parts[:-1] if parts[-1] == '__init__' else parts


def floor_of(parts):
    """The number of a module's floor: -1 for the ground, len(FLOORS) for command lines."""
    if len(parts) > 1 and parts[1] in GROUND:
        return -1
    if parts[-1] == '__main__':
        return len(FLOORS)
    return FLOORS.index(parts[1]) if len(parts) > 1 and parts[1] in FLOORS else len(FLOORS)


def imported_part(tree):
    """Statements that are executed when a module is imported, or after: not those of `if __name__ == '__main__'`."""
    return [node for node in tree.body if not ast.unparse(node).startswith("if __name__ == '__main__':")]


def imports_of(path):
    """Modules of this package that a file imports, wherever it does."""
    module = module_of(path)
    package = module if path.name == '__init__.py' else module[:-1]
    part = imported_part(ast.parse(path.read_text()))
    for node in (node for statement in part for node in ast.walk(statement)):
        if isinstance(node, ast.Import):
            names = [alias.name.split('.') for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split('.') if node.module else []
            names = [base + [alias.name] for alias in node.names] if len(base) == 1 else [base]
        else:
            continue
        yield from (tuple(name) for name in names if name[:1] == ['vim_timm'])


@pytest.mark.parametrize('path', SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    own = floor_of(module_of(path))
    against = {'.'.join(name) for name in imports_of(path) if floor_of(name) > own and name != ('vim_timm',)}
    against -= {'vim_timm.version', 'vim_timm.__version__'}
    assert not against


def test_the_check_of_imports_can_fail(tmp_path):
    assert floor_of(('vim_timm', 'engine', 'loop')) > floor_of(('vim_timm', 'ops'))
    assert ('vim_timm', 'ops', 'scan') in set(imports_of(PACKAGE / 'ops' / '__init__.py'))


@pytest.mark.parametrize(
    'path',
    [path for path in PACKAGE.rglob('*') if path.suffix in ('.py', '.c', '.h', '.cu', '.cuh')],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= 500


def long_signatures(path):
    """Functions of more than eight parameters, but constructors of models and layers, and Triton's kernels."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            every = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            count = len([argument for argument in every if argument.arg != 'self'])
            kernel = any('jit' in ast.dump(decorator) for decorator in node.decorator_list)
            if count > 8 and not kernel and node.name != '__init__':
                yield f'{node.name} takes {count}'


# Signatures that others define: mamba-ssm's function and the original's constructor.
FOREIGN = {'selective_scan takes 10', 'from_original takes 35'}


@pytest.mark.parametrize('path', SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_signatures_are_short(path):
    assert set(long_signatures(path)) <= FOREIGN


def test_every_environment_variable_is_documented():
    documented = set(re.findall(r'`(VIM_TIMM_[A-Z_]+)`', (ROOT / 'docs' / 'environment.md').read_text()))
    folders = ('vim_timm', 'tests', 'benchmarks', '.ci')
    files = [file for folder in folders for file in (ROOT / folder).rglob('*') if file.suffix in ('.py', '.sh', '')]
    texts = ' '.join(file.read_text() for file in files if file.is_file())
    used = set(re.findall(r'VIM_TIMM_[A-Z]+(?:_[A-Z]+)*', texts))
    assert used == documented


def text_without_encoding(source):
    """Lines that open a text file, or a program's output, in whatever encoding the locale names."""
    for node in ast.walk(ast.parse(source)):
        name = ast.unparse(node.func) if isinstance(node, ast.Call) else ''
        if name.startswith('subprocess.'):
            given = {keyword.arg for keyword in node.keywords}
            if given & {'text', 'universal_newlines'} and 'encoding' not in given:
                yield node.lineno
        elif name in ('open', 'io.open', 'os.fdopen') or name.endswith(('.read_text', '.write_text')):
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            mode = given.get('mode') or (node.args[1] if name.endswith('open') and len(node.args) > 1 else None)
            binary = isinstance(mode, ast.Constant) and 'b' in mode.value
            if not binary and 'encoding' not in given and "distribution('vim-timm')" not in name:
                yield node.lineno


@pytest.mark.parametrize('path', SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_text_does_not_depend_on_the_locale(path):
    assert not list(text_without_encoding(path.read_text(encoding='utf-8')))


def test_the_check_of_encodings_can_fail():
    source = "open(x)\nopen(x, 'rb')\np.read_text()\nsubprocess.run(x, text=True)\nopen(x, mode='w', encoding='utf-8')"
    assert list(text_without_encoding(source)) == [1, 3, 4]


def third_parties(path):
    """Packages of others that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level and node.module else []
        yield from (name.partition('.')[0] for name in names)


PROJECTS = {'PIL': 'pillow', 'yaml': 'pyyaml', 'sklearn': 'scikit_learn'}  # whose modules have other names
WITH_TORCH = {'triton', 'cuda'}  # come with its builds for GPUs
ONLY_IF_THERE = {'flash_attn'}  # whose lack a sentence names


@pytest.mark.skipif(not (ROOT / 'setup.py').exists(), reason='no checkout')
def test_what_is_imported_is_declared():
    imported = {name for path in SOURCES for name in third_parties(path)} - set(sys.stdlib_module_names) - {'vim_timm'}
    words = re.findall(r"'([\w-]+)(?:[<>=]+[\w.]+)?'", (ROOT / 'setup.py').read_text(encoding='utf-8'))
    declared = {word.replace('-', '_') for word in words}
    assert 'torch' in imported and 'timm' in declared
    assert {PROJECTS.get(name, name) for name in imported} <= declared | WITH_TORCH | ONLY_IF_THERE


def unplaced(source):
    """Lines in a block that explains errors which raise a UserError: that gets no name of a file or flag in front."""
    for block in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.With)):
        if any(re.match(r'explain\(.', ast.unparse(item.context_expr)) for item in block.items):
            raised = (node for node in ast.walk(block) if isinstance(node, ast.Raise) and node.exc)
            yield from (node.lineno for node in raised if ast.unparse(node.exc).startswith('UserError('))


@pytest.mark.parametrize('path', SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_sentence_names_the_file_that_it_is_about(path):
    assert not list(unplaced(path.read_text(encoding='utf-8')))


def test_the_check_of_sentences_can_fail():
    assert list(unplaced("with explain('x'):\n    if a:\n        raise UserError('y')\n    raise ValueError()")) == [3]
