"""Look at a data set before training: `python -m vim_timm.data FOLDER [--page FILE] [flags of train.py]`.

Writes one HTML page: counts, sizes, files that are no data, a picture a class, near-duplicates between the splits, and
the first training batch as the model will see it.
"""

if __name__ == '__main__':  # the command line is read before torch is imported
    import sys

    from vim_timm import commands

    sys.exit(commands.main('data'))

import sys
from collections.abc import Sequence

from torch.utils.data import IterableDataset
from tqdm import tqdm

from .. import train
from ..engine import build
from ..engine.loop import Hooks
from ..errors import UserError, run
from ..files import write_atomically
from ..report.dataset import Split, dataset_page
from ..report.samples import as_picture
from ..settings import Process, parsers
from . import class_names, describe, train_loader
from .survey import survey
from .workers import usual_workers

BATCH = 32  # images of the first batch that are shown


def look(argv: Sequence[str]) -> str:
    """Write the page, and return its path.

    Raises:
        UserError: the settings or the data are wrong.
    """
    own, process = parsers.data(argv), Process()
    args, datasets = train.make_datasets(own.settings, Hooks())
    if any(isinstance(dataset, IterableDataset) for dataset in datasets):
        raise UserError(f'{args.dataset} is a stream: its images cannot be looked at one by one')
    args = args.replace(model=build.current_name(args.model), pretrained=False, initial_checkpoint='')
    data_config = build.resolve_images(build.make_training_model(args, process), vars(args))
    size = min(BATCH, args.batch_size, len(datasets[0]))
    small = args.replace(batch_size=size, workers=0, max_unreadable=10**6, data_in_memory=False, epoch_repeats=0)
    loader = train_loader(small, process, datasets[0], data_config)
    splits = []
    for name, dataset in zip((args.train_split, args.val_split), datasets):
        with tqdm(total=len(dataset), desc=name, unit='img', disable=not sys.stderr.isatty()) as bar:
            found = survey(dataset, as_picture, usual_workers(args), bar.update)
        splits.append(Split(name, dataset, found, describe(dataset, name, args)))
        print(splits[-1].line, flush=True)
        unread = [place for place, seen in enumerate(found) if seen.error]
        if unread:
            first = f'{splits[-1].file(unread[0])}: {found[unread[0]].error}'
            print(f'{name}: {len(unread)} of them cannot be read, first {first}', flush=True)
        turned = [place for place, seen in enumerate(found) if seen.turned]
        if turned:
            first = splits[-1].file(turned[0])
            print(f'{name}: {len(turned)} with an orientation in EXIF data, which is not applied, first {first}')
    title = f'Data in {args.data_dir or args.dataset}'
    batch = next(iter(loader.epoch(0)))
    write_atomically(own.page, dataset_page(title, splits, class_names(datasets[0]), batch, data_config))
    return own.page


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run(lambda words: print(f'page: {look(words)}'), 'data', argv)
