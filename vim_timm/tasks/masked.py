"""Masked autoencoding: the loss, and what is measured of reconstructed images.

Source: Masked Autoencoders Are Scalable Vision Learners, arXiv 2111.06377.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from timm.data.loader import adapt_to_chs
from timm.utils import unwrap_model
from torch.nn.parallel import DistributedDataParallel

from ..data import Batch
from ..errors import UserError
from ..layers.masking import sample_noise
from ..layers.patches import normalize_patches
from ..models.masked_autoencoder import MaskedAutoencoder
from ..settings import Process, Settings
from .base import Task

Loss = Literal['mse', 'l1']
EVAL_SEED = 0  # the masks of an evaluation do not depend on --seed, so that numbers of different runs compare


def patch_loss(
    pred: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, kind: Loss = 'mse', real: torch.Tensor | None = None
) -> torch.Tensor:
    """The mean error over each image's removed patches (B,); its mean over images is the paper's loss.

    Args:
        pred: Predicted patches (B, L, P).
        target: True ones (B, L, P).
        mask: 1 where a patch was removed (B, L).
        kind: Squared or absolute error.
        real: 1 where a value of a patch is inside the image (1, L, P), None where all are.
    """
    error = (pred - target).abs() if kind == 'l1' else (pred - target).square()
    if real is None:
        return (error.mean(dim=-1) * mask).sum(dim=1) / mask.sum(dim=1)
    weight = mask.unsqueeze(-1) * real
    return (error * weight).sum(dim=(1, 2)) / weight.sum(dim=(1, 2))


class Reconstruction(NamedTuple):
    """What became of a batch.

    Attributes:
        images: Original pixels (B, C, H, W) in 0..1.
        output: Predicted pixels, those of visible patches too, in 0..1.
        mask: 1 where a pixel was hidden (B, C, H, W).
        loss: The loss of each image (B,).
    """

    images: torch.Tensor
    output: torch.Tensor
    mask: torch.Tensor
    loss: torch.Tensor

    @property
    def composite(self) -> torch.Tensor:
        """Predicted pixels where they were hidden, original ones elsewhere."""
        return torch.where(self.mask > 0, self.output, self.images)

    def errors(self) -> torch.Tensor:
        """Mean squared and mean absolute error over each image's hidden pixels, (B, 2)."""
        difference = (self.output - self.images) * self.mask
        sums = torch.stack([difference.square().sum(dim=(1, 2, 3)), difference.abs().sum(dim=(1, 2, 3))], dim=1)
        return sums / self.mask.sum(dim=(1, 2, 3)).unsqueeze(1)


def psnr(mse: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of a mean squared error of pixels in 0..1."""
    return -10 * mse.clamp(min=1e-10).log10()


class ReconstructionEvaluator:
    """Averages over images what `MaskedImages.predict` says of each: loss, mean squared and mean absolute error.

    `mean_psnr` is the mean of the images' PSNR, `psnr_of_mean_mse` that of the mean of their errors; both are in use.
    """

    default_metric = 'loss'
    metric_names = ('loss', 'mse', 'mae', 'mean_psnr', 'psnr_of_mean_mse')

    def __init__(self, device: torch.device):
        dtype = torch.float32 if device.type == 'mps' else torch.float64
        self.sums = torch.zeros(5, dtype=dtype, device=device)  # loss, mse, mae, psnr, images

    def update(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Count images by their scores (B, 3); targets have no part in it."""
        columns = [*output.unbind(dim=1), psnr(output[:, 1]), torch.ones_like(output[:, 0])]
        self.sums += torch.stack(columns).to(self.sums.dtype).sum(dim=1)

    def summary(self) -> OrderedDict[str, float]:
        """This rank's metrics so far."""
        return self._summary(self.sums)

    def compute(self, distributed: bool = False) -> OrderedDict[str, float]:
        """All ranks' metrics."""
        sums = self.sums.clone()
        if distributed:
            dist.all_reduce(sums)
        return self._summary(sums)

    @staticmethod
    def _summary(sums: torch.Tensor) -> OrderedDict[str, float]:
        means = sums[:4] / sums[4].clamp(min=1)
        names = ('loss', 'mse', 'mae', 'mean_psnr')
        return OrderedDict(zip(names, means.tolist()), psnr_of_mean_mse=float(psnr(means[1])))


class MaskedImages(Task):
    """Trains a masked autoencoder. A checkpoint's model is the encoder; the decoder is the task's own state."""

    lower_is_better = ('mse', 'mae')
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        model: MaskedAutoencoder,
        data_config: dict[str, Any],
        loss: Loss | None = None,
        norm_pix_loss: bool = False,
        seed: int = 0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        """
        Args:
            data_config: Mean and std of the images' normalization.
            loss: Kind of the loss, None for the model's usual one.
            norm_pix_loss: Predict each patch without its mean and standard deviation.
            seed: With a sample's epoch and position, what its mask in training depends on.

        Raises:
            UserError: norm_pix_loss of images that patches do not tile, or a sigmoid over what is not in 0..1.
        """
        super().__init__(device=device, dtype=dtype, verbose=False)
        size = data_config['input_size'][1:]
        if norm_pix_loss and any(side % patch for side, patch in zip(size, model.patch_size)):
            raise UserError(f'--norm-pix-loss needs patches that tile the images, and {model.patch_size} do not {size}')
        channels = data_config['input_size'][0]
        mean, std = (
            torch.tensor(adapt_to_chs(data_config[name], channels), dtype=torch.float32) for name in ('mean', 'std')
        )
        if getattr(model, 'sigmoid', False) and norm_pix_loss:
            raise UserError('sigmoid=True predicts pixels in 0..1, and --norm-pix-loss others: leave one out')
        if getattr(model, 'sigmoid', False) and not (torch.all(mean == 0) and torch.all(std == 1)):
            raise UserError('sigmoid=True predicts pixels in 0..1: add --mean 0 --std 1')
        self.trainable_module: Any = model
        self.kind: Loss = loss or model.loss
        self.norm_pix_loss, self.seed = norm_pix_loss, seed
        self.gallery: Callable[[Any], None] | None = None  # called with the trainer after every epoch
        for name, value in (('mean', mean), ('std', std)):
            self.register_buffer(name, value.view(1, -1, 1, 1).to(self.device), persistent=False)

    def create_evaluator(self, **kwargs: Any) -> ReconstructionEvaluator:
        """An evaluator of reconstructions."""
        return ReconstructionEvaluator(self.device)

    def training_loss(self, batch: Batch) -> torch.Tensor:
        """The loss () of a batch, whose masks depend on (seed, epoch, position) of each sample alone."""
        model, images = self.autoencoder(), batch.images
        count = model.noise_count((images.shape[2], images.shape[3]))
        pred, mask = self.trainable_module(images, sample_noise(self.seed, batch.keys[:, :2], count))
        return self._losses(model, images, pred, mask).mean()

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Loss and prediction for a batch with masks drawn from torch's generator."""
        pred, mask = self.trainable_module(input)
        return {'loss': self._losses(self.autoencoder(), input, pred, mask).mean(), 'output': pred}

    def predict(self, batch: Batch, ema: bool = False) -> torch.Tensor:
        """Loss, mean squared and mean absolute error of hidden pixels (B, 3), for masks that depend on the place."""
        result = self.reconstruct(batch, ema)
        return torch.cat([result.loss.unsqueeze(1), result.errors()], dim=1)

    def reconstruct(self, batch: Batch, ema: bool = False, present: torch.Tensor | None = None) -> Reconstruction:
        """The images of an evaluation's batch, hidden in part and predicted.

        Args:
            ema: Predict with the average of the weights.
            present: Which channels (B, C) there are, for a model with masks by channel.
        """
        model, images = self.autoencoder(ema), batch.images
        size = (images.shape[2], images.shape[3])
        noise = sample_noise(EVAL_SEED, batch.keys[:, 2:], model.num_patches(size))
        more = {} if present is None else {'present': present}
        pred, mask = model(images, noise, **more)
        loss = self._losses(model, images, pred, mask)
        pred = pred.float()
        if self.norm_pix_loss:
            _, mean, std = normalize_patches(model.patchify(images.float()))
            pred = pred * std + mean
        hidden = model.unpatchify(mask.unsqueeze(-1).expand_as(pred), size)
        return Reconstruction(self.pixels(images), self.pixels(model.unpatchify(pred, size)), hidden, loss)

    def pixels(self, images: torch.Tensor) -> torch.Tensor:
        """Normalized images -> pixels in 0..1, clamped; infinite ones are no numbers."""
        values = images.float() * self.std + self.mean
        return values.masked_fill(values.isinf(), math.nan).clamp(0, 1)

    def _losses(
        self, model: MaskedAutoencoder, images: torch.Tensor, pred: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        target = model.patchify(images.float())
        real = None
        if any(side % patch for side, patch in zip(images.shape[2:], model.patch_size)):
            real = model.patchify(torch.ones_like(images[:1], dtype=torch.float32))
        if self.norm_pix_loss:
            target = normalize_patches(target)[0]
        return patch_loss(pred.float(), target, mask, self.kind, real)

    def end_epoch(self, trainer: Any) -> None:
        """Show some reconstructions, if someone has asked for them."""
        if self.gallery is not None:
            self.gallery(trainer)

    # Checkpoints

    def autoencoder(self, ema: bool = False) -> MaskedAutoencoder:
        """The model under its wrappers, with the trained weights or their average."""
        return unwrap_model(self.get_trainable_module(ema=ema))

    def get_eval_model(self, module: torch.nn.Module | None = None, ema: bool = False) -> torch.nn.Module | None:
        """The encoder, which is what a checkpoint's `state_dict` holds."""
        module = module or self.get_trainable_module(ema=ema)
        return None if module is None else unwrap_model(module).encoder

    def get_task_state(self, module: torch.nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """The decoder."""
        module = module or self.get_trainable_module(ema=ema)
        return {} if module is None else {'decoder': unwrap_model(module).decoder.state_dict()}

    def load_task_state(
        self, state: dict[str, Any] | None, strict: bool = True, module: torch.nn.Module | None = None,
        ema: bool = False,
    ) -> None:  # fmt: skip
        """Load the decoder.

        Raises:
            UserError: there is none.
        """
        module = module or self.get_trainable_module(ema=ema)
        if not state or 'decoder' not in state:
            raise UserError('it holds no decoder, so masked autoencoding cannot go on from it')
        unwrap_model(module).decoder.load_state_dict(state['decoder'], strict=strict)

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> 'MaskedImages':
        """Wrap the autoencoder in DistributedDataParallel."""
        self.trainable_module = DistributedDataParallel(self.trainable_module, device_ids=device_ids, **ddp_kwargs)
        return self

    def compile(  # type: ignore[override]
        self, backend: str = 'inductor', mode: str | None = None, **compile_kwargs: Any
    ) -> torch.nn.Module:
        """Compile the autoencoder before it is wrapped."""
        self.trainable_module = torch.compile(self.trainable_module, backend=backend, mode=mode, **compile_kwargs)
        return self.trainable_module


def make_task(settings: Settings, process: Process, model: Any, data_config: dict[str, Any]) -> MaskedImages:
    """The task for the flags.

    Args:
        data_config: input_size, mean and std of the images.
    """
    return MaskedImages(
        model, data_config, settings.mae_loss, settings.norm_pix_loss, settings.seed, process.device, process.dtype
    )
