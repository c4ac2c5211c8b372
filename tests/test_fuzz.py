"""Damaged checkpoints and images, odd class folders and flags end in a sentence, or are what they seem.

VIM_TIMM_FUZZ=N tries N examples of each.
"""

import io
import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from vim_timm import data, train, validate
from vim_timm.data.images import read_image
from vim_timm.data.sampling import UNREADABLE
from vim_timm.errors import UserError
from vim_timm.models.checkpoint import read_checkpoint, select_weights
from vim_timm.settings.flags import TRAIN, VALIDATE

fuzz = settings(
    max_examples=int(os.environ.get('VIM_TIMM_FUZZ', 40)), deadline=None, suppress_health_check=list(HealthCheck)
)
WEIGHTS = {'a': torch.arange(6.0).reshape(2, 3), 'b': torch.ones(3, dtype=torch.bfloat16)}


def _torch_file(content, **kwargs):
    file = io.BytesIO()
    torch.save(content, file, **kwargs)
    return file.getvalue()


CHECKPOINTS = {
    'w.pth': _torch_file({'state_dict': WEIGHTS, 'epoch': 3, 'args': {'model': 'test_vim'}}),
    'w.pth.tar': _torch_file(WEIGHTS),
    'legacy.pth': _torch_file({'model': WEIGHTS}, _use_new_zipfile_serialization=False),
    'w.safetensors': save(WEIGHTS),
}


def damaged(content):
    """Bytes of `content`, some changed, cut off or put in."""
    place = st.integers(0, len(content) - 1)
    change = st.tuples(place, place, st.binary(max_size=8))
    return st.lists(change, min_size=1, max_size=3).map(lambda changes: _damage(content, changes))


def _damage(content, changes):
    for begin, length, new in changes:
        content = content[:begin] + new + content[begin + (length if length % 5 == 0 else len(new)) :]
    return content


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', CHECKPOINTS)
@fuzz
@given(draws=st.data())
def test_a_damaged_checkpoint_is_refused_in_a_sentence_or_is_whole(name, draws):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(draws.draw(damaged(CHECKPOINTS[name])))
        try:
            weights = select_weights(read_checkpoint(str(path)))
        except UserError as error:
            assert str(error) and '\n' not in str(error)
            return
        assert all(isinstance(value, torch.Tensor) for value in weights.values())
        if name in ('w.pth', 'w.pth.tar'):  # zip archives have checksums
            assert all(torch.equal(value, WEIGHTS[key]) for key, value in weights.items())


def _picture(kind):
    file = io.BytesIO()
    Image.linear_gradient('L').resize((16, 12)).convert('RGB').save(file, kind)
    return file.getvalue()


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind', ['PNG', 'JPEG', 'GIF', 'BMP', 'TIFF', 'WEBP'])
@fuzz
@given(draws=st.data())
def test_a_damaged_image_is_unreadable_or_an_image(kind, draws):
    content = draws.draw(damaged(_picture(kind)))
    mode = draws.draw(st.sampled_from(['L', 'RGB', 'RGBA']))
    try:
        image = read_image(io.BytesIO(content), mode)
    except UNREADABLE as error:
        assert not isinstance(error, UserError) or str(error)
        return
    assert image.mode == mode and min(image.size) > 0


def _flags(table):
    return sorted({name for rows in table.values() for row in rows for name in row[0].split() if name.startswith('--')})


VALUES = st.one_of(
    st.sampled_from(['', '0', '-1', '1e400', 'nan', 'inf', 'None', 'true', '[1', '{', '1 2', 'a=b', '..', '*', '\x7f']),
    st.integers(-(2**70), 2**70).map(str),
    st.floats().map(str),
    st.text(max_size=8).filter(lambda text: '\0' not in text),
)


@pytest.mark.parametrize('program, table', [(train, TRAIN), (validate, VALIDATE)], ids=['train', 'validate'])
@fuzz
@given(draws=st.data())
def test_odd_flags_are_settings_or_a_sentence(program, table, draws):
    names = st.sampled_from([name for name in _flags(table) if name not in ('--help', '--list-recipes')])
    words = draws.draw(st.lists(st.tuples(names, st.lists(VALUES, max_size=2)), min_size=1, max_size=4))
    arguments = [word for name, values in words for word in (name, *values)]
    try:
        program.parse_args(arguments)
    except UserError as error:
        assert str(error)
    except SystemExit as error:
        assert error.code == 2


NAMES = st.text(st.characters(codec='utf-8', exclude_characters='/\0'), min_size=1, max_size=6).filter(
    lambda name: name.strip('.')
)


@fuzz
@given(names=st.lists(NAMES, min_size=1, max_size=5, unique=True), order=st.randoms(use_true_random=False))
def test_odd_class_folders_have_one_numbering_or_a_sentence(names, order):
    arguments = '--dataset= --model test_vit --device cpu --workers 0'.split()

    def classes(names):
        with tempfile.TemporaryDirectory() as folder:
            for name in names:
                os.makedirs(os.path.join(folder, 'train', name))
                Image.new('RGB', (4, 4)).save(os.path.join(folder, 'train', name, 'a.png'))
            args = train.parse_args([*arguments, '--data-dir', folder])
            try:
                return data.class_names(data.make_dataset(args, 'train', True, 3))
            except UserError:
                return None

    found = classes(names)
    assert found == classes(order.sample(names, len(names)))
    assert found is None or set(found) <= set(names)
