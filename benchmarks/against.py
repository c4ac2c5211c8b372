"""Vision Mamba of this checkout beside that of another one: `python -m benchmarks.cpu --against PATH`.

Either checkout has a process of its own, which runs this file with that checkout's package; the two take turns, run by
run, so that a busy machine slows both alike. A ratio is that of the fastest runs; that of the medians stands beside it
to show how steady they were.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Optional

HERE = Path(__file__).resolve().parents[1]
PAIRS = 4  # of processes: one may be slower than another for as long as it lives, by where its memory lies


class Checkout:
    """A process that runs one setting at a time with the package of one checkout.

    Args:
        root: Folder that holds `vim_timm`, its CPU kernel built.
        backend: What VIM_TIMM_SCAN becomes; a backend that cannot run there ends the process with its reason.
    """

    def __init__(self, root: Path, backend: str):
        environment = {**os.environ, 'PYTHONPATH': str(root), 'VIM_TIMM_SCAN': backend}
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen([sys.executable, __file__, str(root)], env=environment, cwd=root, **pipes)

    def ask(self, setting: Optional[dict] = None) -> list[float]:
        """Seconds on the clock and of processor time of a run: the first of `setting`, or another of the last one."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps(setting) + '\n')
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            raise SystemExit(self.process.wait() or 1) from None  # it has said on stderr what is wrong

    def close(self) -> None:
        self.process.communicate()


def compare(other: Path, settings: list[dict], backend: str, repeats: int) -> list[dict]:
    """Settings with the seconds of both checkouts, printed as they are measured.

    Args:
        settings: Of `runner`.
        repeats: Runs of each checkout, setting and pair of processes after two that warm it up.
    """
    rows = []
    for setting in settings:
        times: dict[str, list[float]] = {'this': [], 'other': []}
        which = 1 if setting['threads'] == 1 else 0  # processor time, which other programs hardly touch; else the clock
        for pair in range(PAIRS):
            roots = [('this', HERE), ('other', other.resolve())]
            checkouts = {name: Checkout(root, backend) for name, root in (roots if pair % 2 else roots[::-1])}
            for checkout in checkouts.values():
                checkout.ask(setting)
                checkout.ask()
            for turn in range(pair, pair + repeats):
                for name in ('this', 'other') if turn % 2 else ('other', 'this'):
                    times[name].append(checkouts[name].ask()[which])
            for checkout in checkouts.values():
                checkout.close()
        best, median = ({name: of(found) for name, found in times.items()} for of in (min, statistics.median))
        row = {**setting, 'backend': backend, 'best': best, 'median': median, 'runs': PAIRS * repeats}
        row |= {'speed_vs_other': best['other'] / best['this']}
        rows.append(row)
        print(
            '{name} {mode:5} batch {batch} {size:4} px {threads} thread(s)'.format(**setting),
            f'{backend:9} {best["this"] * 1e3:9.2f} ms, other {best["other"] * 1e3:9.2f} ms:',
            f'{row["speed_vs_other"]:.3f} of its speed, by medians {median["other"] / median["this"]:.3f}',
            flush=True,
        )
    return rows


def runner(name: str, size: int, batch: int, mode: str, threads: int) -> Callable[[], None]:
    """A function that runs one inference, or one training step without an optimizer, on fixed numbers."""
    import timm
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=size).train(mode == 'train')
    images = torch.randn(batch, 3, size, size)

    def infer() -> None:
        with torch.inference_mode():
            model(images)

    def train() -> None:
        model.zero_grad()
        model(images).square().mean().backward()

    return {'infer': infer, 'train': train}[mode]


def serve(root: str) -> None:
    """Runs what the lines of standard input ask for, and writes what each took."""
    import vim_timm

    if Path(root) not in Path(vim_timm.__file__).parents:
        sys.exit(f'{root} has no package vim_timm: {vim_timm.__file__} was found')
    for line in sys.stdin:
        setting = json.loads(line)
        if setting:
            run = runner(**setting)
        clock, processor = time.perf_counter(), time.process_time()
        run()
        print(json.dumps([time.perf_counter() - clock, time.process_time() - processor]), flush=True)


if __name__ == '__main__':
    serve(sys.argv[1])
