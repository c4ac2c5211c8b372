"""Installing vim-timm works with and without a C compiler, and one wheel serves every Python."""

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERNEL = 'vim_timm/ops/cpu/libvim_timm_cpu.so'
SOURCES = ('setup.py', 'pyproject.toml', 'MANIFEST.in', 'vim_timm')

pytestmark = [
    pytest.mark.skipif(not (ROOT / 'setup.py').exists(), reason='no checkout'),
    pytest.mark.skipif(platform.system() != 'Linux', reason='the file names are those of Linux'),
]
needs_compiler = pytest.mark.skipif(shutil.which('cc') is None, reason='no C compiler')


def copied(folder):
    """A copy of the sources without built files."""
    copy = folder / 'checkout'
    copy.mkdir()
    ignored = shutil.ignore_patterns('*.so', '__pycache__')
    for name in SOURCES:
        source = ROOT / name
        shutil.copytree(source, copy / name, ignore=ignored) if source.is_dir() else shutil.copy(source, copy)
    return copy


@pytest.fixture
def checkout(tmp_path):
    return copied(tmp_path)


@pytest.fixture(scope='module')
def hasty(tmp_path_factory):
    """A C compiler that leaves out the optimizations, with which the kernel takes six times as long."""
    script = tmp_path_factory.mktemp('compiler') / 'cc'
    script.write_text('#!/bin/sh\nexec cc "$@" -O0\n', encoding='utf-8')
    script.chmod(0o755)
    return script


@pytest.fixture(scope='module')
def wheel(hasty, tmp_path_factory):
    """The wheel of the sources, built with a compiler."""
    folder = tmp_path_factory.mktemp('wheel')
    return wheel_of(copied(folder), folder / 'out', CC=hasty)


@pytest.fixture(scope='module')
def pure(tmp_path_factory):
    """The wheel of the sources, built without a compiler."""
    folder = tmp_path_factory.mktemp('pure')
    return wheel_of(copied(folder), folder / 'out', CC='false')


def pip(*arguments, **variables):
    command = [sys.executable, '-m', 'pip', '--disable-pip-version-check', *map(str, arguments)]
    run = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout + run.stderr


def wheel_of(source, target, **variables):
    pip('wheel', '--no-deps', '--no-build-isolation', '--no-cache-dir', '-w', target, source, **variables)
    (wheel,) = target.glob('*.whl')
    return wheel


def names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@needs_compiler
def test_a_wheel_holds_the_kernel_and_names_no_python(wheel):
    assert wheel.name.split('-')[2:] == ['py3', 'none', f'linux_{platform.machine()}.whl']
    parts = {f'vim_timm/ops/cpu/{part.name}' for part in (ROOT / 'vim_timm/ops/cpu').glob('*.[ch]')}
    assert {KERNEL, 'vim_timm/py.typed', *parts} <= names(wheel)
    assert not [name for name in names(wheel) if name.startswith(('tests/', 'benchmarks/'))]


def test_a_wheel_has_the_console_script(pure):
    with zipfile.ZipFile(pure) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith('entry_points.txt')]
        assert 'vim-timm = vim_timm.commands:console' in archive.read(name).decode()


def test_without_a_compiler_the_install_goes_on(checkout, pure, tmp_path):
    assert pure.name.split('-')[2:] == ['py3', 'none', 'any.whl']
    assert KERNEL not in names(pure)
    target = tmp_path / 'site'
    pip('install', '--no-deps', '--no-build-isolation', '--no-cache-dir', '--target', target, checkout, CC='false')
    code = (
        'import vim_timm, torch; from vim_timm.ops import cpu, auto_backend; assert cpu.__file__.startswith("site");'
        'print(auto_backend("cpu"), cpu.unavailable())'
    ).replace('"site"', repr(str(target)))
    run = subprocess.run([sys.executable, '-c', code], env={**os.environ, 'PYTHONPATH': str(target)}, cwd=tmp_path,
                         capture_output=True, text=True, check=True)  # fmt: skip
    assert run.stdout.startswith('torch ') and 'C compiler' in run.stdout


def test_a_source_archive_builds_the_same_wheel(checkout, pure, tmp_path):
    subprocess.run([sys.executable, 'setup.py', '-q', 'sdist', '-d', tmp_path / 'sdist'], cwd=checkout, check=True)
    (archive,) = (tmp_path / 'sdist').glob('*.tar.gz')
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / 'unpacked', filter='data')
    (unpacked,) = (tmp_path / 'unpacked').iterdir()
    assert names(wheel_of(unpacked, tmp_path / 'a', CC='false')) == names(pure)


EMBEDDED = """
import sys, timm, torch, vim_timm, safetensors.torch
assert vim_timm.__file__.startswith(sys.argv[1])
name = 'vim_nano_patch4_32.cifar10'
assert name in timm.list_models(pretrained=True)
expected = {key: value.float() for key, value in safetensors.torch.load_file(sys.argv[2]).items()}
for source in ('vim_nano_patch4_32', name):
    model = timm.create_model(source, pretrained=True)
    assert model.state_dict().keys() == expected.keys() and model.pretrained_cfg['tag'] == 'cifar10'
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
larger = timm.create_model('vim_nano_patch4_32', pretrained=True, img_size=48, num_classes=3, in_chans=1)
assert torch.equal(larger.norm.weight, model.norm.weight) and larger.pos_embed.shape[1] == 145
"""


def test_an_embedded_weight_works_offline_from_an_installed_wheel(checkout, tmp_path):
    """In an empty folder, by way of the source archive; a changed file is refused."""
    name = 'vim_nano_patch4_32.cifar10'
    folder = checkout / 'vim_timm' / 'weights' / name
    subprocess.run([sys.executable, 'setup.py', '-q', 'sdist', '-d', tmp_path], cwd=checkout, check=True)
    (archive,) = tmp_path.glob('*.tar.gz')
    site, empty = tmp_path / 'site', tmp_path / 'empty'
    pip('install', '--no-deps', '--no-build-isolation', '--no-cache-dir', '--target', site, archive, CC='false')
    empty.mkdir()
    environment = {
        **os.environ, 'PYTHONPATH': str(site), 'HF_HUB_OFFLINE': '1', 'HF_HOME': str(empty), 'HOME': str(empty)
    }  # fmt: skip

    def python(*arguments):
        return subprocess.run(
            [sys.executable, *map(str, arguments)], cwd=empty, env=environment, capture_output=True, text=True
        )

    run = python('-c', EMBEDDED, site, folder / 'model.safetensors')
    assert run.returncode == 0, run.stderr
    doctor = python('-m', 'vim_timm.doctor', '--weights')
    (line,) = [line for line in doctor.stdout.splitlines() if name in line]
    assert doctor.returncode == 0 and 'as it should be' in line
    with open(site / 'vim_timm' / 'weights' / name / 'model.safetensors', 'r+b') as file:
        file.seek(-1, os.SEEK_END)
        file.write(b'?')
    run = python('-c', EMBEDDED, site, folder / 'model.safetensors')
    assert run.returncode and 'SHA-256' in run.stderr


@needs_compiler
def test_an_editable_install_builds_the_kernel_in_place(checkout, hasty, tmp_path):
    options = ('--no-deps', '--no-build-isolation', '--no-cache-dir', '--target', tmp_path / 'site')
    pip('install', *options, '-e', checkout, CC=hasty)
    assert (checkout / KERNEL).exists()


@needs_compiler
@pytest.mark.parametrize('version', ['3.10', '3.12', '3.13'])
def test_the_library_loads_in_another_python(version):
    """It needs no symbol of Python, torch or OpenMP."""
    if not (ROOT / KERNEL).exists():
        pytest.skip('not built in place')
    found = sorted(Path.home().glob(f'.pyenv/versions/{version}.*/bin/python'))
    python = str(found[0]) if found else shutil.which(f'python{version}')
    if python is None:
        pytest.skip(f'no python{version}')
    code = (
        'import ctypes, sys; library = ctypes.CDLL(sys.argv[1]); f = library.vim_timm_instruction_sets;'
        'f.restype = ctypes.c_char_p; print(f().decode())'
    )
    run = subprocess.run([python, '-c', code, ROOT / KERNEL], capture_output=True, text=True, check=True)
    library = ctypes.CDLL(str(ROOT / KERNEL))
    library.vim_timm_instruction_sets.restype = ctypes.c_char_p
    assert run.stdout.strip() == library.vim_timm_instruction_sets().decode()


def test_the_oldest_versions_that_are_promised_are_tested():
    setup, floor = (ROOT / 'setup.py').read_text(), (ROOT / '.ci' / 'floor').read_text()
    python = re.search(r"python_requires='>=([\d.]+)'", setup)[1]
    assert f'python{python} ' in floor and f'Python :: {python}' in setup
    for name in ('torch', 'timm'):
        promised = re.search(rf"'{name}>=([\d.]+)'", setup)[1]
        assert re.search(rf'\b{name}=={re.escape(promised)}(\.0)?\b', floor)
    assert f'python {python} or newer' in (ROOT / 'README.md').read_text().lower()


def test_a_published_wheel_says_what_it_is(pure):
    with zipfile.ZipFile(pure) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith('METADATA')]
        fields = archive.read(name).decode().split('\n\n')[0].splitlines()
    assert 'Project-URL: Paper, https://arxiv.org/abs/2401.09417' in fields
    assert {'Requires-Python: >=3.10', 'Provides-Extra: completion'} <= set(fields)
