"""The README is true: its commands parse, its models exist and have the parameters it says."""

import re
import shlex
from pathlib import Path

import pytest
import timm

import vim_timm  # noqa: F401  registers the models
from vim_timm import train, validate
from vim_timm.settings.flags import VALIDATE
from vim_timm.settings.parse import parse

README = (Path(__file__).parents[1] / 'README.md').read_text()
COMMANDS = [line for block in re.findall(r'```sh\n(.*?)```', README, re.DOTALL) for line in block.splitlines()]
MODELS = re.findall(r'^\| `(\w+)` \| (\d+) \| ([\d,]+) \| `?(\w*)`? ?\|', README, re.MULTILINE)


@pytest.mark.parametrize('line', [line for line in COMMANDS if '--' in line and 'venv' not in line])
def test_commands_parse(line):
    words = shlex.split(line)
    name = next(word for word in words if word.startswith(('train', 'validate', 'vim_timm.')))
    arguments = words[words.index(name) + 1 :]
    if 'validate' in name:
        args = parse(validate.PROGRAM, VALIDATE, arguments)
    else:
        args = train.parse_args(arguments)
    assert args.data_dir


FAMILIES = ('vision_mamba', 'vision_mamba2', 'vision_mamba_hybrid')


def test_every_model_is_listed():
    listed = {name for name, *_ in MODELS}
    families = [name for module in FAMILIES for name in timm.list_models(module=module)]
    short = {'vim_tiny', 'vim_small', 'vim_base'}
    assert listed == {name for name in families if not name.startswith('test_')} - short


@pytest.mark.parametrize('name, size, parameters, tag', MODELS)
def test_models_are_as_described(name, size, parameters, tag):
    model = timm.create_model(name, device='meta')
    assert model.patch_embed.img_size == (int(size), int(size))
    assert sum(parameter.numel() for parameter in model.parameters()) == int(parameters.replace(',', ''))
    assert (model.pretrained_cfg['tag'] == tag) if tag else not timm.is_model_pretrained(name)
