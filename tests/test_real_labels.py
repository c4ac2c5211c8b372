"""Evaluation by ImageNet's reassessed labels (ReaL)."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from vim_timm import validate
from vim_timm.settings import Process


def imagenet_validation(root, count=6):
    """Images with the names of ImageNet's validation split, of a class each; the third one is broken."""
    for i in range(count):
        path = root / 'validation' / f'n{i}' / f'ILSVRC2012_val_{i + 1:08d}.JPEG'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((16, 16, 3), 40 * i, np.uint8)).save(path)
    (root / 'validation' / 'n2' / 'ILSVRC2012_val_00000003.JPEG').write_bytes(b'broken')
    return root


@pytest.fixture
def constant(tmp_path):
    """Flags for a model of six classes that always answers class 1."""
    model = timm.create_model('test_vit', num_classes=6, img_size=16)
    torch.nn.init.zeros_(model.head.weight)
    model.head.bias.data = torch.eye(6)[1]
    save_file(model.state_dict(), str(tmp_path / 'c.safetensors'))
    flags = '--model test_vit --num-classes 6 --img-size 16 --device cpu --workers 0'.split()
    return [*flags, '--checkpoint', str(tmp_path / 'c.safetensors'), '--data-dir', str(imagenet_validation(tmp_path))]


def test_real_labels_go_by_file_name_and_skip_images_without_one(tmp_path, constant):
    (tmp_path / 'real.json').write_text(json.dumps([[1], [1], [0], [], [0, 1], [0]]))
    args = validate.parse_args([*constant, '--real-labels', str(tmp_path / 'real.json')])
    # Of images 1, 2, 5 and 6: the broken one and the one without labels do not count.
    assert validate.validate(args, Process())['top1'] == 75


def test_real_labels_need_no_class_folders_and_then_there_is_no_loss(tmp_path, constant, capsys):
    for path in [*tmp_path.glob('validation/*/*.JPEG')]:
        path.rename(tmp_path / 'validation' / path.name)
    for path in [*tmp_path.glob('validation/n*')]:
        path.rmdir()
    (tmp_path / 'real.json').write_text(json.dumps([[1], [1], [0], [], [0, 1], [0]]))
    flags = [*constant, '--real-labels', str(tmp_path / 'real.json')]
    row = validate.validate(validate.parse_args(flags), Process())
    assert row['top1'] == 75 and 'loss' not in row
    assert validate.main([*flags, '--report', str(tmp_path / 'report')]) == 2
    assert 'has no class folders' in capsys.readouterr().err


def test_real_labels_are_not_those_of_chosen_classes(tmp_path, constant, capsys):
    for name, text in (('real.json', json.dumps([[1]] * 6)), ('labels', '1\n0\n')):
        (tmp_path / name).write_text(text)
    flags = ['--real-labels', str(tmp_path / 'real.json'), '--valid-labels', str(tmp_path / 'labels')]
    assert validate.main([*constant, *flags]) == 2
    assert 'leave --valid-labels out' in capsys.readouterr().err


@pytest.mark.parametrize('labels, message', [([[1]] * 5, 'another number'), (None, 'real.json')])
def test_wrong_real_labels_end_in_a_sentence(tmp_path, constant, labels, message, capsys):
    if labels is not None:
        (tmp_path / 'real.json').write_text(json.dumps(labels))
    assert validate.main([*constant, '--real-labels', str(tmp_path / 'real.json')]) == 2
    assert message in capsys.readouterr().err


def test_real_labels_are_numbers_of_imagenet_s_own_classes(tmp_path, constant, capsys):
    real = ['--real-labels', str(tmp_path / 'real.json')]
    (tmp_path / 'real.json').write_text(json.dumps([[1], [6], [0], [], [0, 1], [0]]))
    assert validate.main([*constant, *real]) == 2
    assert 'it has the class number 6, and the model has classes 0 to 5' in capsys.readouterr().err
    (tmp_path / 'real.json').write_text(json.dumps([[1], [1], [0], [], [0, 1], [0]]))
    names = [f'n0000000{number}' for number in range(6)]
    for number, name in enumerate(names):
        (tmp_path / 'validation' / f'n{number}').rename(tmp_path / 'validation' / name)
    assert validate.main([*constant, *real]) == 0
    (tmp_path / 'map.txt').write_text('\n'.join(reversed(names)))
    assert validate.main([*constant, *real, '--class-map', str(tmp_path / 'map.txt')]) == 2
    assert 'the model has them otherwise' in capsys.readouterr().err
