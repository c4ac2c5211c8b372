"""Processes that start in a fraction of the time: a server that has imported what timm and reports build on forks them.

How a program starts from nothing is not seen by them; tests of command lines and of torchrun start programs so. What
these libraries read from the environment when they are imported is the server's.
"""

import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path

SERVER = multiprocessing.get_context('forkserver')
SERVER.set_forkserver_preload(['torchvision', 'huggingface_hub.hf_api', 'safetensors.torch', 'matplotlib.figure'])
TRAIN = 'import sys; from vim_timm import train; sys.exit(train.main(sys.argv[1:]))'
VALIDATE = TRAIN.replace('train', 'validate')


class Python:
    """`python -c code arguments` with one thread, started when it is made; like a Popen of which output is a file.

    Args:
        output: File for what it writes to stdout and stderr.
        environment: Variables besides those of this process.
    """

    def __init__(self, code: str, *arguments: str, output: Path, environment: dict[str, str] | None = None):
        own = {**os.environ, 'OMP_NUM_THREADS': '1', **(environment or {})}
        self.output = output
        self.process = SERVER.Process(target=_execute, args=(code, arguments, str(output), own))
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float = 600) -> tuple[int, str]:
        """Exit status, the negative number of a signal that ended it, and what was written."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(self.output.read_text(encoding='utf-8'))
        return self.process.exitcode, self.output.read_text(encoding='utf-8')

    def send_signal(self, number: signal.Signals) -> None:
        """Unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


def ranks(code: str, *arguments: str, count: int, folder: Path) -> list[Python]:
    """One process for each rank of a distributed run on this machine."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    world = dict(WORLD_SIZE=str(count), MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    folder.mkdir(parents=True, exist_ok=True)
    return [
        Python(
            code, *arguments, output=folder / f'rank{rank}.txt', environment={**world, 'RANK': rank, 'LOCAL_RANK': rank}
        )
        for rank in map(str, range(count))
    ]


def finish(processes: list[Python]) -> str:
    """What the processes wrote, all of which end well."""
    ended = [process.wait() for process in processes]
    output = '\n'.join(text for _, text in ended)
    assert not any(status for status, _ in ended), output
    return output


def _execute(code: str, arguments: tuple[str, ...], output: str, environment: dict[str, str]) -> None:
    import torch

    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    multiprocessing.set_start_method(None, force=True)  # its own children are not the server's
    sys.argv = ['-c', *arguments]
    exec(code, {'__name__': '__main__'})
