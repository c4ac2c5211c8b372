"""Settings of masked autoencoding: what it takes, what it implies, and what it has no use for."""

import os
from collections.abc import Mapping
from typing import Any

from ..errors import UserError
from .parse import Settings

# arguments of the model
AUTOENCODER = (
    'mask_ratio', 'decoder', 'decoder_dim', 'decoder_depth', 'decoder_heads', 'decoder_pos_embed', 'channel_drop',
)  # fmt: skip
NOT_ENCODERS = (*AUTOENCODER, 'sigmoid')  # arguments of a masked autoencoder that its encoder has not
# arXiv 2111.06377, table 8: all that is augmented is where the image is cut out, and its side
AUGMENTATION = {'scale': [0.2, 1.0], 'color_jitter': 0.0, 'train_interpolation': 'bicubic'}
_OWN = (*AUTOENCODER, 'norm_pix_loss', 'mae_loss', 'gallery_interval', 'save_encoder', 'mask_ratios')
_LABELLED = (
    'mixup', 'cutmix', 'cutmix_minmax', 'smoothing', 'loss', 'bce_loss', 'jsd_loss', 'aug_splits', 'reprob',
    'kd_model_name', 'linear_probe', 'head_init_scale', 'head_init_bias', 'real_labels', 'valid_labels', 'metrics_avg',
)  # fmt: skip


def is_autoencoder(name: str) -> bool:
    """Whether a model's name is a masked autoencoder's."""
    return name.startswith('mae_')


def autoencoder_arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the masked autoencoder that settings describe; {} where they say no `mae`."""
    return {name: settings[name] for name in AUTOENCODER if settings.get('mae') and settings.get(name) is not None}


def check_target(args: Settings, saved: Mapping[str, Any], what: str) -> None:
    """Refuse to read predictions of pixels as those of normalized patches.

    Args:
        args: chosen settings.
        saved: settings of a checkpoint.
        what: the checkpoint, in words.
    """
    if 'norm_pix_loss' in args.chosen and args.norm_pix_loss and saved.get('norm_pix_loss') is False:
        raise UserError(f'{what} was trained without --norm-pix-loss, and predicts pixels themselves: leave it out')


def check_masked(args: Settings) -> None:
    """Refuse what masked autoencoding, or anything else, would not use.

    Raises:
        UserError: a flag is chosen in vain, or the folder for --save-encoder is not there.
    """
    for name in _LABELLED if args.mae else _OWN:
        if name in args.chosen and getattr(args, name, None):
            flag = f'--{name.replace("_", "-")}'
            if args.mae:
                raise UserError(f'{flag} is about labels or hides pixels itself: masked autoencoding goes without it')
            raise UserError(f'{flag} is for masked autoencoding: add --mae')
    if 'mask_ratios' in args.chosen and not args.report:
        raise UserError('--mask-ratios are those of the report: add --report FOLDER')
    folder = os.path.dirname(getattr(args, 'save_encoder', '')) or '.'
    if not os.path.isdir(folder):
        raise UserError(f'--save-encoder {args.save_encoder}: there is no such folder')
