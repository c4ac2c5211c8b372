"""Which files of a folder or tar are data, of which class, and that every route reads their pixels alike."""

import io
import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_dataset as create_timm_dataset
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.utils import natural_key as timm_natural_key
from torchvision.datasets import ImageFolder

from vim_timm import data, train, validate
from vim_timm.data.datasets import Pictures, image_mode, passed_over
from vim_timm.data.folder import EMPTY, HIDDEN, NO_CLASS, NO_FILE, UNMAPPED, Images, natural_key
from vim_timm.data.images import image_endings, read_image, to_mode
from vim_timm.data.sampling import Samples, Stream
from vim_timm.data.unreadable import Unreadable
from vim_timm.engine.predict import image_files
from vim_timm.errors import TrainingStopped, UserError
from vim_timm.settings import Process

PNG = {'.png'}
TINY = (
    '--model test_vit --img-size 16 --workers 0 --device cpu --epochs 1 --batch-size 4 --opt adamw --lr 1e-3 --no-aug'
).split()


def picture(value=128, mode='RGB', size=(8, 8)):
    return Image.new(mode, size, value if mode == 'L' else (value,) * len(mode))


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(len(name) * 7 % 256).save(path, format='PNG')
    return str(root)


def pack(folder, path):
    """The folder as a tar, with a leading `./` as `tar -C` makes it."""
    with tarfile.open(path, 'w') as tar:
        tar.add(folder, '.')
    return str(path)


def listing(reader):
    return [(file.name, label) for file, label in reader.samples]


def test_numbers_of_classes_that_tie_in_natural_order_do_not_depend_on_the_hash_seed(tmp_path):
    names = ['a', 'A', '1', '01', '001', 'b10', 'B9', 'ä', 'Ä', '²']
    touch(tmp_path, *(f'{name}/x.png' for name in names))
    program = (
        'import sys; from vim_timm.data.folder import Images;'
        f'print(list(Images({str(tmp_path)!r}, {{".png"}}).class_to_idx))'
    )
    other = {**os.environ, 'PYTHONHASHSEED': '1' if os.environ.get('PYTHONHASHSEED') != '1' else '0'}  # than here
    there = subprocess.run([sys.executable, '-c', program], env=other, capture_output=True, check=True).stdout
    order = ['001', '01', '1', 'A', 'a', 'B9', 'b10', '²', 'Ä', 'ä']
    assert list(Images(str(tmp_path), PNG).class_to_idx) == order and there == f'{order}\n'.encode()


def test_files_that_tie_in_natural_order_have_one_order(tmp_path):
    touch(tmp_path, 'a/1.png', 'a/01.png', 'a/X.png', 'a/x.png')
    assert [name for name, _ in listing(Images(str(tmp_path), PNG))] == ['a/01.png', 'a/1.png', 'a/X.png', 'a/x.png']


@given(
    st.lists(
        st.text(
            st.characters(blacklist_characters='²³¹', blacklist_categories=('Nd', 'No', 'Cs'))
            | st.sampled_from('0123456789')
        )
    )
)
def test_natural_order_is_timms(names):
    assert sorted(names, key=natural_key) == sorted(names, key=timm_natural_key)


def test_classes_and_files_are_those_of_timm_and_of_torchvision(tmp_path):
    touch(tmp_path, *(f'{name}/{i}.png' for name in ('0', '1', '10', '2', 'b', 'C') for i in (1, 10, 2)))
    theirs = ReaderImageFolder(str(tmp_path))
    ours = Images(str(tmp_path), PNG)
    assert ours.class_to_idx == theirs.class_to_idx
    assert [(os.path.join(tmp_path, name), label) for name, label in listing(ours)] == theirs.samples
    assert ours.filenames() == theirs.filenames() and ours.filename(0, absolute=True) == theirs.samples[0][0]
    outermost = Images(str(tmp_path), PNG, outermost=True)
    assert list(outermost.class_to_idx.items()) == list(ImageFolder(str(tmp_path)).class_to_idx.items())


def test_outermost_folders_are_classes_as_in_torchvision(tmp_path):
    touch(tmp_path, 'dog/2023/x.png', 'dog/2024/y.png', 'cat/2023/x.png')
    ours, theirs = Images(str(tmp_path), PNG, outermost=True), ImageFolder(str(tmp_path))
    assert ours.class_to_idx == theirs.class_to_idx == {'cat': 0, 'dog': 1}
    assert sorted(label for _, label in ours.samples) == sorted(theirs.targets)


def test_innermost_folders_of_one_name_are_not_merged_in_silence(tmp_path):
    root = touch(tmp_path, 'dog/2023/x.png', 'cat/2023/x.png')
    with pytest.raises(UserError, match='cat/2023 and dog/2023 would be one class, 2023'):
        Images(root, PNG)
    assert len(Images(root, PNG, class_map={'2023': 0})) == 2


@pytest.mark.parametrize('kind', ['folder', 'tar'])
def test_what_is_no_data_is_passed_over_with_its_reason(tmp_path, kind):
    root = tmp_path / 'data'
    touch(root, 'cat/1.png', 'cat/._1.png', 'cat/.DS_Store', '.ipynb_checkpoints/2.png', '__MACOSX/cat/._1.png')
    touch(root, 'dog/1.png', 'dog/2.PNG', 'cow/1.heic', 'loose.png', 'dog/readme', 'labels.csv')
    if kind == 'folder':
        (root / 'nothing').mkdir()
        if hasattr(os, 'mkfifo'):
            os.mkfifo(root / 'dog' / 'pipe.png')  # to open it would wait for ever
        os.symlink('..', root / 'dog' / 'up')  # a folder in itself
        os.symlink('nowhere', root / 'dog' / 'gone.png')  # a file that cannot be read, and is named when it is
    reader = Images(str(root) if kind == 'folder' else pack(root, tmp_path / 'data.tar'), PNG)
    assert reader.class_to_idx == {'cat': 0, 'dog': 1}
    gone = [('dog/gone.png', 1)] if kind == 'folder' else []
    assert listing(reader) == [('cat/1.png', 0), ('dog/1.png', 1), ('dog/2.PNG', 1), *gone]
    found = {why: sorted(names) for why, names in reader.passed_over.items()}
    assert found.pop(HIDDEN)[:2] == ['.ipynb_checkpoints', '__MACOSX'][: 2 if kind == 'folder' else 0] or kind == 'tar'
    assert found.pop(EMPTY) == (['cow', 'nothing'] if kind == 'folder' else ['cow'])
    assert found.pop(NO_FILE, ['dog/pipe.png']) == ['dog/pipe.png']
    assert found == {
        NO_CLASS: ['loose.png'], 'with the ending .heic': ['cow/1.heic'], 'without an ending': ['dog/readme'],
        'with the ending .csv': ['labels.csv'],
    }  # fmt: skip
    assert 'cow/1.heic' in passed_over(reader) and 'hidden' in passed_over(reader)


def test_a_class_map_numbers_and_names_what_it_leaves_out(tmp_path):
    root = touch(tmp_path, 'cat/1.png', 'dog/1.png', 'cow/1.png')
    reader = Images(root, PNG, class_map={'dog': 0, 'cat': 1})
    assert listing(reader) == [('cat/1.png', 1), ('dog/1.png', 0)]
    assert reader.passed_over == {UNMAPPED: ['cow/1.png']}


def test_a_folder_without_class_folders_has_no_classes(tmp_path):
    reader = Images(touch(tmp_path, '1.png', '2.png'), PNG)
    assert listing(reader) == [('1.png', 0), ('2.png', 0)] and not data.class_names(Pictures(reader, 'RGB'))


def test_a_tar_in_a_tar_is_a_folder_and_is_read_where_it_lies(tmp_path):
    touch(tmp_path / 'in', 'a.png', 'b.png')
    (tmp_path / 'out' / 'dog').mkdir(parents=True)
    pack(tmp_path / 'in', tmp_path / 'out' / 'cat.tar')
    touch(tmp_path / 'out', 'dog/c.png')
    reader = Images(pack(tmp_path / 'out', tmp_path / 'all.tar'), PNG)
    assert listing(reader) == [('cat/a.png', 0), ('cat/b.png', 0), ('dog/c.png', 1)]
    for place, path in enumerate(('in/a.png', 'in/b.png', 'out/dog/c.png')):
        assert reader[place][0].read() == (tmp_path / path).read_bytes()


def test_of_one_name_in_a_tar_the_last_file_counts(tmp_path):
    """As where it is unpacked; `tar -r` and `tar -u` leave what they replace in the file."""
    touch(tmp_path / 'old', 'cat/a.png', 'cat/b.png')
    with tarfile.open(tmp_path / 'x.tar', 'w') as tar:
        tar.add(tmp_path / 'old', '.')
    picture(200).save(tmp_path / 'new.png')
    with tarfile.open(tmp_path / 'x.tar', 'a') as tar:
        tar.add(tmp_path / 'new.png', 'cat/a.png')
    reader = Images(str(tmp_path / 'x.tar'), PNG)
    assert listing(reader) == [('cat/a.png', 0), ('cat/b.png', 0)]
    assert reader[0][0].read() == (tmp_path / 'new.png').read_bytes()


def test_a_damaged_tar_ends_in_a_sentence(tmp_path):
    path = tmp_path / 'x.tar'
    path.write_bytes(b'no tar at all' * 100)
    with pytest.raises(UserError, match='x.tar is damaged or no tar'):
        Images(str(path), PNG)


def arguments(folder, *flags):
    return train.parse_args([*TINY, '--data-dir', str(folder), *flags])


@pytest.mark.parametrize('names', [('train', 'validation'), ('training', 'val'), ('Train', 'Valid')])
@pytest.mark.parametrize('kind', ['folder', 'tar'])
def test_splits_are_found_under_every_name_that_timm_knows(tmp_path, names, kind):
    root = touch(tmp_path / 'data', f'{names[0]}/cat/1.png', f'{names[1]}/cat/2.png')
    root = root if kind == 'folder' else pack(root, tmp_path / 'data.tar')
    found = [data.make_dataset(arguments(root), split, split == 'train', 3) for split in ('train', 'validation')]
    assert [dataset.filenames(basename=True) for dataset in found] == [['1.png'], ['2.png']]
    if kind == 'folder' and names[0] != 'Train':
        assert create_timm_dataset('', root=root, split='validation').filenames() == found[1].filenames()


@pytest.mark.parametrize(
    'split, words',
    [('tset', 'no folder tset'), ('train[:10%]', 'part of a split'), ('test', 'no folder test|none for')],
)
def test_a_split_that_is_not_there_is_refused(tmp_path, split, words):
    root = touch(tmp_path, 'train/cat/1.png') if split == 'test' else touch(tmp_path, 'cat/1.png')
    with pytest.raises(UserError, match=words):
        data.make_dataset(arguments(root), split, False, 3)


def test_every_ending_that_pillow_decodes_is_read(tmp_path):
    formats = {'png': 'PNG', 'JPEG': 'JPEG', 'webp': 'WEBP', 'bmp': 'BMP', 'tif': 'TIFF', 'gif': 'GIF', 'ppm': 'PPM'}
    for ending, form in formats.items():
        (tmp_path / ending).mkdir()
        picture(200).save(tmp_path / ending / f'x.{ending}', format=form)
    reader = Images(str(tmp_path), image_endings())
    assert len(reader.class_to_idx) == len(formats) and not reader.passed_over
    for place in range(len(reader)):
        assert abs(np.asarray(Pictures(reader, 'RGB')[place][0]).astype(int) - 200).max() <= 2
    assert not image_endings() & {'.eps', '.ps', '.h5', '.mpg', '.pdf', '.txt'}


def test_photographs_of_a_phone_are_read_where_their_decoder_is_installed(tmp_path):
    pytest.importorskip('pillow_heif')
    (tmp_path / 'cat').mkdir()
    picture(90, size=(64, 64)).save(tmp_path / 'cat' / 'IMG_1.HEIC', format='HEIF')
    dataset = Pictures(Images(str(tmp_path), image_endings()), 'RGB')
    assert abs(np.asarray(dataset[0][0]).astype(int) - 90).max() <= 4


def test_photographs_of_a_phone_name_their_decoder_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, 'ID', [kind for kind in Image.ID if kind != 'HEIF'])
    monkeypatch.setattr(Image, 'OPEN', {kind: opens for kind, opens in Image.OPEN.items() if kind != 'HEIF'})
    (tmp_path / 'IMG_1.HEIC').write_bytes(b'\0\0\0\x18ftypheic' + bytes(40))
    (path,) = image_files([str(tmp_path)])  # named, not passed over in silence
    with open(path, 'rb') as file, pytest.raises(ValueError, match='pip install pillow-heif'):
        read_image(file, 'RGB')
    with pytest.raises(ValueError, match='no image'):
        read_image(io.BytesIO(b'\0\0\0\x18ftypmp42' + bytes(40)), 'RGB')


def saved(array, form, **options):
    file = io.BytesIO()
    Image.fromarray(array).save(file, form, **options)
    file.seek(0)
    return file


@pytest.mark.parametrize('form', ['PNG', 'TIFF', 'PPM', 'JPEG2000'])
@pytest.mark.parametrize('mode', ['L', 'RGB', 'RGBA'])
def test_grey_values_of_16_bits_are_scaled_not_clipped(form, mode):
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    options = {'irreversible': False} if form == 'JPEG2000' else {}
    found = np.asarray(read_image(saved(values, form, **options), mode)).reshape(8, 8, -1)[..., 0]
    assert np.abs(found - values / 257).max() <= 0.51


def test_grey_values_of_12_bits_fill_the_range():
    """A TIFF of one row: 0, 4095, 2048, 1024, in 12 bits each."""
    entries = [(256, 3, 1, 4), (257, 3, 1, 1), (258, 3, 1, 12), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8),
               (277, 3, 1, 1), (278, 3, 1, 1), (279, 4, 1, 6)]  # fmt: skip
    bits = ''.join(f'{value:012b}' for value in (0, 4095, 2048, 1024))
    pixels = int(bits, 2).to_bytes(6, 'big') + b'\0\0'
    directory = len(entries).to_bytes(2, 'little') + b''.join(
        b''.join(number.to_bytes(size, 'little') for number, size in zip(entry, (2, 2, 4, 4))) for entry in entries
    )
    file = io.BytesIO(b'II*\0' + (16).to_bytes(4, 'little') + pixels + directory + bytes(4))
    assert np.asarray(read_image(file, 'L')).tolist() == [[0, 255, 128, 64]]


@pytest.mark.parametrize('kind', [np.int32, np.float32])
def test_pixels_of_32_bits_are_unreadable_with_the_reason(kind):
    with pytest.raises(ValueError, match='numbers of 32 bits'):
        read_image(saved(np.full((4, 4), 70000, kind), 'TIFF'), 'L')


def test_orientation_in_exif_is_not_applied_as_in_timm(tmp_path):
    image, exif = Image.new('RGB', (8, 4)), Image.Exif()
    exif[0x0112] = 6
    touch(tmp_path, 'cat/x.png')
    image.save(tmp_path / 'cat' / 'x.jpg', exif=exif)
    ours = Pictures(Images(str(tmp_path), {'.jpg'}), 'RGB')[0][0]
    assert ours.size == create_timm_dataset('', root=str(tmp_path), split='')[0][0].size == (8, 4)


@pytest.mark.parametrize(
    'flags, channels, mode',
    [('', 1, 'L'), ('', 2, 'LA'), ('', 3, 'RGB'), ('', 4, 'RGBA'), ('--input-img-mode CMYK', 4, 'CMYK'),
     ('', 5, None), ('--input-img-mode L', 3, None), ('--input-img-mode RGBA', 3, None)],
)  # fmt: skip
def test_channels_have_a_mode_or_are_refused(flags, channels, mode, tmp_path):
    args = arguments(tmp_path, *flags.split())
    if mode:
        assert image_mode(args, channels) == mode
    else:
        with pytest.raises(UserError, match=f'takes {channels}'):
            image_mode(args, channels)


@pytest.mark.parametrize('channels', [2, 4])
@pytest.mark.parametrize('route', ['disk', 'memory'])
def test_two_and_four_channels_train(channels, route, tmp_path):
    for name, value in (('a', 40), ('b', 200)):
        for i in range(4):
            path = tmp_path / 'data' / name / f'{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(value, 'RGBA').save(path)
    for split in ('train', 'val'):
        os.symlink(tmp_path / 'data', tmp_path / split)
    flags = [*TINY, '--data-dir', str(tmp_path), '--in-chans', str(channels), '--output', str(tmp_path / 'out')]
    flags += ['--save-images', '--log-interval', '1', '--experiment', 'a', '--mean', '0.5', '--std', '0.5']
    assert train.main([*flags, *(['--data-in-memory'] if route == 'memory' else [])]) == 0
    weight = torch.load(tmp_path / 'out' / 'a' / 'last.pth.tar', weights_only=True)['state_dict'][
        'patch_embed.proj.weight'
    ]
    assert weight.shape[1] == channels


def test_policies_for_grey_and_rgb_are_refused_for_other_channels(tmp_path, capsys):
    touch(tmp_path, 'train/a/1.png', 'val/a/1.png')
    flags = [*TINY[:-1], '--data-dir', str(tmp_path), '--in-chans', '4', '--output', str(tmp_path / 'out')]
    assert train.main([*flags, '--batch-size', '1', '--aa', 'rand-m9']) == 2
    assert '--aa is for grey and RGB pictures' in capsys.readouterr().err and not (tmp_path / 'out').exists()


class Broken(torch.utils.data.Dataset):
    """Eight images, of which those at these places cannot be read."""

    def __init__(self, places, name):
        self.places, self.name = places, name

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index in self.places:
            raise OSError('the disk has a scratch')
        return picture(), 0

    def filename(self, index, absolute=False):
        return f'{self.name}{index}.png'


def fetch(samples, epochs=3):
    for epoch in range(epochs):
        for index in range(len(samples)):
            samples[epoch, index, index]


@pytest.mark.parametrize('workers', [0, 2])
def test_a_limit_on_unreadable_images_counts_distinct_ones(workers, capfd):
    """Over epochs, stand-ins, processes and both splits."""
    unreadable = Unreadable(4, workers)
    splits = [
        Samples(Broken({1, 2}, 'x'), lambda image: 0, 'RGB', 0, training, unreadable, 0) for training in (True, False)
    ]
    for samples in splits:
        if workers:
            keys = [[(0, index, index)] for index in range(8)]
            for _ in range(2):
                list(torch.utils.data.DataLoader(samples, batch_sampler=keys, num_workers=workers))
        else:
            fetch(samples)
    lines = [line for line in capfd.readouterr().out.splitlines() if 'skipped (the disk has a scratch)' in line]
    assert len(lines) == len(set(lines)) == 4  # two of each split
    with pytest.raises(TrainingStopped, match='5 unreadable images, .*--max-unreadable 4.*the disk has a scratch'):
        fetch(Samples(Broken({5}, 'x'), lambda image: 0, 'RGB', 0, True, unreadable, 0))


def test_one_file_in_both_splits_counts_once(tmp_path, capsys):
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a' / 'x.png').write_bytes(b'nothing')
    touch(tmp_path, 'a/y.png')
    unreadable = Unreadable(1)
    for training in (True, False):
        dataset = Pictures(Images(str(tmp_path), PNG), 'RGB')
        fetch(Samples(dataset, lambda image: 0, '', 0, training, unreadable, 0))
    assert capsys.readouterr().out.count('unreadable image') == 1


def test_file_names_that_are_no_utf8_go_through(tmp_path, capsys):
    for split in ('train', 'val'):
        touch(tmp_path / split, 'a/0.png', 'a/1.png', 'b/0.png', 'b/1.png')
    try:
        os.rename(tmp_path / 'val' / 'a' / '0.png', os.fsencode(tmp_path / 'val' / 'a') + b'/caf\xe9.png')
        os.rename(tmp_path / 'val' / 'b' / '0.png', os.fsencode(tmp_path / 'val' / 'b') + b'/\xff.png')
    except OSError:
        pytest.skip('the file system takes Unicode only')
    (tmp_path / 'val' / 'b' / os.fsdecode(b'\xff.png')).write_bytes(b'broken')
    run = [*TINY, '--data-dir', str(tmp_path), '--output', str(tmp_path / 'out'), '--experiment', 'x']
    assert train.main(run) == 0
    report = ['--data-dir', str(tmp_path), '--workers', '0', '--device', 'cpu', '--report', str(tmp_path / 'report')]
    assert validate.main(['--checkpoint', str(tmp_path / 'out' / 'x' / 'last.pth.tar'), *report]) == 0
    assert 'a/caf\\udce9.png' in (tmp_path / 'report' / 'predictions.csv').read_text(encoding='utf-8')
    assert 'b/\\udcff.png, skipped' in capsys.readouterr().out


@settings(max_examples=25, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(['PNG', 'JPEG', 'GIF', 'TIFF', 'WEBP', 'BMP']), st.integers(0, 400))
def test_damaged_files_are_read_or_unreadable_and_nothing_else(noise, form, place):
    content = bytearray(saved(np.full((8, 8, 3), 77, np.uint8), form).getvalue())
    content[place : place + len(noise)] = noise
    try:
        image = read_image(io.BytesIO(bytes(content)), 'RGB')
    except ValueError as error:
        assert str(error) and '0x' not in str(error)
    else:
        assert image.mode == 'RGB' and to_mode(image, 'L').mode == 'L'


def test_unreadable_samples_of_a_web_data_set_are_named_and_counted_once(tmp_path, capsys):
    webdataset = pytest.importorskip('webdataset')
    with webdataset.TarWriter(str(tmp_path / 'a-000.tar')) as tar:
        for i, content in enumerate((saved(np.full((8, 8), 46000, np.uint16), 'PNG').read(), b'broken', b'broken')):
            tar.write({'__key__': str(i), 'png': content, 'cls': '0'})
    args = arguments(tmp_path, '--dataset', 'wds/a', '--num-classes', '2')
    dataset = data.make_dataset(args, 'a-{000..001}.tar', False, 1)
    unreadable = Unreadable(3)
    dataset.transform = lambda image: np.asarray(to_mode(image, dataset.image_mode))
    for _ in range(2):
        (image, *_), *others = Stream(dataset, 0, 0, unreadable)
        assert image.max() == round(46000 / 257) and not others
    lines = capsys.readouterr().out.splitlines()
    shard = tmp_path / 'a-000.tar'
    assert [line.split(',')[0] for line in lines] == [
        f'unreadable image 1 of {shard}', f'unreadable image 2 of {shard}', f'unreadable image {tmp_path}/a-001.tar',
    ]  # fmt: skip
    with pytest.raises(TrainingStopped, match='3 unreadable images'):
        list(Stream(dataset, 0, 0, Unreadable(2)))


@pytest.mark.parametrize('workers', [0, 1])
def test_an_epoch_of_a_web_data_set_depends_on_its_number_alone(workers, tmp_path):
    webdataset = pytest.importorskip('webdataset')
    with webdataset.TarWriter(str(tmp_path / 'a-000.tar')) as tar:
        for i in range(20):
            content = saved(np.full((8, 8), i, np.uint8), 'PNG').read()
            tar.write({'__key__': str(i), 'png': content, 'cls': str(i)})
    flags = ['--dataset', 'wds/a', '--num-classes', '20', '--train-num-samples', '20', '--no-aug']
    args = arguments(tmp_path, *flags).replace(workers=workers, batch_size=5)
    config = dict(input_size=(1, 8, 8), mean=(0.5,), std=(0.5,), interpolation='bilinear', crop_pct=1.0)
    epochs = []
    for before in ([], [0, 1]):
        loader = data.train_loader(args, Process(), data.make_dataset(args, 'a-000.tar', True, 1), config)
        for epoch in before:
            list(loader.epoch(epoch))
        epochs += [torch.cat([batch.targets for batch in loader.epoch(epoch)]).tolist() for epoch in (2, 3)]
    assert epochs[0] == epochs[2] != epochs[1] == epochs[3]


def test_a_process_that_reads_shards_has_one_and_a_rank_too(tmp_path):
    """A process without a shard would end the epoch early, a rank without one would be waited for."""
    webdataset = pytest.importorskip('webdataset')
    content = io.BytesIO()
    picture().save(content, format='PNG')
    for shard in range(3):
        with webdataset.TarWriter(str(tmp_path / f'a-{shard:03}.tar')) as tar:
            for i in range(20):
                tar.write({'__key__': f'{shard}-{i}', 'png': content.getvalue(), 'cls': '0'})
    flags = ['--dataset', 'wds/a', '--num-classes', '1', '--train-num-samples', '60']
    args = arguments(tmp_path, *flags).replace(workers=4, batch_size=8)
    dataset = data.make_dataset(args, 'a-{000..002}.tar', True, 3)
    config = dict(input_size=(3, 16, 16), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation='bilinear', crop_pct=1.0)
    with pytest.raises(UserError, match='3 shards are too few for 4 ranks'):
        data.train_loader(args, Process(world_size=4), dataset, config)
    loader = data.train_loader(args, Process(), dataset, config)
    assert loader.workers == 3 and sum(1 for _ in loader.epoch(0)) == len(loader) == 9
    (tmp_path / 'map.txt').write_text('cow\n')
    args = args.replace(class_map=str(tmp_path / 'map.txt'), workers=0)
    loader = data.train_loader(args, Process(), data.make_dataset(args, 'a-{000..002}.tar', True, 3), config)
    with pytest.raises(UserError, match='--class-map does not list 0, a label of the data'):
        next(iter(loader.epoch(0)))
