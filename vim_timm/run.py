"""Run a script that uses timm with this package's models registered: `python -m vim_timm.run SCRIPT ARGS...`."""

import os
import runpy
import sys


def main() -> None:
    """Take the place of SCRIPT's own `python SCRIPT ARGS...`.

    timm is imported already, so a script that lies beside a source tree of timm uses the installed one.
    """
    script = sys.argv[1] if len(sys.argv) > 1 else ''
    if not os.path.exists(script):
        what = f'there is no script {script}; ' if script not in ('', '-h', '--help') else ''
        raise SystemExit(f'{what}usage: python -m vim_timm.run SCRIPT ARGS...')
    import vim_timm.models  # noqa: F401  registers the models with timm

    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name='__main__')


if __name__ == '__main__':
    main()
