"""The batch of an evaluation that fits: --validation-batch-size auto, and --batch-size auto of validate.py."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from ..data import Batch, Loader
from ..errors import OutOfMemory, TrainingStopped, out_of_memory
from ..settings import Process
from ..tasks import Task
from .evaluate import predict
from .log import Progress

SHARE = 0.7  # of the free memory: the loader's next batch and the allocator's rounding need some, too
MOST_BYTES = 16 * 2**30  # a batch of as much keeps a GPU busy
MOST_PIXELS = 2**26  # 1024 images of 224 x 224; each loading process holds several batches in the host's memory


def most_images(images: int, readers: int, pixels: int) -> int:
    """The largest batch that is of use.

    Args:
        images: that this rank evaluates.
        readers: processes that read them, of which each is to have a batch; 0 where they are in memory.
        pixels: of an image, in one channel.
    """
    share = images // readers if readers else 1 << max(images - 1, 0).bit_length()
    return max(1, min(share, MOST_PIXELS // pixels))


def largest_batch(memory: Callable[[int], int], room: int, most: int, least: int) -> int:
    """The largest power of two of images, at most `most`, that takes no more than `room` bytes.

    It follows from batches of 1, 4, 16, ... images that are tried, up to an eighth of it, and from what each image has
    taken in the last of them. None is tried that could take more than `room`.

    Args:
        memory: tries a batch of so many images and returns the bytes that it takes. Where more than one turn out not to
            fit, those tried before are the most.
        least: bytes of an image at least.
    """
    size, taken = 1, memory(1)
    image: float = max(taken, least)
    while 4 * taken <= room and 4 * size <= most:
        before = size, taken
        try:
            size, taken = 4 * size, memory(4 * size)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            return size
        image = max((taken - before[1]) / (size - before[0]), least)
        if 8 * size >= min(most, size + (room - taken) / image):
            break
    count = max(1, int(min(most, size + (room - taken) / image)))
    return 1 << count.bit_length() - 1


def agreed(size: int, process: Process) -> int:
    """The least of all ranks' numbers; every rank must ask."""
    smallest = torch.tensor(size, device=process.device)
    if process.world_size > 1:
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
    return int(smallest)


def fit_batch(
    task: Task, loader: Loader, process: Process, progress: Progress, compute: Callable[[Batch], object] | None = None
) -> int:
    """Let a loader read the largest batch that fits, the same on every rank; say which, and return it.

    Args:
        compute: what an evaluation makes of a batch, where that is more than predictions and their metrics.

    Raises:
        OutOfMemory, TrainingStopped: another rank has no memory for one image, or has failed.
    """
    try:
        size, why = choose(compute or (lambda batch: _compute(task, process, batch)), loader, process)
    except Exception as error:
        agreed(0 if out_of_memory(error) else -1, process)  # the others wait for its answer
        raise
    size = agreed(size, process)
    if size < 1:
        kind = TrainingStopped if size else OutOfMemory  # validate.py --retry goes on after the latter, on every rank
        raise kind('another rank of this run cannot evaluate one image, and says why')
    loader.rebatch(size)
    progress.say(f'evaluation in batches of {size} images: {why}')
    return size


def choose(compute: Callable[[Batch], object], loader: Loader, process: Process) -> tuple[int, str]:
    """This rank's batch, and what decided it in words."""
    if process.device.type != 'cuda':
        return loader.batch_size, 'auto looks for larger ones on CUDA devices only'
    size, free = try_batches(compute, loader, process)
    return size, f'{free / 2**30:.1f} GiB of the device are free'


def try_batches(compute: Callable[[Batch], object], loader: Loader, process: Process) -> tuple[int, int]:
    """The largest batch by trials on zeros, and the bytes of the device that are free."""
    device, shape = process.device, loader.data_config['input_size']

    def try_zeros(size: int) -> int:
        """Bytes that the allocator asks the device for."""
        for _ in range(2):  # the first time kernels are compiled and tuned, with memory of their own
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved(device)
            images = torch.zeros(size, *shape, device=device, dtype=process.dtype)
            keys = torch.arange(size, device=device)[:, None].expand(size, 3)
            compute(Batch(images.contiguous(memory_format=loader.layout), torch.zeros_like(keys[:, 0]), keys))
            del images
        return torch.cuda.memory_reserved(device) - before

    torch.cuda.empty_cache()  # what it cannot give back, such as a recorded step's, an evaluation cannot have either
    free = torch.cuda.mem_get_info(device)[0]
    room = min(int(SHARE * free), MOST_BYTES)
    most = most_images(len(loader) * loader.batch_size, loader.readers, shape[1] * shape[2])
    least = shape[0] * shape[1] * shape[2] * process.dtype.itemsize
    with torch.compiler.set_stance('force_eager'):  # no compilation for sizes that do not come again
        size = largest_batch(try_zeros, room, most, least)
    torch.cuda.empty_cache()
    return size, free


def _compute(task: Task, process: Process, batch: Batch) -> None:
    task.eval()
    task.create_evaluator().update(predict(task, batch, process), batch.targets)
