"""Images a second of the training loader alone, without a model: `python -m benchmarks.loader FOLDER`.

FOLDER holds images by split and class (`--split` names the split). They are read as they are, and from webdataset
shards that are written into a temporary folder, each with 1, 2, 8 and 15 loading processes. Augmentation is what
`train.py` does without flags, with `--aa` RandAugment as well. The images come as often as `--images` needs; the count
begins when every process has handed over two batches, so that none was read ahead of it. Beside it stands the
processors' time for an image, which other programs hardly touch.
"""

import argparse
import gc
import os
import tarfile
import tempfile
import time
from pathlib import Path

import torch

import vim_timm  # noqa: F401  registers the models with timm
from vim_timm import data, train
from vim_timm.engine.process import start_process

CONFIG = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), interpolation='bicubic', crop_pct=0.9)


def write_shards(files: list[Path], target: Path, count: int) -> None:
    """Write images, whose folders are their classes, as so many shards."""
    classes = sorted({path.parent.name for path in files})
    (target / '_info.json').write_text('{}')  # timm asks for it
    for shard in range(count):
        with tarfile.open(target / f'train-{shard:04d}.tar', 'w', dereference=True) as tar:
            for place, path in enumerate(files[shard::count]):
                name, label = f'{shard:04d}{place:06d}', target / 'label'
                label.write_text(str(classes.index(path.parent.name)))
                tar.add(path, f'{name}.jpg')
                tar.add(label, f'{name}.cls')


def measure(flags: list[str], size: int) -> tuple[float, float]:
    """Images a second of the loader that the flags describe, in one epoch, and milliseconds of processors an image."""
    args = train.parse_args(flags)
    config = {**CONFIG, 'input_size': (3, size, size)}
    loader = data.train_loader(args, start_process(args), data.make_dataset(args, args.train_split, True, 3), config)
    ahead, begun, total, counted = 2 * loader.workers + 1, 0.0, 0, 0
    before = processors()
    for place, batch in enumerate(loader.unfinished(0)):
        total += len(batch.images)
        counted += len(batch.images) if place >= ahead else 0
        if place == ahead - 1:
            begun = time.perf_counter()
    rate = counted / (time.perf_counter() - begun)
    del loader  # only the processor time of processes that have ended is known
    gc.collect()
    return rate, 1000 * (processors() - before) / total


def processors() -> float:
    """Seconds that this process and those that it started have computed."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path, help='images as FOLDER/SPLIT/CLASS/*.jpg')
    parser.add_argument('--split', default='train')
    parser.add_argument('--workers', type=int, nargs='*', default=[1, 2, 8, 15], help='numbers of loading processes')
    parser.add_argument('--size', type=int, default=224, help='side of the images')
    parser.add_argument('--batch-size', type=int, default=32)
    parser.add_argument('--images', type=int, default=2000, help='images to count for each row')
    parser.add_argument('--aa', default='', help='a policy, such as rand-m9-mstd0.5-inc1')
    parser.add_argument('--device', help='where the batches go, and are normalized (default: a GPU if there is one)')
    options = parser.parse_args()
    device = options.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    common = f'--img-size {options.size} --batch-size {options.batch_size} --device {device}'
    common += f' --aa {options.aa}' if options.aa else ''
    cores = len(os.sched_getaffinity(0))
    print(f'{options.size} px, {cores} cores, batches on {device}, img/s (processors, ms an image)')
    print('| loading processes | JPEG folder | webdataset shards |')
    print('|---|---|---|', flush=True)
    with tempfile.TemporaryDirectory() as target:
        files = sorted((options.folder / options.split).glob('*/*'))
        needed = options.images + (2 * max(options.workers) + 2) * options.batch_size
        repeats = -(-needed // len(files))
        write_shards(files * repeats, Path(target), max(options.workers))
        for workers in options.workers:
            each = f'{common} --workers {workers}'.split()
            folder = ['--data-dir', str(options.folder), '--train-split', options.split]
            folder += ['--epoch-repeats', str(repeats)]
            shards = f'--dataset wds/shards --data-dir {target} --num-classes 1000'.split()
            shards += ['--train-num-samples', str(repeats * len(files))]
            shards += ['--train-split', f'train-{{0000..{max(options.workers) - 1:04d}}}.tar']
            cells = [measure([*each, *more], options.size) for more in (folder, shards)]
            print(f'| {workers} |', *(f'{rate:,.0f} ({spent:.2f} ms) |' for rate, spent in cells), flush=True)


if __name__ == '__main__':
    main()
