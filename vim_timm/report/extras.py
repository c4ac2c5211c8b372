"""The libraries that only reports need: looked for before a long evaluation, imported when first used."""

import importlib.util
from collections.abc import Sequence

from ..errors import UserError

LIBRARIES = ('sklearn', 'torchmetrics', 'matplotlib')


def require(names: Sequence[str] = LIBRARIES) -> None:
    """Raise a UserError unless all these libraries are installed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"reports need {' and '.join(missing)}: pip install 'vim-timm[train]'")
