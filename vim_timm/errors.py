"""A user's mistake ends in one sentence and an exit status, never in a traceback."""

import contextlib
import difflib
import os
import pickle
import reprlib
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence

from .console import lasting_streams

BAD_INPUT, STOPPED, PREEMPTED = 2, 3, 75  # exit statuses; 75 is EX_TEMPFAIL: saved, start me again with --resume auto

# What libraries raise over a wrong name, argument, file or size.
_MISTAKES = (
    RuntimeError, TypeError, ValueError, KeyError, AttributeError, AssertionError, ImportError, OSError, EOFError,
    NotImplementedError, pickle.UnpicklingError, MemoryError,
)  # fmt: skip

_NO_DEVICE_MEMORY = ('out of memory', '_STATUS_ALLOC_FAILED')  # of CUDA, MPS; cuDNN and cuBLAS
_NO_HOST_MEMORY = ("can't allocate memory", 'Cannot allocate memory', 'bad_alloc')  # of torch; the system; C++

_LOST_RANK = 'another rank of this run died or hangs'
_LOST = ('Connection closed by peer', 'Connection reset by peer', 'Timed out waiting', 'pair closure', 'Broken pipe')
_LOST_WORKER = (
    'killed by signal', 'exited unexpectedly', 'shared memory', 'Too many open files', 'Cannot allocate memory',
    'items of ancdata', 'unable to mmap', 'No space left on device',
)  # fmt: skip


class UserError(RuntimeError):
    """What is wrong and how to mend it, in one sentence."""

    status = BAD_INPUT


class TrainingStopped(UserError):
    """Training cannot go on: the data or the numbers are at fault, not the command line."""

    status = STOPPED


class OutOfMemory(UserError):
    """What is computed at once does not fit; the sentence says how to make it smaller."""

    status = STOPPED


class Preempted(UserError):
    """A signal asked the run to end; its state is saved.

    Args:
        folder: of the run, where it can go on.
    """

    status = PREEMPTED

    def __init__(self, text: str, folder: str = ''):
        super().__init__(text)
        self.folder = folder


def sentence(error: BaseException) -> str:
    """The part of an error's text worth reading: its first line, or the last one of a worker's traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if any('Traceback (most recent call last)' in line for line in lines):
        return lines[-1].split(': ', 1)[-1]
    text = lines[0] + (f' {lines[1]}' if lines[0].endswith(':') and len(lines) > 1 else '')
    return text if len(text) <= 400 else f'{text[:400]} ...'


def out_of_memory(error: BaseException) -> str:
    """The sentence for an error that says that a device or the host has no more memory, or ''."""
    if isinstance(error, OutOfMemory):
        return str(error)
    text = str(error)
    if any(words in text for words in _NO_DEVICE_MEMORY):
        return 'out of device memory: lower --batch-size, or add --amp or --grad-checkpointing'
    if isinstance(error, MemoryError) or any(words in text for words in _NO_HOST_MEMORY):
        return 'out of memory: lower --batch-size or --workers, or add --amp or --grad-checkpointing'
    return ''


def shown(text: str) -> str:
    """A text from a file as it may stand in a sentence: short, and on one line."""
    return text if text.isprintable() and len(text) <= 100 else reprlib.repr(text)


def called(program: str) -> str:
    """How a user calls a program, in the way in which this process was started."""
    start = os.path.basename(sys.argv[0])
    if start not in ('vim-timm', '__main__.py') or 'vim' not in sys.argv[0]:
        return program or 'vim-timm'
    return f'{"vim-timm" if start == "vim-timm" else "python -m vim_timm"} {program.removesuffix(".py")}'.rstrip()


def meant(word: str, names: Iterable[str], count: int = 2) -> str:
    """`; did you mean X or Y?` with those of `names` that are spelled most like a word, or ''."""
    near = difflib.get_close_matches(word, [name for name in names if name], count)
    return f'; did you mean {" or ".join(near)}?' if near else ''


@contextlib.contextmanager
def explain(what: str = '') -> Iterator[None]:
    """Turn whatever a library raises in this block into a UserError that starts with `what`."""
    try:
        yield
    except UserError:
        raise
    except _MISTAKES as error:
        if str(error).startswith('DataLoader worker (pid'):  # it comes by a signal, wherever the process is
            raise TrainingStopped(lost_worker(error)) from error
        if out_of_memory(error):
            raise OutOfMemory(out_of_memory(error)) from error
        raise UserError(f'{what}: {sentence(error)}' if what else sentence(error)) from error


def run(main: Callable[[Sequence[str]], object], program: str, argv: Sequence[str] | None = None) -> int:
    """Call `main(argv)` and return the exit status; expected failures go to stderr as one sentence.

    The traceback of anything else is shown: it is a bug. Rank 0 speaks for all when every rank fails alike.
    """
    with lasting_streams(), _quiet():
        return _run(main, program, argv)


def _run(main: Callable[[Sequence[str]], object], program: str, argv: Sequence[str] | None) -> int:
    try:
        main(sys.argv[1:] if argv is None else argv)
        return 0
    except UserError as error:
        status, text = error.status, sentence(error)
    except KeyboardInterrupt:
        status, text = 130, 'interrupted'
    except Exception as error:
        status, text = STOPPED, _failure(error)
        if not text:
            raise
    # The exception is gone by now, and with it the loaders and their workers that its traceback held.
    rank = os.environ.get('RANK', '0')
    print(f'{called(program)}: {f"rank {rank}: " if rank != "0" else ""}error: {text}', file=sys.stderr, flush=True)
    if text.startswith(_LOST_RANK):
        sys.stdout.flush()
        os._exit(status)  # threads that still wait for the rank would abort an orderly end, with another status
    return status


def quiet_pillow() -> None:
    """Keep from the console what Pillow remarks on metadata of images; it warns of nothing that is read wrongly."""
    warnings.filterwarnings('ignore', module=r'PIL\.')


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep others' remarks from the console: Pillow's, and tracebacks of torch's loaders that lost their workers."""

    def show(unraisable: 'sys.UnraisableHookArgs') -> None:
        where = getattr(unraisable.object, '__qualname__', '')
        if 'DataLoaderIter' not in where and not str(unraisable.exc_value).startswith('DataLoader worker'):
            before(unraisable)

    before, sys.unraisablehook = sys.unraisablehook, show
    try:
        with warnings.catch_warnings():
            quiet_pillow()
            yield
    finally:
        sys.unraisablehook = before


def lost_worker(error: BaseException) -> str:
    """What an error means that was raised while a batch was fetched, or '' if no loading process is lost."""
    text = str(error)
    from_worker = 'in DataLoader worker process' in text  # what its own code raised
    if isinstance(error, (OSError, EOFError, pickle.UnpicklingError)) and not from_worker:
        pass  # the connection to it broke, or it could not be started
    elif not any(words in text for words in _LOST_WORKER):
        return ''
    return (
        'a data loading process died or cannot be reached (too little memory, shared memory or file descriptors? lower '
        f'--workers): {sentence(error)}'
    )


def _failure(error: Exception) -> str:
    """What an error inside the loop means, if it is one of those that are nobody's bug."""
    text = str(error)
    if 'DataLoader worker' in text and lost_worker(error):
        return lost_worker(error)
    if out_of_memory(error):
        return out_of_memory(error)
    if isinstance(error, OSError):
        return f'{error.strerror or sentence(error)}{f": {error.filename}" if error.filename else ""}'
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if 'TorchDynamoException' in kinds:
        return f'--torchcompile: {sentence(error)}'
    if 'DistError' in kinds or any(words in text for words in _LOST):
        return f'{_LOST_RANK}: {sentence(error)}'
    if 'in DataLoader worker process' in text:
        return f'an image cannot be loaded or augmented ({sentence(error)}); --workers 0 shows where'
    return ''
