"""Compare runs of training: `python -m vim_timm.compare RUN RUN...`."""

if __name__ == '__main__':  # the command line is read before anything is imported
    import sys

    from vim_timm import commands

    sys.exit(commands.main('compare'))

from collections.abc import Sequence

from .errors import UserError, run
from .files import printable, write_atomically
from .settings import parsers


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""

    def body(arguments: Sequence[str]) -> None:
        from .report.comparison import as_text, comparison_page, read_runs

        args = parsers.compare(arguments)
        found = read_runs(args.runs)
        runs = [one for one in found if one.rows]
        for one in found:
            if not one.rows:
                print(f'{printable(one.name)}: no epoch yet, left out')
        if not runs:
            raise UserError('none of the runs has an epoch yet')
        print(printable(as_text(runs)))
        write_atomically(args.output, comparison_page(runs))
        print(f'page: {args.output}')

    return run(body, 'compare', argv)
