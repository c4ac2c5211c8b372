"""Every end of a program is a sentence and the right status: no memory, no output, an output without the letters."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vim_timm import console, train, validate
from vim_timm.engine import Hooks
from vim_timm.errors import OutOfMemory, UserError, explain, out_of_memory, run

BASE = (
    '--dataset digits --model test_vit --img-size 16 --in-chans 1 --workers 0 --batch-size 359 --epochs 1 --device cpu'
)


def exhaust(library):
    return {
        'torch': lambda: torch.empty(2**50),
        'numpy': lambda: np.empty(2**50),
        'python': lambda: bytearray(2**62),
        'device': lambda: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate')),
    }[library]()


@pytest.mark.parametrize('library', ['torch', 'numpy', 'python', 'device'])
def test_too_little_memory_is_one_sentence_wherever_it_shows(library, capsys):
    for body in (lambda _: exhaust(library), lambda _: inside(library)):
        assert run(body, 'test', []) == 3
        (line,) = capsys.readouterr().err.splitlines()
        assert 'out of' in line and '--batch-size' in line


def inside(library):
    with explain('a model'):
        exhaust(library)


def test_training_without_memory(tmp_path, capsys, monkeypatch):
    module = torch.nn.Module()
    module.forward = lambda output, target: exhaust('torch')
    arguments = [*BASE.split(), '--epochs', '1', '--output', str(tmp_path)]
    monkeypatch.setattr(train, 'train', lambda args, real=train.train: real(args, Hooks(loss=module)))
    assert train.main(arguments) == 3
    assert capsys.readouterr().err.splitlines()[-1].startswith('train.py: error: out of memory: lower --batch-size')


class TestRetry:
    """`validate.py --retry` halves the batch where memory runs out, and nowhere else."""

    @pytest.fixture
    def evaluate(self, monkeypatch):
        sizes = []

        def run(fail, *flags):
            def validate_once(args, process, content):
                sizes.append(args.batch_size)
                if args.batch_size > 16:
                    fail()
                return {'top1': 1.0}

            monkeypatch.setattr(validate, 'validate', validate_once)
            args = validate.parse_args([*'--model test_vit --pretrained --batch-size 32'.split(), *flags])
            return validate.validate_with_retry(args, None, {}), sizes

        return run

    @pytest.mark.parametrize('library', ['torch', 'numpy', 'device'])
    def test_halves(self, library, evaluate):
        result, sizes = evaluate(lambda: exhaust(library), '--retry')
        assert result['top1'] == 1.0 and sizes == [32, 24, 16]

    def test_what_auto_chose_gives_way_to_the_usual_batch(self, evaluate, capsys):
        result, sizes = evaluate(lambda: exhaust('torch'), '--batch-size', 'auto', '--retry')
        assert result['top1'] == 1.0 and sizes[:3] == [256, 256, 192]  # the first stands for what is chosen later
        assert capsys.readouterr().out.startswith('batch size auto does not fit')

    def test_not_unasked(self, evaluate):
        with pytest.raises(RuntimeError, match="can't allocate"):
            evaluate(lambda: exhaust('torch'))

    def test_other_mistakes_stay_what_they_are(self, evaluate):
        def fail():
            raise UserError('there is no such folder')

        with pytest.raises(UserError, match='no such folder'):
            evaluate(fail, '--retry')

    def test_not_what_is_explained(self, evaluate):
        result, sizes = evaluate(lambda: inside('torch'), '--retry')
        assert sizes == [32, 24, 16]


def test_memory_that_is_no_matter_of_size_is_left_alone():
    assert out_of_memory(RuntimeError('an illegal memory access was encountered')) == ''
    assert out_of_memory(OutOfMemory('a sentence')) == 'a sentence'


CONSOLE = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location('console', {console.__file__!r})
console = importlib.util.module_from_spec(spec)
spec.loader.exec_module(console)
with console.lasting_streams():
"""


def speak(body, shell, **environment):
    """A program that prints inside `lasting_streams`, as a shell command starts it."""
    command = ['bash', '-c', f'"$@" {shell}', 'bash', sys.executable, '-c', CONSOLE + body]
    return subprocess.run(command, capture_output=True, env={**os.environ, **environment}, timeout=200)


@pytest.mark.skipif(os.name != 'posix', reason='a shell of POSIX starts the programs')
class TestOutput:
    @pytest.mark.parametrize('encoding', ['cp1252', 'ascii', 'utf-8'])
    def test_letters_that_an_encoding_lacks(self, encoding):
        result = speak("    print('\\u65e5\\u672c.png \\udcff')", '', PYTHONIOENCODING=encoding)
        assert result.returncode == 0 and not result.stderr
        assert (
            result.stdout.decode(encoding) == ('日本' if encoding == 'utf-8' else '\\u65e5\\u672c') + '.png \\udcff\n'
        )

    @pytest.mark.parametrize('closed', ['>&-', '2>&-', '<&-', '<&- >&- 2>&-'])
    def test_closed_streams(self, closed, tmp_path):
        """A file that is opened later must not get the number of one: what is printed would go into it."""
        path = tmp_path / 'file'
        body = f"""
    file = open({str(path)!r}, 'w')
    print('to nobody'); print('nor this', file=sys.stderr); sys.stdin.read()
    import os
    os.write(1, b'nor that'); os.write(2, b'nor that')
    file.write('content')
    file.close()
"""
        assert speak(body, f'{closed} {"" if "<" in closed else "</dev/null"}').returncode == 0
        assert path.read_text() == 'content'

    @pytest.mark.parametrize('output', ['>/dev/full', '| head -c 1'])
    def test_an_output_that_is_lost_on_the_way_ends_nothing(self, output, tmp_path):
        if 'full' in output and not Path('/dev/full').exists():
            pytest.skip('this system has no full device')
        body = f"""
    for _ in range(100_000):
        print('a line', flush=True)
    open({str(tmp_path / 'end')!r}, 'w').close()
"""
        result = speak(body, f'{output}; exit ${{PIPESTATUS[0]}}')
        assert result.returncode == 0 and (tmp_path / 'end').exists()
        (warning,) = result.stderr.decode().splitlines()
        assert 'can be written no more' in warning
