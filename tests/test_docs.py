"""The documents keep up with the code: every error sentence is explained, and the hooks' example runs."""

import ast
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image

from vim_timm import ops, train

ROOT = Path(__file__).parents[1]
ERRORS = {'UserError', 'TrainingStopped', 'Preempted', 'Refusal', 'CheckpointError'}


def plain(text):
    return re.sub(r'[`\'"]', '', text)


TROUBLES = plain((ROOT / 'docs' / 'troubleshooting.md').read_text())


def sentences():
    """The longest fixed part of every sentence that an error is raised with, and where."""
    for path in sorted((ROOT / 'vim_timm').rglob('*.py')):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, 'id', '') in ERRORS and node.args:
                parts = [part.value for part in ast.walk(node.args[0]) if isinstance(part, ast.Constant)]
                fixed = [plain(part).strip(' :;,(') for part in parts if isinstance(part, str)]
                longest = max(fixed, key=len, default='')
                if len(longest) > 8:
                    yield pytest.param(longest, id=f'{path.stem}-{node.lineno}')


@pytest.mark.parametrize('sentence', list(sentences()))
def test_every_error_sentence_has_its_mend(sentence):
    assert sentence in TROUBLES


@pytest.mark.parametrize(
    'name, rows', [('architecture', r'operator \((.*?)\)'), ('add-a-kernel', r'tensors \((.*?)\)')]
)
def test_every_operator_is_named(name, rows):
    (named,) = re.findall(rows, (ROOT / 'docs' / f'{name}.md').read_text())
    assert plain(named).split(', ') == list(ops.OPERATORS)


@pytest.mark.parametrize('package', ['ops', 'models'])
def test_every_module_of_operators_and_families_is_in_the_tree(package):
    tree = re.search(r'^    vim_timm/\n(?:    .*\n)+', (ROOT / 'docs' / 'architecture.md').read_text(), re.MULTILINE)[0]
    part = re.search(rf'^      {package}/(?:.*\n(?=        ))+.*\n', tree, re.MULTILINE)[0]
    files = {path.name for path in (ROOT / 'vim_timm' / package).glob('*.py')} - {'__init__.py'}
    assert files <= set(re.findall(r'\b\w+\.py\b', part))


def test_example_of_the_hooks_runs(tmp_path, monkeypatch, capsys):
    class Pictures:
        classes = ['dark', 'bright']

        def __init__(self, root, split, download):
            self.labels = [i % 2 for i in range(16)]

        def __len__(self):
            return len(self.labels)

        def __getitem__(self, index):
            return Image.fromarray(np.full((16, 16, 3), 20 + 200 * self.labels[index], np.uint8)), self.labels[index]

    text = (ROOT / 'docs' / 'own-data-loss-metric-callback.md').read_text()
    code, command = re.search(r'```python\n(.*?)```', text, re.DOTALL)[1], re.search(r'mine.py (--.*)', text)[1]
    monkeypatch.setattr(torchvision.datasets, 'SVHN', Pictures)
    monkeypatch.setattr(sys, 'argv', ['mine.py'])
    names = {'__name__': 'mine'}
    exec(compile(code, 'mine.py', 'exec'), names)
    small = '--epochs 2 --batch-size 8 --workers 0 --device cpu --model test_vit --img-size 16 --num-classes 2'.split()
    names['main']([*command.split(), *small, '--mixup', '0.2', '--output', str(tmp_path), '--experiment', 'a'])
    assert 'epoch 1 balanced' in capsys.readouterr().out
    assert 'eval_balanced' in (tmp_path / 'a' / 'summary.csv').read_text()
    assert train.parse_args(command.split()).eval_metric == 'balanced'
