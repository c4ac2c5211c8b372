"""The README is true: its commands parse, its models exist and have the parameters it says."""

import contextlib
import re
import shlex
from pathlib import Path

import pytest
import timm

import vim_timm  # noqa: F401  registers the models
from vim_timm import train, validate
from vim_timm.commands import console
from vim_timm.settings.flags import VALIDATE
from vim_timm.settings.parse import parse

README = (Path(__file__).parents[1] / 'README.md').read_text()
COMMANDS = [line for block in re.findall(r'```sh\n(.*?)```', README, re.DOTALL) for line in block.splitlines()]
MODELS = re.findall(r'^\| `(\w+)` \| (\d+) \| ([\d,]+) \| `?(\w*)`? ?\|', README, re.MULTILINE)


@pytest.mark.parametrize('line', [line for line in COMMANDS if line.startswith('vim-timm ')])
def test_the_console_script_runs(line, capfd):
    with pytest.raises(SystemExit) if '--help' in line else contextlib.nullcontext() as end:
        assert console(shlex.split(line)[1:]) == 0
    assert end is None or end.value.code == 0
    assert capfd.readouterr().out


@pytest.mark.parametrize('line', [line for line in COMMANDS if re.match('python|torchrun', line) and '--' in line])
def test_commands_parse(line):
    words = shlex.split(line)
    name = next(word for word in words if word.startswith(('train', 'validate', 'vim_timm.')))
    arguments = words[words.index(name) + 1 :]
    if 'validate' in name:
        args = parse(validate.PROGRAM, VALIDATE, arguments)
    else:
        args = train.parse_args(arguments)
    assert args.data_dir


def test_every_model_with_weights_is_listed():
    listed = {f'{name}.{tag}' for name, _, _, tag in MODELS}
    ours = {name for name in timm.list_pretrained() if timm.model_entrypoint(name).__module__.startswith('vim_timm')}
    assert listed == ours


@pytest.mark.parametrize('name', re.findall(r'`((?:vim|mae)\w*_patch\d+_\d+)`', README))
def test_names_are_models(name):
    assert timm.is_model(name)


@pytest.mark.parametrize('name, size, parameters, tag', MODELS)
def test_models_are_as_described(name, size, parameters, tag):
    model = timm.create_model(name, device='meta')
    assert model.patch_embed.img_size == (int(size), int(size))
    assert sum(parameter.numel() for parameter in model.parameters()) == int(parameters.replace(',', ''))
    assert (model.pretrained_cfg['tag'] == tag) if tag else not timm.is_model_pretrained(name)


def test_the_example_runs():
    (code,) = re.findall(r'```python\n(.*?)```', README, re.DOTALL)
    names = {}
    exec(code.replace('pretrained=True', 'pretrained=False'), names)  # without the download
    assert names['logits'].shape == (1, 1000)
    assert {tuple(features.shape) for features in names['maps']} == {(1, 384, 14, 14)}
