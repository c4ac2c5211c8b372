"""Arrays of any number of channels are read as they are stored, in 0..1, or refused with the reason."""

import io
import json
import re
import shutil
import sys
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from processes import Python, finish
from timm.data import create_transform

from vim_timm import data, train, validate
from vim_timm.data.arrays import ENDINGS, Arrays, channel_statistics, read_array, unit_range
from vim_timm.data.folder import Images
from vim_timm.errors import UserError

rng = np.random.default_rng(0)
VALUES = rng.integers(0, 65536, (13, 6, 8)).astype(np.uint16)
RUN = (
    '--dataset arrays --model vim_nano_patch4_32 --model-kwargs depth=1 embed_dim=32 --img-size 16 --in-chans 13 '
    '--epochs 6 --batch-size 8 --workers 0 --device cpu --opt adamw --lr 1e-2 --warmup-epochs 0 --smoothing 0'
).split()


def stored(save, *args, **options):
    file = io.BytesIO()
    save(file, *args, **options)
    file.seek(0)
    return file


def tiff(values, **options):
    tifffile = pytest.importorskip('tifffile')
    return stored(tifffile.imwrite, values, photometric='minisblack', **options)


def pages(values):
    first, *others = (Image.fromarray(page) for page in values)
    return stored(first.save, 'TIFF', save_all=True, append_images=others)


@pytest.mark.parametrize(
    'name, file',
    [
        ('x.npy', lambda: stored(np.save, VALUES)),
        ('x.NPY', lambda: stored(np.save, VALUES.transpose(1, 2, 0))),
        ('x.npy', lambda: stored(np.save, VALUES.byteswap().view(VALUES.dtype.newbyteorder()))),
        ('x.npy', lambda: stored(np.save, np.asfortranarray(VALUES))),
        ('x.npz', lambda: stored(np.savez, VALUES)),
        ('x.npz', lambda: stored(np.savez_compressed, bands=VALUES)),
        ('x.tif', lambda: pages(VALUES)),
        ('x.tif', lambda: tiff(VALUES)),
        ('x.tif', lambda: tiff(VALUES, bigtiff=True, byteorder='>')),
        ('x.tiff', lambda: tiff(VALUES, planarconfig='separate')),
        ('x.tif', lambda: tiff(VALUES.transpose(1, 2, 0), planarconfig='contig')),
        ('x.tif', lambda: tiff(VALUES, compression='zlib')),
    ],
)
def test_every_file_of_the_same_bands_is_the_same_array(name, file):
    found = read_array(file(), name, 13)
    assert found.shape == (13, 6, 8) and (found == VALUES).all()


@pytest.mark.parametrize('write', ['Pillow', 'tifffile'])
@pytest.mark.parametrize(
    'kind, mark, missing', [('uint16', '7', 3), ('uint16', '-9999', 0), ('float32', '-3.4028234663852886e+38', 3)]
)
def test_values_that_a_file_says_are_none_are_refused(write, kind, mark, missing):
    """By the tag of GDAL's; -9999 is nothing that uint16 could hold."""
    values = np.ones((2, 6, 8), kind)
    values[1, 0, :3] = float(mark) if missing else 7
    if write == 'Pillow':
        first, *others = (Image.fromarray(page) for page in values)
        file = stored(first.save, 'TIFF', save_all=True, append_images=others, tiffinfo={42113: mark})
    else:
        file = tiff(values, extratags=[(42113, 's', 0, mark, True)], bigtiff=True)  # which Pillow leaves to it
    if not missing:
        assert (read_array(file, 'x.tif', 2) == values).all()
        return
    said = f'3 of its 96 values are none: it says that {re.escape(mark)} stands for no data'
    with pytest.raises(ValueError, match=said):
        read_array(file, 'x.tif', 2)


@pytest.mark.parametrize('values', [VALUES[0], VALUES[:1], VALUES[0][..., None]])
def test_one_channel_needs_no_axis(values):
    assert (read_array(stored(np.save, values), 'x.npy', 1) == VALUES[:1]).all()


def test_pages_of_colours_are_channels_one_after_the_other():
    colours = rng.integers(0, 256, (2, 6, 8, 3)).astype(np.uint8)
    found = read_array(pages(colours), 'x.tif', 6)
    assert (found == colours.transpose(0, 3, 1, 2).reshape(6, 6, 8)).all()


def test_bands_that_pillow_would_drop_or_round_are_kept():
    tifffile = pytest.importorskip('tifffile')
    five = rng.integers(0, 256, (6, 8, 5)).astype(np.uint8)
    file = stored(tifffile.imwrite, five, photometric='rgb', extrasamples=['unspecified'] * 2)
    assert (read_array(file, 'x.tif', 5) == five.transpose(2, 0, 1)).all()
    deep = VALUES[:3].transpose(1, 2, 0)
    assert (read_array(stored(tifffile.imwrite, deep, photometric='rgb'), 'x.tif', 3) == VALUES[:3]).all()


@pytest.mark.parametrize('kind', ['>u2', '>i2', '>u4', '>i4', '>f4', '>f8'])
@pytest.mark.parametrize('compression', [None, 'zlib'])
def test_bytes_of_either_order_are_the_same_numbers(kind, compression):
    tifffile = pytest.importorskip('tifffile')
    values = (VALUES[:3] % 1000).astype(kind)
    together, apart = tiff(values, byteorder='>', compression=compression), io.BytesIO()
    with tifffile.TiffWriter(apart, byteorder='>') as writer:  # a call a page
        for page in values:
            writer.write(page, photometric='minisblack', compression=compression)
    apart.seek(0)
    for file in (together, apart):
        assert (read_array(file, 'x.tif', 3) == values).all()


def test_bands_that_pillow_cannot_read_are_no_remark(capfd):
    read_array(tiff(VALUES.transpose(1, 2, 0), planarconfig='contig'), 'x.tif', 13)
    assert capfd.readouterr() == ('', '')


def test_a_smaller_copy_in_a_file_is_no_channel():
    tifffile = pytest.importorskip('tifffile')
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write(VALUES[0], photometric='minisblack')
        writer.write(VALUES[0, ::2, ::2], photometric='minisblack', subfiletype=1)
    file.seek(0)
    assert (read_array(file, 'x.tif', 1) == VALUES[:1]).all()


def claims(shape):
    """A .npy file whose header promises more than there is."""
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + '\n'
    return io.BytesIO(b'\x93NUMPY\x01\x00' + len(header).to_bytes(2, 'little') + header.encode() + bytes(80))


def bomb():
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('x.npy', b'')
        archive.getinfo('x.npy').file_size = 1 << 40
    file.seek(0)
    return file


def cut(file, share=0.5):
    content = file.getvalue()
    return io.BytesIO(content[: int(len(content) * share)])


def flipped(file):
    content = bytearray(file.getvalue())
    content[len(content) // 2] ^= 255
    return io.BytesIO(bytes(content))


@pytest.mark.parametrize(
    'name, file, words',
    [
        ('x.npy', lambda: stored(np.save, VALUES[:5]), 'shape is .5, 6, 8., which is no image of 13'),
        ('x.npy', lambda: stored(np.save, VALUES[0, 0]), 'no image of 13'),
        ('x.npy', lambda: stored(np.save, VALUES[:, :0]), 'without any value'),
        ('x.npy', lambda: cut(stored(np.save, VALUES)), 'cannot reshape|read'),
        ('x.npy', lambda: claims('(13, 1000000, 1000000)'), 'allocate|read|reshape|expected'),
        ('x.npy', lambda: io.BytesIO(b'garbage'), 'no NumPy file'),
        ('x.npy', lambda: io.BytesIO(), 'no NumPy file'),
        ('x.npy', lambda: stored(np.save, np.array([{}]), allow_pickle=True), 'Object arrays'),
        ('x.npz', lambda: cut(stored(np.savez, VALUES)), 'zip'),
        ('x.npz', lambda: flipped(stored(np.savez, VALUES)), 'CRC'),
        ('x.npz', bomb, 'claims 1024 GiB'),
        ('x.tif', lambda: cut(pages(VALUES)), '.'),
        ('x.tif', lambda: cut(tiff(VALUES), 0.9), 'failed to read|truncated|11 bands'),
        ('x.tif', lambda: pages(VALUES[:12]), '12 bands, and the model takes 13'),
        ('x.tif', lambda: io.BytesIO(b'II*\0garbage'), '.'),
        ('x.tif', lambda: stored(Image.new('L', (4, 4)).save, 'PNG'), 'no TIFF'),
    ],
)
def test_what_cannot_be_read_says_why(name, file, words):
    with pytest.raises(ValueError, match=words) as caught:
        read_array(file(), name, 13)
    assert str(caught.value) and not isinstance(caught.value, UserError)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(['x.npy', 'x.npz', 'x.tif']), st.integers(0, 3000), st.binary(min_size=1, max_size=40))
def test_damaged_files_are_read_or_refused_and_nothing_else(name, place, noise):
    make = {
        'x.npy': lambda: stored(np.save, VALUES),
        'x.npz': lambda: stored(np.savez, VALUES),
        'x.tif': lambda: pages(VALUES),
    }
    content = bytearray(make[name]().getvalue())
    content[place : place + len(noise)] = noise
    try:
        assert read_array(io.BytesIO(bytes(content)), name, 13).shape[0] == 13
    except ValueError as error:
        assert str(error)


def test_an_archive_with_several_arrays_needs_a_name():
    file = stored(np.savez, image=VALUES, mask=VALUES[0])
    assert (read_array(file, 'x.npz', 13, 'image') == VALUES).all()
    for key in ('', 'other'):
        file.seek(0)
        with pytest.raises(UserError, match='holds image, mask: name the images with --input-key'):
            read_array(file, 'x.npz', 13, key)


def test_bands_that_need_a_library_say_so(monkeypatch):
    file = tiff(VALUES.transpose(1, 2, 0), planarconfig='contig')
    monkeypatch.setitem(sys.modules, 'tifffile', None)
    with pytest.raises(UserError, match='pip install'):
        read_array(file, 'x.tif', 13)
    assert (read_array(pages(VALUES), 'x.tif', 13) == VALUES).all()


@pytest.mark.parametrize(
    'values, span, expected',
    [
        (np.array([0, 255], np.uint8), None, [0, 1]),
        (np.array([0, 65535], np.uint16), None, [0, 1]),
        (np.array([False, True]), None, [0, 1]),
        (np.array([0.25, 1], np.float64), None, [0.25, 1]),
        (np.array([0, 1], np.int32), None, [0, 1]),
        (np.array([-100, 5000, 20000], np.int16), (0, 10000), [0, 0.5, 1]),
        (np.array([0, 10000], np.uint16), (0, 10000), [0, 1]),
    ],
)
def test_values_come_in_0_to_1(values, span, expected):
    found = unit_range(values, span)
    assert found.dtype == np.float32 and found.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    'values, words',
    [
        (np.array([0, 1353], np.int16), 'from 0 to 1353: say with --input-span'),
        (np.array([-0.1, 1], np.float32), 'from -0.1 to 1'),
        (np.array([0, np.nan], np.float32), 'not finite'),
        (np.array([0, np.inf], np.float32), 'not finite'),
        (np.array([1j]), 'no numbers but complex128'),
        (np.array(['a']), 'no numbers'),
    ],
)
def test_values_that_nobody_can_place_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        unit_range(values)


def write(root, count=8, channels=13):
    """Tiles of two classes, which differ in one band; the bands differ in size."""
    levels = np.linspace(100, 4000, channels)[:, None, None]
    for split, name in ((split, name) for split in ('train', 'val') for name in ('sea', 'land')):
        (root / split / name).mkdir(parents=True)
        for i in range(count):
            tile = levels + rng.normal(0, 20, (channels, 18, 20)) + (800 if name == 'land' else 0) * (levels > 3900)
            np.save(root / split / name / f'{i}.npy', tile.astype(np.int16))
    return root


def test_statistics_are_those_of_each_channel(tmp_path):
    write(tmp_path)
    dataset = Arrays(Images(str(tmp_path / 'train'), ENDINGS), 13, span=(0, 10000))
    everything = torch.stack([dataset[i][0] for i in range(len(dataset))])
    mean, std = channel_statistics(dataset)
    assert mean == pytest.approx(everything.mean((0, 2, 3)).tolist(), abs=1e-5)
    assert std == pytest.approx(everything.std((0, 2, 3)).tolist(), abs=1e-4)


def test_statistics_that_are_not_chosen_are_measured(tmp_path):
    write(tmp_path)
    flags = [*RUN, '--data-dir', str(tmp_path), '--input-span', '0', '10000']
    measured, _ = train.make_datasets(train.parse_args(flags), train.Hooks())
    args, _ = train.make_datasets(train.parse_args([*flags, '--mean', '0.3']), train.Hooks())
    assert args.mean == [0.3] and args.std == measured.std and len(args.std) == 13


def test_thirteen_channels_train_and_are_evaluated_as_they_were_trained(tmp_path, capsys):
    write(tmp_path)
    flags = [*RUN, '--data-dir', str(tmp_path), '--input-span', '0', '10000', '--output', str(tmp_path / 'out')]
    assert train.main([*flags, '--experiment', 'a', '--save-images', '--log-interval', '1']) == 0
    row = json.loads((tmp_path / 'out' / 'a' / 'summary.json').read_text())[-1]
    assert row['eval_top1'] == 100
    saved = torch.load(tmp_path / 'out' / 'a' / 'last.pth.tar', weights_only=True)['args']
    assert len(saved['mean']) == len(saved['std']) == 13 and 0.0095 < saved['mean'][0] < 0.0105
    result = [
        '--results-file',
        str(tmp_path / 'r.json'),
        '--results-format',
        'json',
        '--report',
        str(tmp_path / 'report'),
    ]
    flags = ['--checkpoint', str(tmp_path / 'out' / 'a' / 'last.pth.tar'), '--workers', '0', '--device', 'cpu', *result]
    assert (
        validate.main([*flags, '--dataset', 'arrays', '--data-dir', str(tmp_path), '--input-span', '0', '10000']) == 0
    )
    found = json.loads((tmp_path / 'r.json').read_text())
    assert found['top1'] == 100 and found['loss'] == pytest.approx(row['eval_loss'], abs=1e-4)
    assert (tmp_path / 'report' / 'samples_right.png').exists()


def test_arrays_of_another_folder_are_read_as_those_that_were_trained_on(tmp_path):
    write(tmp_path / 'a', count=4)
    for split in ('train', 'val'):
        for file in (tmp_path / 'a' / split).glob('*/*.npy'):
            np.save(file, np.load(file).clip(0).astype(np.uint16))  # which a span is not asked for
    shutil.copytree(tmp_path / 'a', tmp_path / 'b')
    flags = [*RUN, '--data-dir', str(tmp_path / 'a'), '--input-span', '0', '10000', '--output', str(tmp_path / 'out')]
    assert train.main([*flags, '--experiment', 'a', '--epochs', '1']) == 0
    flags = ['--checkpoint', str(tmp_path / 'out' / 'a' / 'last.pth.tar'), '--workers', '0', '--device', 'cpu']
    rows = []
    for folder in 'ab':
        result = str(tmp_path / f'{folder}.json')
        more = ['--dataset', 'arrays', '--data-dir', str(tmp_path / folder), '--results-file', result]
        assert validate.main([*flags, *more]) == 0
        rows.append(json.loads((tmp_path / f'{folder}.json').read_text()))
    assert rows[0] == rows[1]
    assert validate.parse_args([*flags, *more, '--input-span', '0', '5']).input_span == [0, 5]


def test_measured_statistics_that_are_not_those_of_the_weights_are_told(tmp_path, capsys):
    for folder, factor in (('a', 1), ('b', 2)):
        write(tmp_path / folder, count=4)
        for file in (tmp_path / folder).glob('*/*/*.npy'):
            np.save(file, np.load(file) // factor)
    flags = [*RUN, '--input-span', '0', '10000', '--epochs', '1', '--output', str(tmp_path / 'out'), '--data-dir']
    assert train.main([*flags, str(tmp_path / 'a'), '--experiment', 'a']) == 0
    weights = ['--pretrained', '--pretrained-path', str(tmp_path / 'out' / 'a' / 'last.pth.tar')]
    for folder in 'ab':
        capsys.readouterr()
        assert train.main([*flags, str(tmp_path / folder), *weights, '--experiment', f'{folder}-again']) == 0
        assert ('are of a run with --mean 0.' in capsys.readouterr().out) == (folder == 'b')


@pytest.mark.parametrize(
    'flags, words',
    [
        ('', 'say with --input-span'),
        ('--input-span 0 10000 --in-chans 12', 'no image of 12 channels'),
        ('--input-span 0 10000 --aa rand-m9', '--aa is for grey and RGB pictures, not for arrays'),
        ('--input-span 0 10000 --color-jitter 0.3', '--color-jitter is for pictures'),
        ('--input-span 0 10000 --data-in-memory', '--data-in-memory keeps pictures'),
        ('--input-span 1 1', 'two different numbers'),
        ('--input-span 2 1', 'the smaller first'),
        ('--input-span 0 10000 --mean 0.1 0.2 --std 1', 'images'),
    ],
)
def test_what_arrays_cannot_have_is_refused_before_anything_is_written(flags, words, tmp_path, capsys):
    write(tmp_path, count=4)
    run = [*RUN, '--data-dir', str(tmp_path), '--output', str(tmp_path / 'out'), '--max-unreadable', '3']
    assert train.main([*run, *flags.split()]) in (2, 3)
    assert words in capsys.readouterr().err and not (tmp_path / 'out').exists()


def test_pictures_for_many_channels_are_refused_in_favour_of_arrays(tmp_path, capsys):
    write(tmp_path, count=4)
    assert train.main([*RUN, '--data-dir', str(tmp_path), '--dataset', '', '--output', str(tmp_path / 'out')]) == 2
    assert 'the model takes 13: --in-chans must be' in (said := capsys.readouterr().err)
    assert 'or files of more be read by --dataset arrays' in said


def test_arrays_without_labels_have_no_classes(tmp_path):
    for i in range(3):
        np.save(tmp_path / f'{i}.npy', VALUES)
    dataset = data.make_dataset(train.parse_args([*RUN, '--data-dir', str(tmp_path)]), 'train', True, 13)
    assert len(dataset) == 3 and not data.class_names(dataset) and dataset[2][0].shape == (13, 6, 8)


@pytest.mark.parametrize('training', [True, False])
def test_an_array_of_a_picture_is_prepared_as_the_picture_is(training):
    pixels = np.asarray(Image.effect_noise((40, 30), 60).resize((120, 90), Image.Resampling.BICUBIC))
    options = dict(input_size=(1, 24, 24), mean=(0.5,), std=(0.5,), interpolation='bicubic', crop_pct=0.9)
    options.update(is_training=training, no_aug=training, use_prefetcher=False)
    of_array, of_picture = (
        create_transform(**options)(image) for image in (torch.tensor(pixels)[None] / 255, Image.fromarray(pixels))
    )
    assert (of_array - of_picture).abs().max() < 0.02  # the picture is rounded to 8 bits


def test_damaged_files_are_told_once(tmp_path):
    """Not by tifffile's log as well."""
    pytest.importorskip('tifffile')
    (tmp_path / 'x.tif').write_bytes(cut(tiff(VALUES.transpose(1, 2, 0), planarconfig='contig'), 0.1).getvalue())
    program = f"""
import sys
from vim_timm.data.arrays import read_array
from vim_timm.errors import UserError, run

def main(words):
    try:
        read_array(open({str(tmp_path / 'x.tif')!r}, 'rb'), 'x.tif', 13)
    except ValueError as error:
        raise UserError(str(error))

sys.exit(run(main, 'x') != 2)
"""
    assert len(finish([Python(program, output=tmp_path / 'said')]).splitlines()) == 1
