"""docs/models.md is what the registry says."""

from pathlib import Path

import pytest

from vim_timm.hub import catalogue
from vim_timm.ops import explain

PAGE = Path(__file__).parents[1] / 'docs' / 'models.md'
ROWS = {line.split('`')[1]: line for line in PAGE.read_text().splitlines() if line.startswith('| `')}


@pytest.mark.parametrize('name', list(catalogue.names()))
def test_a_model_is_as_the_page_says(name):
    reason = next(status.reason for status in explain() if status.name == 'cpu')
    if reason:
        pytest.skip(f'operators of the CPU kernel are counted: {reason}')
    assert catalogue.row(name) == ROWS[name], 'run `python -m vim_timm.hub.catalogue > docs/models.md`'


def test_the_page_has_no_other_model_of_ours_and_its_text_is_the_generators():
    ours = [name for name in ROWS if name.startswith(('vim', 'mae_', 'favit'))]
    assert ours == list(catalogue.names())
    text = PAGE.read_text()
    assert text.startswith(catalogue.HEAD) and text.endswith(catalogue.TIMM)
