"""Every recipe is one that the real parser takes, says where its numbers are from, and is what it says it is."""

import re
import shlex
from pathlib import Path

import pytest
import timm
import torch
import yaml

import vim_timm  # noqa: F401  registers the models
from vim_timm import original, train
from vim_timm.engine import build
from vim_timm.models.pretrained import PACKAGED
from vim_timm.settings.flags import TRAIN
from vim_timm.settings.parse import RECIPES

PATHS = sorted(Path(str(RECIPES)).glob('*.yaml'))
NAMES = [path.stem for path in PATHS]
DOCS = Path(__file__).parents[1] / 'docs'
FLAGS = {row[0].split()[0].lstrip('-').replace('-', '_'): row for rows in TRAIN.values() for row in rows}


def head(name):
    return [line for line in (Path(str(RECIPES)) / f'{name}.yaml').read_text().splitlines() if line.startswith('#')]


def settings(*argv):
    return vars(train.parse_args(argv))


def test_the_promised_recipes_exist():
    assert set(NAMES) == {
        'digits', 'mnist', 'mnist_vim2', 'fashion_mnist', 'cifar10_nano', 'cifar10_tiny', 'cifar100_tiny',
        'imagenet_tiny', 'imagenet_small', 'imagenet_base', 'imagenet_tiny_stride8', 'imagenet_small_stride8',
        'mae_digits', 'cifar10_tiny_mae', 'cifar10_tiny_finetune', 'cifar10_tiny_probe',
    }  # fmt: skip


@pytest.mark.parametrize('name', NAMES)
def test_every_key_is_a_flag_and_reaches_the_run(name):
    recipe = yaml.safe_load((Path(str(RECIPES)) / f'{name}.yaml').read_text())
    assert recipe.keys() <= FLAGS.keys()
    args = settings('--recipe', name)
    assert {key: args[key] for key in recipe} == recipe
    assert args['recipe'] == name


@pytest.mark.parametrize('name', NAMES)
def test_flags_override(name):
    assert settings('--recipe', name, '--epochs', '3', '--lr', '0.5')['epochs'] == 3


@pytest.mark.parametrize('name', NAMES)
def test_head_says_where_the_numbers_are_from(name):
    text = '\n'.join(head(name))
    assert any(words in text for words in ('measured: 20', 'reported by the authors', 'not measured'))
    command = re.search(r'command: (.*)', text).group(1)
    words = shlex.split(command)
    arguments = words[words.index('train.py') + 1 :]
    args = settings(*arguments)
    assert args['recipe'] == name


@pytest.mark.parametrize('name', NAMES)
def test_its_model_can_be_built(name):
    args = train.parse_args(['--recipe', name])
    kwargs = dict(num_classes=args.num_classes or 10, drop_path_rate=args.drop_path, **args.model_kwargs)
    kwargs.update({key: value for key, value in dict(img_size=args.img_size, in_chans=args.in_chans).items() if value})
    size = (args.img_size or 32,) * 2
    if args.mae:
        model = build.make_model(args)
        assert model.patch_embed.img_size == size and model.mask_ratio == args.mask_ratio
        return
    model = timm.create_model(args.model, device='meta', **kwargs)
    assert model.patch_embed.img_size == size
    model.blocks = model.blocks[:4]  # the others are like them
    assert model(torch.zeros(2, args.in_chans or 3, *size, device='meta')).shape == (2, kwargs['num_classes'])


def test_list_recipes_names_them_all(capsys):
    with pytest.raises(SystemExit) as end:
        train.main(['--list-recipes'])
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == NAMES


def test_unknown_recipe_is_answered_with_the_known_ones(capsys):
    assert train.main(['--recipe', 'cifar']) == 2
    message = capsys.readouterr().err
    assert all(name in message for name in NAMES)


MIDDLE = 'bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2'
FINE = '--batch-size 128 --lr 5e-6 --min-lr 1e-5 --warmup-lr 1e-5 --drop-path 0.0 --weight-decay 1e-8 --epochs 30'
# vim/scripts/{pt,ft}-vim-{t,s}.sh of the original, without paths
SCRIPTS = {
    'imagenet_tiny': f'--model vim_tiny_patch16_224_{MIDDLE} --batch-size 128 --drop-path 0.0 --weight-decay 0.1',
    'imagenet_small': f'--model vim_small_patch16_224_{MIDDLE} --batch-size 64 --drop-path 0.05 --weight-decay 0.05 '
    '--lr 1e-3',
    'imagenet_tiny_stride8': f'--model vim_tiny_patch16_stride8_224_{MIDDLE} {FINE}',
    'imagenet_small_stride8': f'--model vim_small_patch16_stride8_224_{MIDDLE} {FINE}',
}


@pytest.mark.parametrize('name', SCRIPTS)
def test_imagenet_recipes_are_the_authors_scripts(name, tmp_path):
    words = f'{SCRIPTS[name]} --num_workers 25 --no_amp --data-path {tmp_path} --output_dir out/a'.split()
    translated = original.translate(original.build_parser().parse_args(words), set(words), world_size=8)
    theirs = settings(*translated.arguments)
    ours = settings('--recipe', name, '--data-dir', str(tmp_path))
    # names of folders; the class count, which here is the data's; and how soon a failing run gives up
    different = {'recipe', 'output', 'experiment', 'num_classes', 'val_split', 'max_nonfinite'}
    # torchvision's reader numbers ImageNet's class folders as ours does
    different.add('dataset')
    # the original's defaults of what these schedules do not use
    unused = {'decay_epochs'}
    assert {key for key in ours if ours[key] != theirs[key]} <= different | unused


def test_effective_learning_rates_of_the_authors():
    for name, rate in (('imagenet_tiny', 1e-3), ('imagenet_small', 1e-3), ('imagenet_tiny_stride8', 1e-5)):
        args = train.parse_args(['--recipe', name])
        assert build.learning_rate(args, world_size=8) == pytest.approx(rate)


def test_cifar10_recipe_is_the_measured_run():
    command = re.search(r'^python train.py (--data-dir CIFAR10 .*)$', (DOCS / 'cifar10.md').read_text(), re.MULTILINE)
    measured, recipe = settings(*shlex.split(command.group(1))), settings('--recipe', 'cifar10_tiny')
    assert {key for key in recipe if recipe[key] != measured[key]} == {'recipe', 'dataset', 'data_dir'}


def test_the_weights_in_the_package_are_of_their_recipe():
    run = yaml.safe_load((PACKAGED / 'vim_nano_patch4_32.cifar10' / 'args.yaml').read_text())
    recipe = settings('--recipe', 'cifar10_nano')
    different = {key for key in run if run[key] != recipe[key]}
    assert different == {
        'dataset',
        'data_dir',
        'cuda_graph',
        'decay_epochs',
    }  # the last, another default now, is unused


def test_docs_name_every_recipe():
    text = (DOCS / 'recipes.md').read_text()
    assert all(f'`{name}`' in text for name in NAMES)
