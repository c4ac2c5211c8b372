"""`python -m vim_timm COMMAND ...`: the same as `vim-timm COMMAND ...`."""

import sys

from .commands import console

if __name__ == '__main__':
    sys.exit(console())
