"""The command line of train.py and validate.py as a table: timm's names, defaults and meanings, then our own.

A row is `(names, kind, default, help)`, or `(names, kind, default, help, range)` where not any number will do. Kind is
`bool` (a switch), `int`, `float` or `str`, a one-element list of those (one or more values), a tuple of strings
(choices), `dict` (`key=value` pairs), `batch_size` (an `int` or `auto`), or `refused`: a flag of timm's that cannot be
honoured here, whose help says why.
timm's positional `data` is `--data-dir` by another name.
"""

import math
from typing import Any

from .ranges import ASCENDING, PAIR, POSITIVE, SHARE, Names, Range, at_least

Row = tuple[str, Any, Any, str] | tuple[str, Any, Any, str, Range | Names]

# what timm has, which is not imported to read a command line; tests/test_command_lines.py compares
SCHEDULES = ('cosine', 'tanh', 'step', 'multistep', 'poly', 'plateau', 'wsd', 'rsqrt', 'constant', 'none')
POLICIES = Names(('rand', 'augmix', 'original', 'originalr', 'v0', 'v0r', '3a'), ('weights', '3a', '3aw'))
TORCH_DATASETS = (
    'cifar10', 'cifar100', 'mnist', 'kmnist', 'fashion_mnist', 'inaturalist', 'inat', 'places365', 'qmnist', 'imagenet',
    'image_folder', 'folder',
)  # fmt: skip

AUTO = 'auto'


def batch_size(value: Any) -> int | str:
    """A number of images, or `auto`."""
    return AUTO if value == AUTO else int(value)


refused = object()  # the kind of a flag that is known and not honoured

_FILTERS = ('', 'nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')
_PART = Range(0, 0.9, above=True)
_DEVIATION = Range(0, 1, above=True)
_BOX = Range(0, 1, ascending=(2, 2))
_NOISE = Range(0, ascending=(1, 2))
_MILESTONES = Range(0, ascending=(1, math.inf))
_MODES = ('L', 'LA', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'HSV')  # of 8 bits, and in transforms
_NAFLEX = 'there is no model here that takes patch sequences (NaFlex)'
_MULTI_LABEL = "an image has one label here; for several, run timm's own train.py through vim_timm.run"
_SIZES = 'every batch of a run has one image size here'
_WORKERS = 'data loading processes always live as long as the run'
_JIT = 'TorchScript fusers and scripted training are replaced by --torchcompile'

DATA: list[Row] = [
    ('--data-dir', str, None, 'folder of the data set'),
    (
        '--dataset',
        str,
        '',
        "'' or arrays (folder or tar), digits, torch/NAME, hfds/NAME, hfids/NAME, wds/NAME, tfds/NAME",
    ),
    ('--dataset-download', bool, False, 'let torch/ and tfds/ data sets download themselves'),
    ('--data-in-memory', bool, False, 'decode once, keep the images on the device and augment them there'),
    ('--class-map', str, '', 'file with the class names in the order of their numbers'),
    ('--input-img-mode', _MODES, None, 'PIL mode of the images (default: L, LA, RGB, RGBA by the number of channels)'),
    ('--input-key', str, None, 'key of the image in a sample; endings to read of a folder; array to read of .npz'),
    ('--input-span', [float], None, 'of arrays: the stored values that become 0 and 1', ASCENDING),
    ('--target-key', str, None, 'key of the label in a sample'),
    ('--dataset-trust-remote-code', bool, False, "run the Python code in a Hugging Face data set's repository"),
]
MODEL: list[Row] = [
    ('--pretrained', bool, False, 'start from the published weights of the model'),
    (
        '--num-classes',
        int,
        None,
        "number of classes (default: the data set's where known, else the model's)",
        at_least(1),
    ),
    ('--gp', str, None, 'global pooling (default: as the model)'),
    ('--img-size', int, None, 'image size (default: as the model)', at_least(1)),
    ('--in-chans', int, None, 'image channels (default: 3)', at_least(1)),
    ('--input-size', [int], None, 'channels height width (default: as the model)', at_least(1)),
    ('--crop-pct', float, None, 'share of the resized image that the evaluation crop keeps', at_least(0.01, 1)),
    ('--mean', [float], None, 'mean of the pixels, in 0..1, a channel', SHARE),
    ('--std', [float], None, 'standard deviation of the pixels, in 0..1, a channel', _DEVIATION),
    ('--interpolation', _FILTERS, '', 'resize interpolation (default: as the model)'),
    ('--channels-last', bool, False, 'keep images and weights in channels-last memory format'),
    ('--fuser', refused, '', _JIT),
    ('--fast-norm', bool, False, 'compute norms in the low precision of autocast'),
    ('--model-kwargs', dict, {}, 'arguments of the model, key=value'),
    ('--torchcompile', ('?', 'inductor'), None, 'compile the model with a torch.compile backend'),
    ('--torchcompile-mode', str, None, 'mode of torch.compile'),
    ('--torchscript', refused, False, _JIT),
]
PRECISION: list[Row] = [
    ('--amp', bool, False, 'mixed precision'),
    ('--amp-dtype', ('float16', 'bfloat16'), 'float16', 'the lower precision of --amp'),
    ('--model-dtype', ('float32', 'float16', 'bfloat16'), None, 'dtype of the weights, without --amp'),
]
DEVICE: list[Row] = [
    ('--device', str, 'cuda', 'device to run on (default: cuda where there is one, else cpu)'),
    *PRECISION,
    ('--workers -j', int, 4, 'data loading processes', at_least(0)),
    ('--pin-mem', bool, False, 'pin host memory for the copy to the device, as always for a CUDA device'),
    ('--no-prefetcher', bool, False, 'normalize and erase on the CPU, in the workers'),
    ('--seed', int, 42, 'random seed', at_least(0, 2**32 - 1)),
    ('--deterministic', bool, False, 'deterministic kernels: two runs on one kind of device are bit-equal'),
    ('--dist-timeout', float, 600.0, 'seconds after which a silent rank ends a distributed run', at_least(1)),
    ('--max-unreadable', int, 10, 'distinct unreadable images to skip before the run ends', at_least(0, 10**6)),
]
MASKED: list[Row] = [
    ('--mae', bool, False, 'a masked autoencoder around --model, without labels; models named mae_* imply it'),
    ('--mask-ratio', float, None, 'share of the patches that are hidden (default: 0.75)', Range(0, 1, above=True)),
    ('--norm-pix-loss', bool, False, 'predict each patch without its own mean and standard deviation'),
    ('--mae-loss', ('mse', 'l1'), None, 'error of the hidden patches (default: as the model, mostly mse)'),
    ('--decoder', ('transformer', 'vim', 'vim2'), None, 'kind of the decoder (default: transformer)'),
    ('--decoder-dim', int, None, 'its width (default: 512)', at_least(1)),
    ('--decoder-depth', int, None, 'its blocks (default: 8)', at_least(1)),
    ('--decoder-heads', int, None, 'its attention heads (default: 8)', at_least(1)),
    ('--decoder-pos-embed', ('sincos', 'learned'), None, 'its positions (default: sincos)'),
    ('--channel-drop', float, None, 'probability that a whole channel is hidden, of mae_favit_* (default: 0)', SHARE),
]
NAFLEX_EVAL: list[Row] = [
    ('--naflex-loader', refused, False, _NAFLEX),
    ('--naflex-max-seq-len', refused, 576, _NAFLEX),
]

TRAIN: dict[str, list[Row]] = {
    'data': [
        *DATA,
        ('--task', refused, 'classification', _MULTI_LABEL),
        ('--target-format', refused, None, _MULTI_LABEL),
        ('--train-split', str, 'train', 'split to train on'),
        ('--val-split', str, 'validation', 'split to evaluate on'),
        ('--val-fraction', float, None, 'share of each class to evaluate on, where the data has no such split', _PART),
        ('--train-num-samples', int, None, 'images in the training split of a streamed data set', at_least(1)),
        ('--val-num-samples', int, None, 'images in the evaluation split of a streamed data set', at_least(1)),
    ],
    'model': [
        ('--model', str, 'resnet50', 'name of the model (default: vim_tiny_patch16_224, of small images _patch4_32)'),
        ('--pretrained-path', str, None, 'with --pretrained: take the weights from this file'),
        ('--pretrained-cfg-overlay', dict, {}, 'entries of the pretrained configuration to replace, key=value'),
        ('--initial-checkpoint', str, '', 'load these weights, exactly as they are, into the new model'),
        ('--resume', str, '', "go on from this checkpoint; 'auto': from the newest one of --experiment, if any"),
        ('--no-resume-opt', bool, False, 'resume the weights only'),
        *MODEL,
        ('--batch-size -b', int, 128, 'images a step and a process', at_least(1)),
        (
            '--validation-batch-size -vb',
            batch_size,
            None,
            'the same for evaluation, or auto: the largest that fits (default: --batch-size)',
            at_least(1),
        ),
        ('--grad-accum-steps', int, 1, 'steps whose gradients make one update', at_least(1)),
        ('--grad-checkpointing', bool, False, 'recompute activations in the backward pass to save memory'),
        ('--head-init-scale', float, None, "factor on the classifier's initial weights"),
        ('--head-init-bias', float, None, "the classifier's initial bias"),
        ('--linear-probe', bool, False, 'train the classifier alone, on features that stay as they are'),
    ],
    'device': [
        *DEVICE,
        ('--no-ddp-bb', bool, False, 'do not broadcast buffers between ranks'),
        ('--cuda-graph', bool, False, 'record a whole training step as one CUDA graph'),
        ('--synchronize-step', bool, False, 'synchronize the device after each step'),
        ('--local_rank', refused, 0, 'torchrun passes the rank in the environment'),
        ('--device-modules', [str], None, 'Python modules to import first'),
    ],
    'optimizer': [
        ('--opt', str, 'sgd', 'optimizer'),
        ('--opt-eps', float, None, 'its epsilon', at_least(0)),
        ('--opt-betas', [float], None, 'its betas', SHARE),
        ('--momentum', float, 0.9, 'its momentum', at_least(0)),
        ('--weight-decay', float, 2e-5, 'weight decay', at_least(0)),
        ('--clip-grad', float, None, 'clip gradients to this norm or value', POSITIVE),
        ('--clip-mode', ('norm', 'value', 'agc'), 'norm', 'what --clip-grad limits'),
        ('--layer-decay', float, None, 'factor on the learning rate from each layer to the one below', at_least(0)),
        ('--layer-decay-min-scale', float, 0, 'its lower bound', at_least(0)),
        ('--layer-decay-no-opt-scale', float, None, 'layers below this factor are frozen', at_least(0)),
        ('--opt-kwargs', dict, {}, 'arguments of the optimizer, key=value'),
    ],
    'learning rate': [
        ('--sched', SCHEDULES, 'cosine', 'schedule'),
        ('--sched-on-updates', bool, False, 'step the schedule after each update, not after each epoch'),
        ('--lr', float, None, 'learning rate (default: from --lr-base)', at_least(0)),
        ('--lr-base', float, 0.1, 'learning rate at a global batch of --lr-base-size', at_least(0)),
        ('--lr-base-size', int, 256, 'global batch that --lr-base belongs to', at_least(1)),
        ('--lr-base-scale', str, '', 'linear or sqrt in the global batch (default: sqrt for ada*, lamb; else linear)'),
        ('--lr-noise', [float], None, 'noise on the learning rate between these shares of the schedule', _NOISE),
        ('--lr-noise-pct', float, 0.67, 'limit of that noise', POSITIVE),
        ('--lr-noise-std', float, 1.0, 'standard deviation of that noise', at_least(0)),
        ('--lr-cycle-mul', float, 1.0, 'factor on the length of each next cycle', POSITIVE),
        ('--lr-cycle-decay', float, 0.5, 'factor on the height of each next cycle', at_least(0)),
        ('--lr-cycle-limit', int, 1, 'number of cycles', at_least(1)),
        ('--lr-k-decay', float, 1.0, 'k-decay of cosine and poly', POSITIVE),
        ('--warmup-lr', float, 1e-5, 'learning rate at the start of the warm-up', at_least(0)),
        ('--min-lr', float, 0, 'lower bound', at_least(0)),
        ('--epochs', int, 300, 'epochs of the schedule', at_least(1)),
        ('--epoch-repeats', float, 0.0, 'passes over the data in one epoch (0: one)', Range(1, or_zero=True)),
        ('--start-epoch', int, None, 'count epochs from here', at_least(0)),
        ('--decay-milestones', [int], [90, 180, 270], 'epochs at which multistep decays', _MILESTONES),
        (
            '--decay-epochs',
            float,
            None,
            'epochs between decays (step: 90), of one (wsd, rsqrt: 0.2 of all)',
            POSITIVE,
        ),
        ('--warmup-epochs', int, 5, 'epochs of linear warm-up', at_least(0)),
        ('--warmup-prefix', bool, False, 'do not count the warm-up in --epochs'),
        ('--cooldown-epochs', int, 0, 'epochs at the lower bound after the schedule', at_least(0)),
        ('--patience-epochs', int, 10, 'epochs without a better metric before plateau decays', at_least(0)),
        ('--decay-rate --dr', float, 0.1, 'factor of a decay; power of poly', at_least(0)),
    ],
    'augmentation and regularization': [
        ('--no-aug', bool, False, 'no augmentation at all'),
        ('--train-crop-mode', ('rrc', 'rkrc', 'rkrr'), None, 'random crop (default: rrc)'),
        ('--scale', [float], [0.08, 1.0], 'area range of the random crop', PAIR),
        ('--ratio', [float], [3 / 4, 4 / 3], 'aspect range of the random crop', PAIR),
        ('--hflip', float, 0.5, 'probability of a horizontal flip', SHARE),
        ('--vflip', float, 0.0, 'probability of a vertical flip', SHARE),
        ('--color-jitter', float, 0.4, 'strength of the colour jitter', at_least(0)),
        ('--color-jitter-prob', float, None, 'probability of the colour jitter', SHARE),
        ('--grayscale-prob', float, None, 'probability of a grey image', SHARE),
        ('--gaussian-blur-prob', float, None, 'probability of a blur', SHARE),
        ('--aa', str, None, 'AutoAugment / RandAugment / AugMix policy, such as rand-m9-mstd0.5-inc1', POLICIES),
        ('--aug-repeats', float, 0, 'times in a row that an image is drawn (0: once)', Range(1, or_zero=True)),
        ('--aug-splits', int, 0, 'augmented copies of the batch: 0, or 2 and more', Range(2, or_zero=True)),
        ('--loss', ('ce', 'bce', 'asl', 'poly', 'jsd'), None, 'loss (default: ce)'),
        ('--asl-gamma-pos', float, 1.0, "asl's focusing parameter for the target", at_least(0)),
        ('--asl-gamma-neg', float, 4.0, "asl's focusing parameter for the other classes", at_least(0)),
        ('--poly-epsilon', float, 2.0, "poly's first coefficient"),
        *(
            (name, refused, default, _MULTI_LABEL)
            for name, default in {
                '--asl-clip': 0.05,
                '--asl-reduction': 'batchmean',
                '--poly-gamma': 0.0,
                '--poly-alpha': None,
                '--twoway-tp': 4.0,
                '--twoway-tn': 1.0,
                '--db-neg-scale': 2.0,
                '--db-init-bias': 0.05,
                '--db-focal-gamma': 2.0,
                '--class-stats': None,
                '--loss-pos-weight': None,
                '--loss-class-weight': None,
                '--loss-weight-power': 1.0,
                '--loss-weight-beta': 0.999,
                '--loss-weight-max': None,
                '--multilabel-threshold': 0.5,
            }.items()
        ),  # fmt: skip
        ('--jsd-loss', bool, False, 'Jensen-Shannon consistency loss over --aug-splits'),
        ('--bce-loss', bool, False, 'binary cross-entropy'),
        ('--bce-sum', bool, False, 'sum it over the classes'),
        ('--bce-target-thresh', float, None, 'binarize its soft targets', SHARE),
        ('--bce-pos-weight', float, None, 'weight of its positive targets', POSITIVE),
        ('--reprob', float, 0.0, 'probability of random erasing', SHARE),
        ('--remode', ('const', 'rand', 'pixel'), 'pixel', 'what fills the erased area'),
        ('--recount', int, 1, 'erased areas an image', at_least(1)),
        ('--resplit', bool, False, 'do not erase in the first augmentation split'),
        ('--mixup', float, 0.0, 'mixup alpha', at_least(0)),
        ('--cutmix', float, 0.0, 'cutmix alpha', at_least(0)),
        ('--cutmix-minmax', [float], None, 'size range of the cutmix box, instead of alpha', _BOX),
        ('--mixup-prob', float, 1.0, 'probability of mixup or cutmix', SHARE),
        ('--mixup-switch-prob', float, 0.5, 'probability of cutmix where both are on', SHARE),
        ('--mixup-mode', ('batch', 'pair', 'elem'), 'batch', 'what shares one mix'),
        ('--mixup-off-epoch', int, 0, 'no mixup from this epoch on (0: always)', at_least(0)),
        ('--smoothing', float, 0.1, 'label smoothing', at_least(0, 0.999)),
        ('--train-interpolation', (*_FILTERS, 'random'), 'random', 'resize interpolation in training'),
        ('--drop', float, 0.0, 'dropout rate', SHARE),
        ('--drop-connect', float, None, 'old name of --drop-path', SHARE),
        ('--drop-path', float, None, 'drop path rate', SHARE),
        ('--drop-block', float, None, 'drop block rate, of models that have it', SHARE),
    ],
    'batch norm and weight average': [
        ('--bn-momentum', float, None, 'batch norm momentum, of models that have it', SHARE),
        ('--bn-eps', float, None, 'batch norm epsilon, of models that have it', at_least(0)),
        ('--sync-bn', bool, False, 'synchronize batch norm over the ranks'),
        ('--dist-bn', ('broadcast', 'reduce', ''), 'reduce', "bring the ranks' batch norm statistics together"),
        ('--split-bn', bool, False, 'a batch norm for each augmentation split'),
        ('--model-ema', bool, False, 'keep an exponential moving average of the weights and evaluate it'),
        ('--model-ema-force-cpu', bool, False, 'keep it on the CPU of rank 0 and do not evaluate it'),
        ('--model-ema-decay', float, 0.9998, 'its decay', SHARE),
        ('--model-ema-warmup', bool, False, 'let its decay rise from zero'),
    ],
    'run': [
        ('--worker-seeding', ('all',), 'all', 'each sample has its own seed, whichever worker fetches it'),
        ('--log-interval', int, 50, 'steps between two lines of the log', at_least(1)),
        ('--val-interval', int, 1, 'epochs between two evaluations', at_least(1)),
        ('--recovery-interval', int, 0, 'steps between two recovery checkpoints (0: none)', at_least(0)),
        ('--checkpoint-hist', int, 10, 'checkpoints to keep, best first', at_least(1)),
        ('--checkpoint-every', int, 0, 'also keep the checkpoint of every N-th epoch', at_least(0)),
        ('--save-images', bool, False, 'save a training batch as an image at each line of the log'),
        ('--output', str, '', 'folder of all runs (default: ./output/train)'),
        ('--experiment', str, '', 'name of this run, its folder in --output (NAME-2, ... where there is a run NAME)'),
        ('--overwrite', bool, False, 'remove the run that is in the folder of --experiment'),
        ('--eval-metric', str, 'top1', 'metric that decides which checkpoint is best'),
        ('--tta', refused, 0, 'no loader makes the augmented views that it would average'),
        ('--use-multi-epochs-loader', refused, False, _WORKERS),
        ('--persistent-workers', refused, True, _WORKERS),
        ('--no-persistent-workers', refused, True, _WORKERS),
        ('--early-stop-patience', int, 0, 'stop after N evaluations without a better metric (0: never)', at_least(0)),
        ('--early-stop-min-delta', float, 0.0, 'what counts as better', at_least(0)),
        ('--max-nonfinite', int, 20, 'stop after N updates in a row with a non-finite loss or gradient', at_least(1)),
        ('--tensorboard', bool, False, 'log to TensorBoard'),
        ('--log-wandb', bool, False, 'log to Weights & Biases'),
        ('--log-trackio', bool, False, 'log to Trackio'),
        ('--wandb-project', str, None, 'project there'),
        ('--wandb-tags', [str], [], 'tags there'),
        ('--wandb-resume-id', str, '', 'run to go on with there'),
        *NAFLEX_EVAL,
        *(
            (name, refused, default, _SIZES)
            for name, default in {
                '--train-img-sizes': None,
                '--train-batch-sizes': None,
                '--train-size-probs': None,
                '--train-size-schedule': 'constant',
                '--train-size-schedule-spread': 0.65,
                '--train-size-random-mix': 0.1,
                '--train-batches-per-epoch --train-steps-per-epoch': None,
                '--variable-batch-loss-scale': 'none',
            }.items()
        ),  # fmt: skip
        ('--naflex-patchify-channels-first', refused, False, _NAFLEX),
        ('--naflex-train-seq-lens', refused, [128, 256, 576, 784, 1024], _NAFLEX),
        ('--naflex-patch-sizes', refused, None, _NAFLEX),
        ('--naflex-patch-size-probs', refused, None, _NAFLEX),
        ('--naflex-loss-scale', refused, 'linear', _NAFLEX),
    ],
    'masked autoencoding': [
        *MASKED,
        ('--gallery-interval', int, 0, 'epochs between two pictures of reconstructions (0: at the end)', at_least(0)),
        ('--save-encoder', str, '', "at the end, write the encoder's weights into this safetensors file"),
    ],
    'knowledge distillation': [
        ('--kd-model-name', str, None, 'name of the teacher, with its published weights'),
        ('--kd-distill-type', ('logit', 'feature', 'token'), 'logit', 'what the student imitates'),
        ('--kd-loss-type', str, 'kl', 'loss of logit distillation'),
        ('--distill-loss-weight', float, None, 'weight of the distillation loss', at_least(0)),
        ('--task-loss-weight', float, None, 'weight of the classification loss', at_least(0)),
        ('--kd-temperature', float, 4.0, 'softmax temperature', POSITIVE),
        ('--kd-student-feature-dim', int, None, "width of the student's features", at_least(1)),
        ('--kd-teacher-feature-dim', int, None, "width of the teacher's features", at_least(1)),
        ('--kd-token-distill-type', ('soft', 'hard'), 'soft', 'loss of token distillation'),
    ],
}

VALIDATE: dict[str, list[Row]] = {
    'data': [
        *DATA,
        ('--split', str, 'validation', 'split to evaluate on'),
        ('--val-fraction', float, None, 'only the share of the split that training held out (same --seed)', _PART),
        ('--num-samples', int, None, 'images in the split of a streamed data set', at_least(1)),
        ('--real-labels', str, '', 'JSON file of ImageNet ReaL labels'),
        ('--valid-labels', str, '', "file with the model's class indices that the data set uses, one a line"),
    ],
    'model': [
        ('--model -m', str, 'dpn92', 'name of the model, or a pattern'),
        ('--checkpoint', str, '', 'file with the weights, or a folder of such files'),
        ('--use-ema', bool, False, 'take the moving average in the checkpoint'),
        *MODEL,
        ('--batch-size -b', batch_size, 256, 'images a step and a process, or auto: the most that fit', at_least(1)),
        ('--use-train-size', bool, False, 'evaluate at the training size where the model has two'),
        ('--crop-mode', ('squash', 'border', 'center'), None, 'crop (default: as the model, mostly center)'),
        ('--crop-border-pixels', int, None, 'border to cut off first', at_least(0)),
        ('--test-pool', bool, False, 'average over positions of a larger image at test time'),
        ('--reparam', bool, False, 'merge branches of a model that can'),
        ('--aot-autograd', refused, False, 'use --torchcompile aot_eager'),
        ('--tf-preprocessing', refused, False, 'TensorFlow preprocessing is not part of this project'),
        *NAFLEX_EVAL,
    ],
    'masked autoencoding': [
        *MASKED,
        (
            '--mask-ratios',
            [float],
            [0.25, 0.5, 0.75, 0.9],
            'mask ratios that a report compares',
            Range(0, 1, above=True),
        ),
    ],
    'device': [*DEVICE, ('--num-gpu', refused, 1, 'start one process a GPU with torchrun')],
    'run': [
        ('--log-freq', int, 10, 'steps between two lines of the log', at_least(1)),
        ('--report', str, '', 'write report.html, tables and pictures into this folder'),
        ('--results-file', str, '', 'write the results to this file'),
        ('--results-format', ('csv', 'json'), 'csv', 'its format (default: json of FILE.json, else csv)'),
        ('--retry', bool, False, 'halve the batch size and try again when memory runs out'),
        ('--metrics-avg', ('micro', 'macro', 'weighted'), None, 'also precision, recall and F1 with this average'),
    ],
}

# those whose value is a file or a folder
PATHS = frozenset(
    """
    --data-dir --class-map --real-labels --valid-labels --checkpoint --pretrained-path --initial-checkpoint --resume
    --output --report --results-file --save-encoder
    """.split()
)

# those that `--help` shows; `--help all` shows all
USUAL = frozenset(
    """
    --recipe --list-recipes --config --data-dir --dataset --dataset-download --val-fraction --split --data-in-memory
    --model --pretrained --pretrained-path --checkpoint --use-ema --resume --num-classes --img-size --in-chans
    --batch-size --epochs --opt --lr --weight-decay --warmup-epochs --clip-grad --layer-decay --linear-probe
    --aa --mixup --cutmix --reprob --smoothing --drop-path --model-ema --mae --mask-ratio
    --device --amp --amp-dtype --workers --seed --torchcompile
    --output --experiment --overwrite --eval-metric --tensorboard --report --results-file
    """.split()
)
