"""Run a script that uses timm with this package's models registered: `python -m vim_timm.run SCRIPT ARGS...`."""

import runpy
import sys

import vim_timm.models  # noqa: F401  registers the models with timm


def main() -> None:
    """Take the place of SCRIPT's own `python SCRIPT ARGS...`.

    timm is imported already, so a script that lies beside a source tree of timm uses the installed one.
    """
    if len(sys.argv) < 2:
        raise SystemExit('usage: python -m vim_timm.run SCRIPT ARGS...')
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name='__main__')


if __name__ == '__main__':
    main()
