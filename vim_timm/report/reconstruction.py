"""Reconstructed images: the gallery of a training run, and the numbers and pages of `validate.py --mae`."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ..data import Batch, Loader
from ..engine.evaluate import Watch, readable
from ..engine.process import any_rank
from ..errors import Preempted, UserError
from ..files import table, to_json, write_atomically
from ..layers.masking import sample_noise
from ..settings import Process
from ..tasks.masked import EVAL_SEED, MaskedImages, Reconstruction, psnr
from . import page, plots
from .chart import Line
from .evaluation import open_folder, remove_earlier
from .extras import require

SAMPLES = 8  # of a gallery
NOTHING = 'none of the images of the first process could be read'
WINDOW = 11  # sides of SSIM's Gaussian window of deviation 1.5
COLUMNS = {
    'mask_ratio': 'mask ratio', 'mse': 'MSE', 'mae': 'MAE', 'mean_psnr': 'mean of PSNR (dB)',
    'psnr_of_mean_mse': 'PSNR of mean MSE (dB)', 'ssim_composite': 'SSIM, composite', 'ssim_output': 'SSIM, output',
    'mse_of_visible_mean': 'MSE of the visible mean', 'mae_of_visible_mean': 'MAE of the visible mean',
    'mse_of_neighbour': 'MSE of the next channel', 'mae_of_neighbour': 'MAE of the next channel', 'loss': 'loss',
}  # fmt: skip
BANDS = {'missing': 'missing channels', 'mse_present': 'MSE, others', 'mse_missing': 'MSE, missing ones'}
EXPLANATIONS = """Of L patches at a mask ratio r, L * (1 - r) rounded down stay visible. MSE, MAE and PSNR are over
hidden pixels alone and divided by their number, for pixels in 0 to 1 and predictions clamped to that. The composite has
the original pixels where they were visible; the output is all predicted, also where the loss asks for nothing. The
visible mean fills every channel with the mean of its visible pixels."""
ORACLE = (
    'The model predicts patches without their mean and standard deviation (--norm-pix-loss). To show and to measure '
    'pixels, those of the true patch are put back, which the model does not know: an oracle.'
)


def caption(task: MaskedImages, size: tuple[int, int]) -> str:
    """What the pictures of a gallery are, of images of a size (H, W)."""
    model = task.autoencoder()
    text = (
        f'Mask ratio {100 * model.mask_ratio:g} %: {model.describe_mask(size)} are hidden (grey). In the '
        'reconstruction hidden patches are as predicted, the others are pasted from the original.'
    )
    if model.in_chans not in (1, 3):
        text += f' Channel 1 of {model.in_chans} is shown.'
    return f'{text} {ORACLE}' if task.norm_pix_loss else text


@torch.inference_mode()
def reconstruct(
    task: MaskedImages, process: Process, batch: Batch, ema: bool, present: torch.Tensor | None = None
) -> Reconstruction:
    """`MaskedImages.reconstruct` in evaluation mode.

    Raises:
        UserError: a pixel is not a finite number.
    """
    task.eval()
    finite = torch.isfinite(batch.images).flatten(1).all(dim=1)
    if not finite.all():
        raise UserError(f'image {int(batch.places[~finite][0])} of the data has pixels that are not finite numbers')
    with process.autocast():
        return task.reconstruct(batch, ema, present)


def draw(task: MaskedImages, result: Reconstruction) -> bytes:
    """The gallery of the first images of a batch as PNG."""
    masked = torch.where(result.mask > 0, 0.5, result.images)
    triples = [
        [_picture(images[i]) for images in (result.images, masked, result.composite)]
        for i in range(min(SAMPLES, len(result.images)))
    ]
    return plots.reconstructions(triples, caption(task, (result.images.shape[2], result.images.shape[3])))


def _picture(image: torch.Tensor) -> np.ndarray:
    """(C, H, W) in 0..1 -> what is shown of it, (H, W, 3): colours, or the first channel in grey."""
    image = image if image.shape[0] == 3 else image[:1].expand(3, -1, -1)
    return image.permute(1, 2, 0).float().cpu().numpy()


class Gallery:
    """Pictures of the same evaluation images all through a training run, as PNG files and for TensorBoard."""

    def __init__(self, process: Process, loader: Loader, interval: int):
        self.process, self.loader, self.interval = process, loader, interval
        self.batch: Batch | None = None

    def after_epoch(self, trainer: Any) -> None:
        """Draw where the interval says so, and at the end."""
        if trainer.finished() or (self.interval and trainer.epoch % self.interval == 0):
            self.draw(trainer)

    def draw(self, trainer: Any) -> None:
        """Write reconstruction.png and reconstruction-EPOCHS.png into the run's folder."""
        try:
            require(['matplotlib'])
        except UserError as error:  # training goes on without pictures
            trainer.progress.say(f'no gallery: {error}')
            return
        self.batch = self.batch or first(self.loader)
        if self.batch is None:
            trainer.progress.say(f'no gallery: {NOTHING}')
            return
        result = reconstruct(trainer.task, self.process, self.batch, trainer.evaluates_ema())
        png = draw(trainer.task, result)
        path = os.path.join(trainer.folder, 'reconstruction.png')
        for name in (path, os.path.join(trainer.folder, f'reconstruction-{trainer.epoch}.png')):
            write_atomically(name, png)
        if trainer.trackers:
            trainer.trackers.picture('reconstruction', png, trainer.epoch)
        trainer.progress.say(f'gallery: {path}')


@contextmanager
def hiding(task: MaskedImages, ratio: float, ema: bool = False) -> Iterator[None]:
    """Let the model hide another share of the patches."""
    model = task.autoencoder(ema)
    own, model.mask_ratio = model.mask_ratio, ratio
    try:
        yield
    finally:
        model.mask_ratio = own


def measure(
    task: MaskedImages, loader: Loader, process: Process, ratio: float, ema: bool = False, watch: Watch | None = None
) -> dict[str, float]:
    """The metrics of a split's images at a mask ratio, by the names in `COLUMNS`, and their number (`count`).

    SSIM is left out for images that are smaller than its window.

    Raises:
        Preempted: a signal came.
    """
    sums: dict[str, torch.Tensor] = {}
    with hiding(task, ratio, ema):
        for batch in _batches(loader, process, watch):
            for name, values in scores(task, process, batch, ema).items():
                _add(sums, name, values)
    means, count = _means(sums, process)
    means['psnr_of_mean_mse'] = float(psnr(torch.tensor(means['mse'])))
    return {'mask_ratio': ratio, **{name: means[name] for name in COLUMNS if name in means}, 'count': count}


def missing_numbers(task: MaskedImages) -> list[int]:
    """Numbers of missing channels that `measure_bands` compares; none without masks by channel."""
    model = task.autoencoder()
    if not model.by_channel:
        return []
    most = model.in_chans - 1
    return list(dict.fromkeys([0, *(2**i for i in range(8) if 2**i < most), most]))


def measure_bands(
    task: MaskedImages, loader: Loader, process: Process, watch: Watch | None = None
) -> list[dict[str, float]]:
    """`measure_missing` from no channel to all but one, in steps that double; nothing without masks by channel."""
    return [measure_missing(task, loader, process, missing, False, watch) for missing in missing_numbers(task)]


def galleries(task: MaskedImages, loader: Loader, process: Process, ratios: Sequence[float]) -> list[bytes]:
    """A gallery (PNG) of this rank's first images for each mask ratio; none where it has none."""
    batch, pngs = first(loader), []
    if batch is None:
        return []
    for ratio in ratios:
        with hiding(task, ratio):
            pngs.append(draw(task, reconstruct(task, process, batch, False)))
    return pngs


def notes(task: MaskedImages) -> list[str]:
    """What has to be said of the numbers of a report."""
    return [' '.join(EXPLANATIONS.split()), *([ORACLE] if task.norm_pix_loss else [])]


def first(loader: Loader) -> Batch | None:
    """The images that a gallery shows, of this rank's first batch that has one which could be read, if one has."""
    for batch in map(readable, loader.epoch(0)):
        if len(batch.keys):
            return Batch(batch.images[:SAMPLES], batch.targets[:SAMPLES], batch.keys[:SAMPLES])
    return None


def measure_missing(
    task: MaskedImages, loader: Loader, process: Process, missing: int, ema: bool = False, watch: Watch | None = None
) -> dict[str, float]:
    """Errors where `missing` channels of each image, drawn at random, are not there, by the names in `BANDS`."""
    sums: dict[str, torch.Tensor] = {}
    for batch in _batches(loader, process, watch):
        noise = sample_noise(EVAL_SEED + 1, batch.keys[:, 2:], batch.images.shape[1])
        present = noise.argsort(dim=1).argsort(dim=1) >= missing
        result = reconstruct(task, process, batch, ema, present)
        for name, part in (('mse_present', present), ('mse_missing', ~present)):
            if part.any():
                _add(sums, name, result._replace(mask=result.mask * part[:, :, None, None]).errors()[:, 0])
    means, _ = _means(sums, process)
    return {'missing': missing, **means}


def _batches(loader: Loader, process: Process, watch: Watch | None) -> Any:
    if watch:
        watch.progress.wait_for(f'{loader.awaited} to evaluate')
    for step, batch in enumerate(loader.epoch(0), 1):
        batch = readable(batch)
        if len(batch.keys):
            yield batch
        if watch is None:
            continue
        watch.speed.update(len(batch.keys))
        watch.progress.wait_for('') if step == 1 else None
        if watch.progress.due(step):
            watch.progress.show(f'evaluation [{step}/{len(loader)}]  {watch.speed}')
        if watch.signals:
            break
    if any_rank(bool(watch and watch.signals), process):
        raise Preempted('stopped by a signal in an evaluation: start it again')
    loader.unreadable.share(process.world_size)


def _add(sums: dict[str, torch.Tensor], name: str, values: torch.Tensor) -> None:
    """Count the images' values (B,) by their sum and number; on MPS, which has no float64, in float32."""
    values = values if values.device.type == 'mps' else values.double()
    both = torch.stack([values.sum(), values.new_tensor(len(values))])
    sums[name] = sums[name] + both if name in sums else both


def _means(sums: Mapping[str, torch.Tensor], process: Process) -> tuple[dict[str, float], int]:
    """Means over the images of all ranks, some of which may have none, and the number of images.

    Raises:
        UserError: there is no image at all.
    """
    mine = {name: both.tolist() for name, both in sums.items()}
    shares: list[Any] = [mine]
    if process.world_size > 1:
        shares = [None] * process.world_size
        dist.all_gather_object(shares, mine)
    names = list(dict.fromkeys(name for share in shares for name in share))
    if not names:
        raise UserError('no image could be read')
    totals, counts = np.sum([[share.get(name, (0, 0)) for name in names] for share in shares], axis=0).T
    return dict(zip(names, (totals / counts).tolist())), int(counts.max())


def scores(task: MaskedImages, process: Process, batch: Batch, ema: bool = False) -> dict[str, torch.Tensor]:
    """Metrics of each image (B,)."""
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    result = reconstruct(task, process, batch, ema)
    errors = result.errors()
    found = {'mse': errors[:, 0], 'mae': errors[:, 1], 'mean_psnr': psnr(errors[:, 0]), 'loss': result.loss}
    if min(result.images.shape[2:]) >= WINDOW:
        for name, images in (('ssim_composite', result.composite), ('ssim_output', result.output)):
            found[name] = torch.as_tensor(ssim(images, result.images, data_range=1.0, reduction='none')).reshape(-1)
    visible = 1 - result.mask
    mean = (result.images * visible).sum(dim=(2, 3)) / visible.sum(dim=(2, 3)).clamp(min=1)
    baselines = {'visible_mean': mean[:, :, None, None].expand_as(result.images)}
    if task.autoencoder(ema).by_channel and result.images.shape[1] > 1:
        baselines['neighbour'] = torch.cat([result.images[:, 1:], result.images[:, -2:-1]], dim=1)
    for name, output in baselines.items():
        errors = result._replace(output=output).errors()
        found[f'mse_of_{name}'], found[f'mae_of_{name}'] = errors.unbind(dim=1)
    return found


@dataclass
class ReconstructionReport:
    """What a report of a masked autoencoder tells.

    Attributes:
        row: validate.py's result row.
        facts: Further lines for the summary, by name.
        ratios: `measure` at several mask ratios.
        bands: `measure_missing` for several numbers of missing channels.
        galleries: A gallery (PNG) for each of the ratios, or none.
        notes: What has to be said of the numbers.
    """

    row: Mapping[str, Any]
    facts: Mapping[str, Any]
    ratios: Sequence[Mapping[str, float]]
    bands: Sequence[Mapping[str, float]]
    galleries: Sequence[bytes]
    notes: Sequence[str]


def write_report(folder: str, report: ReconstructionReport) -> None:
    """Write a report's files into a folder, each whole or not at all, `report.html` last."""
    open_folder(folder)
    names = [f'gallery_{100 * row["mask_ratio"]:g}.png' for row in report.ratios]
    files: dict[str, str | bytes] = {
        'report.json': to_json(
            {'result': report.row, 'facts': report.facts, 'ratios': report.ratios, 'missing_channels': report.bands}
        ),
        'reconstruction.csv': table(list(report.ratios), 'mask_ratio'),
        **dict(zip(names, report.galleries)),
    }
    bands = b''
    if report.bands:
        files['missing_channels.csv'] = table(list(report.bands), 'missing')
        files['missing_channels.png'] = bands = _band_plot(report.bands)
    files['report.html'] = _page(report, bands)
    remove_earlier(folder, ('gallery_[0-9]*.png', 'missing_channels.csv', 'missing_channels.png'), files)
    for name, content in files.items():
        write_atomically(os.path.join(folder, name), content)


def _band_plot(bands: Sequence[Mapping[str, float]]) -> bytes:
    lines = []
    for name, colour in (('mse_present', '#374151'), ('mse_missing', '#9ca3af')):
        points = [(row['missing'], row[name]) for row in bands if name in row]
        lines.append(Line(BANDS[name], colour, [x for x, _ in points], [y for _, y in points]))
    return plots.curves({'Error of hidden pixels': lines}, 'missing channels')


def _page(report: ReconstructionReport, bands: bytes) -> str:
    row = report.row
    title = f'Reconstructions by {row["model"]}'
    tiles = {f'{COLUMNS[name]}': f'{row[name]:.4g}' for name in ('mse', 'mae', 'mean_psnr', 'psnr_of_mean_mse')}
    tiles |= {COLUMNS[name]: f'{row[name]:.3f}' for name in ('ssim_composite', 'ssim_output') if name in row}
    tiles |= {'images': f'{row["count"]:,}', 'parameters': f'{row["param_count"]:,.2f} M'}
    body = [
        f'<h1>{page.escape(title)}</h1>',
        '<nav><a href="#ratios">Mask ratios</a><a href="#gallery">Gallery</a><a href="#settings">Settings</a></nav>',
        page.tiles(tiles),
        *(f'<p>{page.escape(note)}</p>' for note in report.notes),
        '<h2 id="ratios">Mask ratios</h2>',
        f'<div class="card">{_table(report.ratios, COLUMNS)}</div>',
    ]
    if report.bands:
        body += [
            '<h2>Missing channels</h2>',
            '<p>So many channels of each image, drawn at random, are hidden as a whole; of the others the usual share '
            'of patches.</p>',
            f'<div class="columns">{page.figure(bands, "error by missing channels")}'
            f'<div class="card">{_table(report.bands, BANDS)}</div></div>',
        ]
    body.append('<h2 id="gallery">Gallery</h2>')
    if not report.galleries:
        body.append(f'<p>No gallery: {NOTHING}.</p>')
    for ratio, png in zip(report.ratios, report.galleries):
        text = f'Mask ratio {100 * ratio["mask_ratio"]:g} %'
        body.append(f'<h3>{text}</h3>{page.figure(png, text)}')
    settings = page.table(['name', 'value'], {**report.facts, **row}.items(), text=2)
    body += ['<h2 id="settings">Settings</h2>', f'<div class="card">{settings}</div>']
    return page.page(title, body)


def _table(rows: Sequence[Mapping[str, float]], names: Mapping[str, str]) -> str:
    shown = [name for name in names if any(name in row for row in rows)]
    cells = ([f'{row[name]:.4g}' if name in row else '–' for name in shown] for row in rows)
    return page.table([names[name] for name in shown], cells, text=0)
