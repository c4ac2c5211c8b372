"""A family of models is a page: `toy_family.py` passes this package's checks and timm's own tests."""

import subprocess
import sys
from pathlib import Path

import families
import pytest
import toy_family

ROOT = Path(__file__).parents[1]


def test_the_family_is_under_forty_lines():
    assert len([line for line in Path(toy_family.__file__).read_text().splitlines() if line]) < 40


@pytest.mark.filterwarnings('ignore:.*torch.jit:FutureWarning')
@pytest.mark.parametrize('check', families.CHECKS + families.SLOW, ids=lambda check: check.__name__)
def test_family(check):
    if check is families.a_masked_image_is_encoded_where_its_patches_stand:
        with pytest.raises(RuntimeError):  # its convolution wants the whole grid
            check(families.builder('toy'))
    else:
        check(families.builder('toy'))


def test_timms_own_tests_pass():
    command = [sys.executable, str(ROOT / 'tests/timm_suite/run.py'), '--import', 'toy_family', 'toy', '--', '-q']
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_the_document_shows_the_family():
    text = (ROOT / 'docs' / 'add-a-family.md').read_text()
    for part in Path(toy_family.__file__).read_text().split('\n\n\n'):
        if part.startswith(('class', 'default_cfgs', '@')):
            assert part.strip() in text
