"""Checkpoints of the original Vim code (hustvl/Vim): read them safely, build the equivalent model, rewrite them.

The command `python -m vim_timm.hub.convert IN.pth OUT.safetensors` rewrites one.
"""

if __name__ == '__main__':  # the command line is read before torch is imported
    import sys

    from vim_timm import commands

    sys.exit(commands.main('convert'))

import functools
import math
import os
import sys
import warnings
from pathlib import Path
from typing import Any, Mapping, Optional

import torch
from timm.models import create_model, is_model, list_models

from vim_timm.layers import BiMamba
from vim_timm.layers.token_order import ClassToken
from vim_timm.models.adapt import check_fit
from vim_timm.models.checkpoint import CheckpointError, read_checkpoint, select_weights, write_safetensors
from vim_timm.models.families import describe_family
from vim_timm.models.pretrained import check_sum
from vim_timm.models.pretrained import sha256 as file_sum
from vim_timm.models.vision_mamba import VisionMamba, checkpoint_filter_fn
from vim_timm.settings import parsers
from vim_timm.settings.inherited import settings_of
from vim_timm.version import __version__

# arguments of the original's Mamba class under our names, and those that a loaded model does not show
_SSM_CFG = {'d_conv': 'd_conv', 'expand': 'expand', 'dt_rank': 'dt_rank', 'conv_bias': 'conv_bias', 'bias': 'proj_bias'}
_IGNORED_SSM_CFG = {'dt_min', 'dt_max', 'dt_init', 'dt_scale', 'dt_init_floor', 'use_fast_path'}
_POOLS: dict[str, Any] = {'none': 'last', 'mean': 'avg'}
_SCANS: dict[str, Any] = {'v2': 'bidirectional', 'v1': 'shared', 'none': 'forward'}


def from_original(
    state_dict: Mapping[str, torch.Tensor],
    *,
    img_size: int | tuple[int, int] = 224,
    patch_size: int = 16,
    stride: int = 16,
    depth: int = 24,
    embed_dim: int = 192,
    d_state: int = 16,
    channels: int = 3,
    num_classes: int = 1000,
    ssm_cfg: Optional[dict[str, Any]] = None,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.1,
    norm_epsilon: float = 1e-5,
    rms_norm: bool = True,
    initializer_cfg: Optional[dict[str, Any]] = None,
    fused_add_norm: bool = True,
    residual_in_fp32: bool = True,
    device: Optional[torch.device | str] = None,
    dtype: Optional[torch.dtype] = None,
    ft_seq_len: Optional[int] = None,
    pt_hw_seq_len: int = 14,
    if_bidirectional: bool = False,
    final_pool_type: str = 'none',
    if_abs_pos_embed: bool = True,
    if_rope: bool = False,
    if_rope_residual: bool = False,
    flip_img_sequences_ratio: float = -1.0,
    if_bimamba: bool = False,
    bimamba_type: str = 'v2',
    if_cls_token: bool = True,
    if_divide_out: bool = True,
    init_layer_scale: Optional[float] = None,
    use_double_cls_token: bool = False,
    use_middle_cls_token: bool = True,
    if_devide_out: Optional[bool] = None,
) -> VisionMamba:
    """Build the model that computes what the original's `VisionMamba(**kwargs)` computes, with its weights.

    The arguments are those of the original's HEAD, with its defaults: `stride` is 16 whatever `patch_size` is, and
    directions are halved. A model of the first release needs `if_divide_out=False, use_middle_cls_token=False,
    stride=patch_size`. `initializer_cfg`, `fused_add_norm` and `ft_seq_len` change nothing in a loaded model.
    `if_devide_out` is the misspelling that some original entrypoints pass and their class ignores.

    Args:
        state_dict: the original's parameters and buffers, under its names.
        device: with 'meta' the model takes the tensors of `state_dict` themselves, where they are, without a copy.

    Raises:
        ValueError: a mode that is not carried along (`flip_img_sequences_ratio`, `if_bidirectional`, ...), or a
            checkpoint that does not fit these arguments.
        TypeError: an argument that the original's class does not know either.
    """
    if flip_img_sequences_ratio > 0:
        raise ValueError('flip_img_sequences_ratio > 0 is not supported: no published model flips its sequence')
    if if_bidirectional:
        raise ValueError("if_bidirectional is not supported: published models are bidirectional by bimamba_type='v2'")
    if final_pool_type == 'max' or (final_pool_type == 'all' and not if_cls_token):
        raise ValueError(f"final_pool_type='{final_pool_type}' is not supported: use 'none' or 'mean'")
    if if_devide_out is not None and if_devide_out != if_divide_out:
        raise TypeError('if_devide_out is a misspelling that the original ignores: pass if_divide_out')

    bimamba_type = 'v1' if if_bimamba else bimamba_type
    model = VisionMamba(
        img_size=img_size,
        patch_size=patch_size,
        stride=stride,
        in_chans=channels,
        num_classes=num_classes,
        global_pool='token' if if_cls_token else _choose('final_pool_type', final_pool_type, _POOLS),
        embed_dim=embed_dim,
        depth=depth,
        class_token=_class_token(if_cls_token, use_double_cls_token, use_middle_cls_token),
        scan=_choose('bimamba_type', bimamba_type, _SCANS),
        halve=if_divide_out and bimamba_type == 'v2',
        rope=if_rope,
        rope_residual=if_rope_residual,
        rope_pretrained_grid=pt_hw_seq_len,
        pos_embed=if_abs_pos_embed,
        init_values=init_layer_scale,
        norm_layer='rmsnorm' if rms_norm else 'layernorm',
        norm_eps=norm_epsilon,
        residual_in_fp32=residual_in_fp32,
        d_state=d_state,
        pos_drop_rate=drop_rate,
        drop_path_rate=drop_path_rate,
        device=device,
        dtype=dtype,
        **_mixer_arguments(ssm_cfg or {}),
    )
    _load(model, state_dict)
    return model


def _choose(name: str, value: str, choices: dict[str, Any]) -> Any:
    if value not in choices:
        raise ValueError(f"{name}='{value}' is unknown: choose {', '.join(choices)}")
    return choices[value]


def _class_token(if_cls_token: bool, use_double_cls_token: bool, use_middle_cls_token: bool) -> ClassToken:
    """The original's precedence: none, then double, then middle, then head."""
    if not if_cls_token:
        return 'none'
    if use_double_cls_token:
        return 'double'
    return 'middle' if use_middle_cls_token else 'head'


def _mixer_arguments(ssm_cfg: dict[str, Any]) -> dict[str, Any]:
    """The original's `ssm_cfg` (arguments of its Mamba class) under our names."""
    if not ssm_cfg.get('use_fast_path', True):
        raise ValueError('ssm_cfg use_fast_path=False is not supported: it silently ran the forward direction only')
    unknown = set(ssm_cfg) - set(_SSM_CFG) - _IGNORED_SSM_CFG
    if unknown:
        raise TypeError(f'ssm_cfg has unknown keys: {", ".join(sorted(unknown))}')
    return {ours: ssm_cfg[theirs] for theirs, ours in _SSM_CFG.items() if theirs in ssm_cfg}


def _load(model: VisionMamba, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Load weights of the model's very size: none is resampled, no head is new, and rotary tables are the model's."""
    own = model.state_dict()
    for name in ('pos_embed', 'patch_embed.proj.weight'):
        if name in state_dict and name in own:
            check_fit({name: state_dict[name]}, {name: own[name]})
    for name in ('rope.freqs_cos', 'rope.freqs_sin'):
        if (name in state_dict) != model.rope:
            verb = 'lacks' if model.rope else 'has'
            raise CheckpointError(f'the checkpoint {verb} {name}: pass if_rope={name in state_dict}')
        if model.rope:
            shape = (model.patch_embed.num_patches, model.embed_dim)
            check_fit({name: state_dict[name]}, {name: torch.empty(shape, device='meta')})
    state = checkpoint_filter_fn(dict(state_dict), model)
    check_fit(state, own)
    model.load_state_dict(state, assign=any(value.is_meta for value in own.values()))


def load_original_file(path: str | Path, use_ema: bool = False) -> dict[str, torch.Tensor]:
    """The state dict inside an original checkpoint file: its `model`, or its `model_ema` when asked for.

    Raises:
        CheckpointError: no such file, not readable without running code, no state dict, or no EMA weights in it.
    """
    return select_weights(read_checkpoint(path), use_ema, f'checkpoint {path}')


def infer_arguments(state_dict: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Arguments of `from_original` for a state dict of unknown origin.

    Sizes are read from shapes. What shapes do not tell follows the releases: rope means the first release (class token
    in front, directions summed, mean pooling without a class token), no rope means HEAD (class token in the middle,
    directions halved). Images are square, of side 224 or 384 where that fits the number of tokens.

    Raises:
        CheckpointError: this is not a checkpoint of an original Vim.
    """
    try:
        patch = state_dict['patch_embed.proj.weight']
        mixer = 'layers.0.mixer.'
        dt_proj, conv = state_dict[f'{mixer}dt_proj.weight'], state_dict[f'{mixer}conv1d.weight']
        d_inner, d_state = state_dict[f'{mixer}A_log'].shape
    except KeyError as missing:
        if 'blocks.0.mixer.dt_proj.weight' in state_dict:
            raise CheckpointError(
                'the checkpoint has the names of this package already: name its model (--model), whose weights it has'
            ) from None
        family = describe_family(set(state_dict))
        raise CheckpointError(f'not a checkpoint of the original Vim but of {family}: it has no {missing}') from None
    embed_dim, channels, patch_size, _ = patch.shape
    rope = 'rope.freqs_cos' in state_dict
    cls, double = 'cls_token' in state_dict, 'cls_token_head' in state_dict
    num_patches = _num_patches(state_dict, cls + 2 * double)
    img_size, stride = _image_and_stride(num_patches, patch_size)
    return dict(
        img_size=img_size,
        patch_size=patch_size,
        stride=stride,
        depth=1 + max(int(name.split('.')[1]) for name in state_dict if name.startswith('layers.')),
        embed_dim=embed_dim,
        d_state=d_state,
        channels=channels,
        num_classes=state_dict['head.weight'].shape[0] if 'head.weight' in state_dict else 0,
        ssm_cfg=dict(
            d_conv=conv.shape[-1],
            expand=d_inner // embed_dim,
            dt_rank=dt_proj.shape[1],
            conv_bias=f'{mixer}conv1d.bias' in state_dict,
            bias=f'{mixer}in_proj.bias' in state_dict,
        ),
        rms_norm='norm_f.bias' not in state_dict,
        final_pool_type='mean',
        if_abs_pos_embed='pos_embed' in state_dict,
        if_rope=rope,
        if_rope_residual=rope,
        bimamba_type=_bimamba_type(state_dict),
        if_cls_token=cls or double,
        if_divide_out=not rope,
        init_layer_scale=1.0 if f'{mixer}gamma' in state_dict else None,
        use_double_cls_token=double,
        use_middle_cls_token=not rope,
    )


def _num_patches(state_dict: Mapping[str, torch.Tensor], num_class_tokens: int) -> int:
    if 'pos_embed' in state_dict:
        return state_dict['pos_embed'].shape[1] - num_class_tokens
    if 'rope.freqs_cos' in state_dict:
        return state_dict['rope.freqs_cos'].shape[0]
    raise CheckpointError('the checkpoint has no position embedding, so its image size is unknown: name the model')


def _image_and_stride(num_patches: int, patch_size: int) -> tuple[int, int]:
    """The (image side, stride) that gives this many patches: a published size first, else patches side by side."""
    grid = math.isqrt(num_patches)
    if grid * grid != num_patches:
        raise CheckpointError(f'{num_patches} patches are no square grid: name the model')
    for img_size in (224, 384):
        for stride in (patch_size, max(1, patch_size // 2)):
            if (img_size - patch_size) // stride + 1 == grid:
                return img_size, stride
    return grid * patch_size, patch_size


def _bimamba_type(state_dict: Mapping[str, torch.Tensor]) -> str:
    if 'layers.0.mixer.conv1d_b.weight' in state_dict:
        return 'v2'
    return 'v1' if 'layers.0.mixer.A_b_log' in state_dict else 'none'


def convert(
    source: str | Path, destination: str | Path, name: str = '', use_ema: bool = False, sha256: str = ''
) -> VisionMamba:
    """Rewrite an original checkpoint as safetensors under our names, and return the model it fits.

    The architecture is `name` if given, else the one that the file's own `args.model` names, else what the shapes tell.
    Weights are renamed and reordered, never resampled. The file's metadata say where it came from. Nothing is copied:
    tensors go from one file to the other, and those that are not converted are not read.

    Args:
        sha256: what the source's has to be, in hexadecimal; by default what a SHA256SUMS beside it or the Hub's cache
            says, where they do.

    Raises:
        FileNotFoundError: no folder to write into.
        CheckpointError: the source cannot be read, is of another family, does not fit or is the destination.
        RuntimeError: timm does not know `name`.
    """
    if Path(destination).exists() and os.path.samefile(source, destination):
        raise CheckpointError(f'{destination} is the checkpoint itself: name another file to write')
    checkpoint = read_checkpoint(source, mmap=True)
    check_sum(source, sha256)
    state_dict = select_weights(checkpoint, use_ema, f'checkpoint {source}')
    settings = settings_of(checkpoint)
    trained = settings.get('model', '')
    if name or is_model(trained):
        model = _registered(name or trained, state_dict, settings.get('img_size'))
        _load(model, state_dict)
        architecture = _architecture(model)
    else:
        model = from_original(state_dict, **infer_arguments(state_dict), device='meta')
        architecture = find_architecture(model)
    metadata = {
        'architecture': architecture,
        'source': Path(source).name,
        'weights': 'model_ema' if use_ema else 'model',
        'vim_timm': __version__,
    }
    write_safetensors(model.state_dict(), destination, metadata)
    return model


def _registered(name: str, state_dict: Mapping[str, torch.Tensor], img_size: Optional[int]) -> VisionMamba:
    head = state_dict.get('head.weight')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # the original's names are deprecated ones
        num_classes = 0 if head is None else len(head)
        model = create_model(name, num_classes=num_classes, img_size=img_size, device='meta')
    if not isinstance(model, VisionMamba):
        raise CheckpointError(f'{name} is not a Vim')
    return model


def find_architecture(model: VisionMamba) -> str:
    """The name of the registered model that computes the same, but for its number of classes; '' if there is none."""
    wanted = _signature(model)
    for name in list_models(module='vision_mamba'):
        signature, architecture = _computed_by(name, model.num_classes)
        if signature == wanted:
            return architecture
    return ''


@functools.cache  # a model takes 0.2 s to make
def _computed_by(name: str, num_classes: int) -> tuple[tuple[Any, ...], str]:
    """What a registered model computes, and its full name."""
    model = create_model(name, num_classes=num_classes, device='meta')
    assert isinstance(model, VisionMamba)
    return _signature(model), _architecture(model)


def _architecture(model: VisionMamba) -> str:
    """The full name of a registered model, where it was made by a short or deprecated one."""
    return getattr(model, 'pretrained_cfg')['architecture']  # noqa: B009  timm sets it after construction


def _signature(model: VisionMamba) -> tuple[Any, ...]:
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    rope = (model.rope, model.rope and model.rope_residual)
    scales = [module.scale for module in model.modules() if isinstance(module, BiMamba)]
    return shapes, model.patch_embed.stride, model.global_pool, model.class_token, rope, scales


def main(argv: Optional[list[str]] = None) -> int:
    try:
        args = parsers.convert(sys.argv[1:] if argv is None else argv)
        model = convert(args.source, args.destination, args.model, args.use_ema, args.sha256)
    except (OSError, ValueError, RuntimeError) as error:
        print(f'convert: error: {(str(error) or repr(error)).splitlines()[0]}', file=sys.stderr)
        return 1
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f'{args.destination}: {count:,} parameters, SHA-256 {file_sum(args.destination)}')
    return 0
