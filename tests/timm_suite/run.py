"""Run timm's own, unmodified tests on models of this package.

    python tests/timm_suite/run.py [--import MODULE] [MODEL ...] [-- PYTEST ARGUMENT ...]

MODULE registers more models; it is looked for in `tests/` too.
The tests are those of the installed timm's source distribution, which pip fetches once into a cache folder
(VIM_TIMM_CACHE, ~/.cache/vim-timm by default). TIMM_TESTS=DIR takes a folder of tests that is already there.
"""

import importlib
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest
import timm
from plugin import Suite

import vim_timm  # noqa: F401  registers the models

FILES = ('test_models.py', 'test_model_input.py', 'test_utils.py')


def find_tests() -> Path:
    """The folder of timm's tests, fetched if it is not there yet."""
    if 'TIMM_TESTS' in os.environ:
        return Path(os.environ['TIMM_TESTS'])
    cache = Path(os.environ.get('VIM_TIMM_CACHE') or '~/.cache/vim-timm').expanduser()
    tests = cache / f'timm-{timm.__version__}-tests'
    if not tests.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            fetch(Path(folder)).rename(tests)
    return tests


def fetch(folder: Path) -> Path:
    """timm's tests, unpacked in an empty folder from the source distribution of the installed version."""
    package = ['--no-deps', '--no-binary', 'timm', f'timm=={timm.__version__}']
    subprocess.run([sys.executable, '-m', 'pip', 'download', '-q', '-d', folder, *package], check=True)
    (archive,) = folder.glob('timm-*.tar.gz')
    with tarfile.open(archive) as tar:
        # not its timm/, which would stand in for the installed one
        members = [member for member in tar.getmembers() if '/tests/' in member.name]
        tar.extractall(folder, members, filter='data')
    (tests,) = folder.glob('timm-*/tests')
    return tests


def main(arguments: list[str]) -> int:
    if arguments[:1] == ['--import']:
        sys.path.append(str(Path(__file__).parents[1]))
        importlib.import_module(arguments[1])
        arguments = arguments[2:]
    split = arguments.index('--') if '--' in arguments else len(arguments)
    models, pytest_arguments = arguments[:split] or ['test_vim'], arguments[split + 1 :]
    unknown = [model for model in models if not timm.is_model(model)]
    if unknown:
        sys.exit(f'no such model: {unknown[0]}')
    tests = find_tests().resolve()
    os.environ['HF_HUB_OFFLINE'] = '1'
    own = ['-c', os.devnull, '--rootdir', str(tests), '--import-mode=importlib', '-p', 'no:cacheprovider']
    quiet = ['-W', 'ignore::pytest.PytestUnknownMarkWarning', '-W', 'ignore::FutureWarning']
    files = [str(tests / name) for name in FILES]
    return pytest.main([*own, *quiet, *pytest_arguments, *files], plugins=[Suite(models)])


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
