"""Every registered family passes what `families.py` asks."""

import families
import pytest

import vim_timm  # noqa: F401  registers the models

FAMILIES = [families.structures(module) for module in families.SMALL if module != 'toy_family']


@pytest.mark.parametrize('name', [names[0] for names in FAMILIES])
@pytest.mark.parametrize('check', families.SLOW, ids=lambda check: check.__name__)
def test_one_model_of_a_family(check, name):
    check(families.builder(name))


@pytest.mark.filterwarnings('ignore:.*torch.jit:FutureWarning')
@pytest.mark.parametrize('name', [name for names in FAMILIES for name in names])
@pytest.mark.parametrize('check', families.CHECKS, ids=lambda check: check.__name__)
def test_family(check, name):
    check(families.builder(name))
