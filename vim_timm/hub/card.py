"""The model card of a published folder: its text from what is known of the run, nothing from this machine's paths."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

# data sets as --dataset names them -> name to read, and where the Hub has them
DATASETS = {
    'digits': ('handwritten digits of scikit-learn', ''),
    'torch/mnist': ('MNIST', 'ylecun/mnist'),
    'torch/fashion_mnist': ('Fashion-MNIST', 'zalando-datasets/fashion_mnist'),
    'torch/cifar10': ('CIFAR-10', 'uoft-cs/cifar10'),
    'torch/cifar100': ('CIFAR-100', 'uoft-cs/cifar100'),
    'torch/imagenet': ('ImageNet-1k', 'ILSVRC/imagenet-1k'),
}
CITATIONS = (
    """@inproceedings{zhu2024vision,
  title = {Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model},
  author = {Zhu, Lianghui and Liao, Bencheng and Zhang, Qian and Wang, Xinlong and Liu, Wenyu and Wang, Xinggang},
  booktitle = {International Conference on Machine Learning},
  year = {2024}
}""",
    """@misc{rw2019timm,
  author = {Ross Wightman},
  title = {PyTorch Image Models},
  year = {2019},
  howpublished = {\\url{https://github.com/huggingface/pytorch-image-models}}
}""",
)


@dataclass
class Facts:
    """What a card tells.

    Attributes:
        name: name of the repository.
        source: what `timm.create_model` takes.
        architecture: registered name.
        parameters: their number.
        image: (channels, height, width).
        dtype: of the tensors in the file.
        license, notes: an SPDX-like name in lower case, and sentences about it.
        dataset: --dataset's value.
        data_name: what the data are called, where that does not say it.
        split: that was evaluated.
        result: validate.py's row, or {}.
        evaluate: the command that printed it.
        train: the command that trained the model, or ''.
        made: how it came about, by name: commit, versions, hardware, date, time.
        class_names: in the order of the outputs.
        encoder: its outputs are features, no logits.
        mode: PIL mode of its pictures; '' for arrays of channels, which are none.
    """

    name: str
    source: str
    architecture: str
    parameters: int
    image: Sequence[int]
    dtype: str = 'float32'
    license: str = 'apache-2.0'
    notes: Sequence[str] = ()
    dataset: str = ''
    data_name: str = ''
    split: str = ''
    result: Mapping[str, Any] = field(default_factory=dict)
    evaluate: str = ''
    train: str = ''
    made: Mapping[str, str] = field(default_factory=dict)
    class_names: Sequence[str] = ()
    encoder: bool = False
    mode: str = 'RGB'


def card(facts: Facts) -> str:
    """The text of README.md, its metadata first."""
    title, hub_dataset = DATASETS.get(facts.dataset, (facts.dataset.partition('/')[2] or 'a folder of images', ''))
    title = facts.data_name or title
    if facts.dataset.startswith(('hfds/', 'hfids/')):
        hub_dataset = facts.dataset.partition('/')[2]
    sections = [
        f'---\n{_metadata(facts, title, hub_dataset)}\n---',
        f'# {facts.name}',
        _summary(facts, title),
        '## Use\n\nNeeds `vim-timm`, whose import registers the model with timm.\n\n' + _usage(facts),
        _accuracy(facts, title),
        _training(facts),
        _classes(facts.class_names),
        '\n\n'.join(['## Licence', f'`{facts.license}`', *facts.notes]),
        '## Citation\n\n' + '\n\n'.join(f'```bibtex\n{entry}\n```' for entry in CITATIONS),
    ]
    return '\n\n'.join(filter(None, sections)) + '\n'


def _metadata(facts: Facts, dataset: str, hub_dataset: str) -> str:
    results = [
        EvalResult(
            task_type='image-classification', dataset_type=hub_dataset or dataset, dataset_name=dataset,
            dataset_split=facts.split or None, metric_type='accuracy', metric_name=f'top-{place}',
            metric_value=round(facts.result[f'top{place}'], 3),
        )
        for place in (1, 5)
        if f'top{place}' in facts.result
    ]  # fmt: skip
    use = 'image-feature-extraction' if facts.encoder else 'image-classification'
    data = ModelCardData(
        library_name='timm', pipeline_tag=use if facts.class_names or results or facts.encoder else None,
        license=facts.license, tags=['timm', 'vim-timm', 'vision-mamba', use],
        datasets=[hub_dataset] if hub_dataset else None, model_name=facts.name if results else None,
        eval_results=results or None,
    )  # fmt: skip
    return data.to_yaml().strip()


def _summary(facts: Facts, dataset: str) -> str:
    channels, height, width = facts.image
    trained = f', trained on {dataset}' if facts.dataset or facts.data_name else ''
    return (
        f'`{facts.architecture}`{trained}: {facts.parameters:,} parameters in {facts.dtype}, '
        f'{height} x {width} images of {channels} channel{"s" if channels > 1 else ""}.'
    )


def _usage(facts: Facts) -> str:
    imports = ['import timm', 'import torch', 'import vim_timm  # first: it registers the model']
    if facts.mode:
        imports.append('from PIL import Image')
        image = f"""transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = transform(Image.open('image.png').convert('{facts.mode}'))"""
    else:
        size = ', '.join(map(str, facts.image))
        image = f"""channels = torch.rand({size})  # yours, in 0..1 as they were in training
mean, std = (torch.tensor(model.pretrained_cfg[name]).view(-1, 1, 1) for name in ('mean', 'std'))
image = (channels - mean) / std"""
    lines = [
        *imports,
        f"\nmodel = timm.create_model('{facts.source}', pretrained=True).eval()",
        image,
        'with torch.no_grad():',
        f'    {"features" if facts.encoder else "scores"} = model(image[None]){"" if facts.encoder else ".softmax(1)"}',
    ]
    return '\n'.join(['```python', *lines, '```'])


def _accuracy(facts: Facts, dataset: str) -> str:
    if not facts.result:
        return '## Accuracy\n\nNot evaluated.'
    result = facts.result
    lines = [
        '## Accuracy',
        '| data | split | images | top-1 (%) | top-5 (%) |\n|---|---|---|---|---|\n'
        f'| {dataset} | {facts.split} | {result["count"]:,} | {result["top1"]:.3f} | {result["top5"]:.3f} |',
    ]
    return '\n\n'.join([*lines, f'Of these very weights, printed by\n\n```sh\n{facts.evaluate}\n```'])


def _training(facts: Facts) -> str:
    parts = ['## Training']
    if facts.train:
        parts.append(f'```sh\n{facts.train}\n```')
    parts.append('\n'.join(f'* {name}: {value}' for name, value in facts.made.items() if value))
    if facts.train:
        parts.append('`args.yaml` holds all settings of the run, `summary.csv` its log.')
    return '\n\n'.join(filter(None, parts)) if len(parts) > 2 or facts.made else ''


def _classes(names: Sequence[str]) -> str:
    if not names:
        return ''
    listing = ', '.join(names) if len(names) <= 100 else f'{len(names):,} names, in `config.json`'
    return f'## Classes\n\n{listing}'
