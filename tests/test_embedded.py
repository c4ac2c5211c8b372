"""The weights that come with the package are whole, small, what their card says, and work without a network."""

import re
from pathlib import Path

import pytest
import timm
from huggingface_hub import ModelCard
from PIL import Image

import vim_timm  # noqa: F401  registers the models
from vim_timm import predict
from vim_timm.doctor import main as doctor
from vim_timm.hub.folder import FILES, WEIGHTS, check_folder
from vim_timm.hub.publish import EMBEDDED_LIMIT, embedded
from vim_timm.models.pretrained import published

ROOT = Path(__file__).parents[1]
NAME = 'vim_nano_patch4_32.cifar10'


def test_they_are_the_ones_that_are_promised():
    assert [folder.name for folder in embedded()] == [NAME]
    assert timm.get_pretrained_cfg('vim_nano_patch4_32').tag == 'cifar10'
    assert NAME in published()


@pytest.mark.parametrize('folder', embedded(), ids=lambda folder: folder.name)
def test_a_folder_is_whole_and_names_no_place(folder):
    check_folder(folder)
    assert {path.name for path in folder.iterdir()} == set(FILES)
    assert (folder / WEIGHTS).stat().st_size <= EMBEDDED_LIMIT
    for path in folder.iterdir():
        place = re.search(rb'(?<![\w:/.])/(tmp|root|home|work|data|mnt)/', path.read_bytes())
        assert path.name == WEIGHTS or not place, (path.name, place)


def test_documents_tell_the_accuracy_of_the_card():
    (folder,) = embedded()
    card = ModelCard((folder / 'README.md').read_text())
    top1 = f'{card.data.eval_results[0].metric_value:.1f}'
    (row,) = re.findall(r'^\| `vim_nano_patch4_32` .*`cifar10` \| (\S+)', (ROOT / 'README.md').read_text(), re.M)
    assert row == top1 and f'({top1} %)' in (ROOT / 'CHANGELOG.md').read_text()
    assert '* seed: 0' in card.text and re.search(r'\* commit: [0-9a-f]{40}\n', card.text)


def test_a_picture_is_named_at_once(tmp_path, capsys):
    Image.new('RGB', (40, 30), 'blue').save(tmp_path / 'sea.png')
    assert predict.main([str(tmp_path / 'sea.png'), '--model', 'vim_nano_patch4_32', '--device', 'cpu']) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert any(name in line for name in timm.get_pretrained_cfg(NAME).label_names)


def test_the_doctor_finds_them_sound(capsys):
    assert doctor(['--weights']) == 0
    assert f'{NAME}: SHA-256' in capsys.readouterr().out
