"""A class is known by its name: in training, in evaluation, in a checkpoint, and by the original's command line."""

import json
import os
import pickle
import shlex
import tarfile

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import ImageNetInfo
from timm.task import ClassificationTask
from torch.utils.data import IterableDataset

from vim_timm import original, train, validate
from vim_timm.data import class_names, make_dataset, renumbered
from vim_timm.data.classes import read_class_map, read_valid_labels
from vim_timm.engine import Hooks
from vim_timm.engine.build import label_names
from vim_timm.errors import UserError
from vim_timm.hub import publish

RUN = (
    '--model test_vit --img-size 16 --in-chans 1 --workers 0 --device cpu --batch-size 8 --epochs 4 --no-aug '
    '--opt adamw --lr 3e-3 --warmup-epochs 0 --smoothing 0'
).split()
GREY = {'ant': 20, 'bee': 120, 'cow': 220}


def write(root, classes, count=8):
    """Images of one grey value a class, so that a model learns them at once."""
    for name in classes:
        for i in range(count):
            path = root / name / f'{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((16, 16), GREY[name] + i, np.uint8)).save(path)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A run on ant, bee and cow, whose validation lacks bee."""
    root = tmp_path_factory.mktemp('classes')
    write(root / 'data' / 'train', ['ant', 'bee', 'cow'])
    write(root / 'data' / 'val', ['ant', 'cow'], 4)
    flags = [*RUN, '--data-dir', str(root / 'data'), '--output', str(root), '--experiment', 'a']
    assert train.main(flags) == 0
    return root


def evaluate(trained, folder, *flags):
    result = trained / 'result.json'
    flags = [*flags, '--checkpoint', str(trained / 'a' / 'last.pth.tar'), '--data-dir', str(folder), '--workers', '0']
    status = validate.main([*flags, '--device', 'cpu', '--results-file', str(result), '--results-format', 'json'])
    return json.loads(result.read_text()) if status == 0 else status


def test_a_split_that_lacks_classes_is_scored_by_name(trained):
    row = json.loads((trained / 'a' / 'summary.json').read_text())[-1]
    assert row['eval_top1'] == 100  # by place, every cow would be a bee


def test_a_checkpoint_names_its_classes_and_an_evaluation_goes_by_them(trained, tmp_path, capsys):
    saved = torch.load(trained / 'a' / 'last.pth.tar', weights_only=True)
    assert saved['class_names'] == ['ant', 'bee', 'cow']
    write(tmp_path / 'validation', ['cow'])
    assert evaluate(trained, tmp_path, '--report', str(tmp_path / 'report'))['top1'] == 100
    lines = (tmp_path / 'report' / 'predictions.csv').read_text().splitlines()
    assert all(',cow,cow,' in line for line in lines[1:]) and len(lines) == 9
    assert [row['class'] for row in json.loads((tmp_path / 'report' / 'report.json').read_text())['per_class']] == [
        'ant', 'bee', 'cow',
    ]  # fmt: skip


@pytest.mark.parametrize('kind', ['folder', 'class folder', 'tar', 'class map'])
def test_images_in_no_class_folders_are_scored_as_none(kind, trained, tmp_path, capsys):
    """All of them would be of class 0: a validation split that was unpacked into one folder, say."""
    write(tmp_path / 'data', ['cow'])
    folder, more = tmp_path / 'data', []
    if kind == 'class folder':
        folder = folder / 'cow'
    else:
        os.rename(folder / 'cow', folder / 'validation')
    if kind == 'tar':
        folder = tmp_path / 'data.tar'
        with tarfile.open(folder, 'w') as tar:
            tar.add(tmp_path / 'data' / 'validation', 'validation')
    if kind == 'class map':
        more = ['--class-map', str(tmp_path / 'map.txt')]
        (tmp_path / 'map.txt').write_text('ant\nbee\ncow\n')
    assert evaluate(trained, folder, *more) == 2
    assert 'has no class folders, so nothing says' in capsys.readouterr().err


def test_training_wants_class_folders_in_both_splits(tmp_path, capsys):
    write(tmp_path / 'data' / 'train', ['ant', 'cow'])
    write(tmp_path / 'data', ['bee'])
    os.rename(tmp_path / 'data' / 'bee', tmp_path / 'data' / 'validation')
    for folder in ('data', 'data/validation'):
        assert train.main([*RUN, '--data-dir', str(tmp_path / folder), '--output', str(tmp_path / 'out')]) == 2
        assert 'data/validation has no class folders, so nothing says' in capsys.readouterr().err


def test_a_class_that_training_does_not_know_is_refused(trained, tmp_path, capsys):
    GREY['Ant'] = GREY['ant']
    write(tmp_path / 'data' / 'train', ['ant', 'bee'])
    write(tmp_path / 'data' / 'validation', ['Ant', 'bee'])
    assert evaluate(trained, tmp_path / 'data') == 2
    assert "the class 'Ant'" in capsys.readouterr().err
    assert train.main([*RUN, '--data-dir', str(tmp_path / 'data'), '--output', str(tmp_path / 'out')]) == 2
    assert "split 'validation' has the class 'Ant'" in capsys.readouterr().err and not (tmp_path / 'out').exists()


def test_a_class_map_of_the_user_says_the_numbers(trained, tmp_path):
    GREY['Kuh'] = GREY['cow']
    write(tmp_path / 'validation', ['Kuh'])
    (tmp_path / 'map.txt').write_text('Ameise\nBiene\nKuh\n')
    assert evaluate(trained, tmp_path, '--class-map', str(tmp_path / 'map.txt'))['top1'] == 100


def test_valid_labels_name_the_classes_that_the_checkpoint_names(trained, tmp_path, capsys):
    write(tmp_path / 'validation', ['cow', 'ant'])
    (tmp_path / 'labels').write_text('2\n0\n')
    flags = ['--valid-labels', str(tmp_path / 'labels'), '--report', str(tmp_path / 'report')]
    assert evaluate(trained, tmp_path, *flags)['top1'] == 100
    assert (tmp_path / 'report' / 'per_class.csv').read_text().splitlines()[1].startswith('0,cow,')
    (tmp_path / 'labels').write_text('0\n3\n')
    assert evaluate(trained, tmp_path, *flags) == 2
    assert 'the model has classes 0 to 2' in capsys.readouterr().err


def test_a_run_does_not_go_on_with_other_classes(trained, tmp_path, capsys):
    write(tmp_path / 'train', ['ant', 'cow', 'bee'])
    os.rename(tmp_path / 'train' / 'bee', tmp_path / 'train' / 'zebra')
    write(tmp_path / 'val', ['ant'])
    flags = [*RUN, '--epochs', '6', '--resume', str(trained / 'a' / 'last.pth.tar')]
    assert train.main([*flags, '--data-dir', str(tmp_path), '--output', str(tmp_path / 'out')]) == 2
    assert "number 1 is 'bee' there and 'cow' in this data" in capsys.readouterr().err
    assert train.main([*flags, '--data-dir', str(trained / 'data'), '--output', str(tmp_path / 'out')]) == 0


@pytest.mark.parametrize('labels, message', [
    ('0\n1\n', 'names 2 classes, and split \'validation\' of the data has 3'),
    ('0\n1\n2\n5\n', 'names 4 classes'), ('0\n1\n1\n', 'the class 1 is in it 2 times'), ('\n', 'it names no class'),
])  # fmt: skip
def test_valid_labels_name_each_class_of_the_data_once(labels, message, tmp_path, capsys):
    save_file(timm.create_model('test_vit', num_classes=9, img_size=16).state_dict(), tmp_path / 'w.safetensors')
    (tmp_path / 'labels').write_text(labels)
    write(tmp_path / 'data' / 'val', ['ant', 'bee', 'cow'])
    flags = (
        f'--data-dir {tmp_path}/data --model test_vit --img-size 16 --num-classes 9 --device cpu --workers 0'.split()
    )
    files = ['--checkpoint', str(tmp_path / 'w.safetensors'), '--valid-labels', str(tmp_path / 'labels')]
    assert validate.main([*flags, *files]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1


def test_class_names_that_are_none_are_refused(trained, tmp_path, capsys):
    content = torch.load(trained / 'a' / 'last.pth.tar', weights_only=True)
    for names in ('ant', [1, 2, 3], {'a': 1}):
        torch.save({**content, 'class_names': names}, tmp_path / 'x.pth.tar')
        flags = ['--checkpoint', str(tmp_path / 'x.pth.tar'), '--data-dir', str(trained / 'data'), '--workers', '0']
        assert validate.main([*flags, '--device', 'cpu']) == 2
        assert 'its class names are no list of names' in capsys.readouterr().err


class Named:
    def __init__(self, classes):
        self.classes = classes

    def __len__(self):
        return len(self.classes)

    def __getitem__(self, index):
        return None, index


class Grey:
    """Grey images whose class numbers begin with `first`."""

    def __init__(self, first):
        self.first = first

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return Image.new('L', (16, 16), 20 * index), self.first + index % 3


@pytest.mark.parametrize('first, number', [(1, 3), (-1, -1)])
@pytest.mark.parametrize('more', ['', '--workers 1', '--data-in-memory', '--mixup 0.5'])
def test_class_numbers_that_the_model_has_not_are_named(first, number, more, tmp_path, monkeypatch, capsys):
    hooks = Hooks(dataset=lambda split, training, args: Grey(first))
    monkeypatch.setattr(train, 'train', lambda args, real=train.train: real(args, hooks))
    line = [*RUN, '--data-dir', str(tmp_path), '--num-classes', '3', '--output', str(tmp_path), *more.split()]
    assert train.main(line) == 3
    error = capsys.readouterr().err
    assert f'of the data has the class number {number}, and the model has classes 0 to 2' in error
    assert error.count('\n') == 1


def test_a_stand_in_is_not_taken_for_the_image_with_a_foreign_class_number(tmp_path, capsys):
    class Broken(Grey):
        def __getitem__(self, index):
            if index == 3:
                raise OSError('cut off')
            image, target = super().__getitem__(index)
            return image, 7 if index == 4 else target

    hooks = Hooks(dataset=lambda split, training, args: Grey(0) if training else Broken(0))
    line = [*RUN, '--epochs', '1', '--data-dir', str(tmp_path), '--num-classes', '3', '--output', str(tmp_path)]
    with pytest.raises(UserError, match='^image 4 of the data has the class number 7,'):
        train.train(train.parse_args(line), hooks)
    assert 'unreadable image 3 of the evaluation split' in capsys.readouterr().out


def test_a_task_of_ones_own_takes_any_targets(tmp_path):
    class Sum(ClassificationTask):
        def forward(self, input, target):
            output = self.trainable_module(input)
            return {'loss': (output.sum(1) - target).square().mean(), 'output': output}

    hooks = Hooks(
        dataset=lambda split, training, args: Grey(40 if training else 0),
        task=lambda model, args: Sum(model, device=torch.device('cpu'), verbose=False),
    )
    line = [*RUN, '--epochs', '1', '--data-dir', str(tmp_path), '--num-classes', '3', '--output', str(tmp_path)]
    assert train.train(train.parse_args(line), hooks).rows


def test_a_loss_of_ones_own_may_pass_over_targets(tmp_path):
    hooks = Hooks(
        dataset=lambda split, training, args: Grey(-1 if training else 0),
        loss=torch.nn.CrossEntropyLoss(ignore_index=-1),
    )
    line = [*RUN, '--epochs', '1', '--data-dir', str(tmp_path), '--num-classes', '3', '--output', str(tmp_path)]
    assert train.train(train.parse_args(line), hooks).rows


def test_renumbering_goes_by_name():
    same = Named(['a', 'b'])
    assert renumbered(same, ['a', 'b'], 'x', 'y') is same and renumbered(same, [], 'x', 'y') is same
    moved = renumbered(Named(['c', 'a']), ['a', 'b', 'c'], 'x', 'y')
    assert [moved[i][1] for i in range(2)] == [2, 0] and class_names(moved) == ['a', 'b', 'c']
    assert [pickle.loads(pickle.dumps(moved))[i][1] for i in range(2)] == [2, 0]
    with pytest.raises(UserError, match='x has other classes'):
        renumbered(Named(['a', 'a']), ['a', 'b'], 'x', 'y')


def test_a_stream_is_renumbered_too():
    class Stream(IterableDataset):
        classes, target_transform = ['b', 'a'], None

        def __iter__(self):
            yield from ((None, self.target_transform(label)) for label in (0, 1, -1))

    assert [label for _, label in renumbered(Stream(), ['a', 'b'], 'x', 'y')] == [1, 0, -1]


@pytest.mark.parametrize(
    'content, words', [('a\nb\na\n', "'a' is in it 2 times"), ('\n', 'names no class'), (b'\xff\xfe', 'decode')]
)
def test_class_maps_that_cannot_be_meant(content, words, tmp_path):
    path = tmp_path / 'map.txt'
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=words):
        read_class_map(str(path), None)


def test_class_maps(tmp_path):
    for start in ('', '\ufeff'):  # the mark that editors of Windows begin a file with
        (tmp_path / 'map.txt').write_text(f'{start}b\na\n\n', encoding='utf-8')
        assert read_class_map('map.txt', str(tmp_path)) == {'b': 0, 'a': 1}
        (tmp_path / 'labels.txt').write_text(f'{start}7\n3\n', encoding='utf-8')
        assert read_valid_labels(str(tmp_path / 'labels.txt')) == [7, 3]
    (tmp_path / 'map.pkl').write_bytes(pickle.dumps({'a': 1, 'A': 1, 'b': 0}))
    mapping = read_class_map('map.pkl', str(tmp_path))
    assert mapping == {'a': 1, 'A': 1, 'b': 0}
    (tmp_path / 'bad.pkl').write_bytes(pickle.dumps({'a': -1}))
    with pytest.raises(UserError, match='whole numbers'):
        read_class_map('bad.pkl', str(tmp_path))


def test_the_original_numbers_classes_as_torchvision_does(tmp_path, capsys):
    names = [str(i) for i in range(12)] + ['a', 'B']
    for split in ('train', 'val'):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            Image.new('RGB', (8, 8)).save(tmp_path / split / name / 'x.png')
        (tmp_path / split / '.ipynb_checkpoints').mkdir()
    assert original.main(['--dry-run', '--data-path', str(tmp_path), '--model', 'vim_tiny_patch16_224']) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith('python'))
    args = train.parse_args(shlex.split(line)[3:])
    for split, training in ((args.train_split, True), (args.val_split, False)):
        assert class_names(make_dataset(args, split, training, 3)) == sorted(names)
    assert args.num_classes == len(names)


def test_weights_keep_their_place_in_timm(trained):
    model = timm.create_model('test_vit', in_chans=1, img_size=16, num_classes=3)
    timm.models.load_checkpoint(model, str(trained / 'a' / 'last.pth.tar'))


def test_a_class_map_in_another_order_changes_no_number_of_a_known_name(trained, tmp_path, capsys):
    write(tmp_path / 'validation', ['ant', 'cow'], 4)
    (tmp_path / 'map.txt').write_text('cow\nbee\nant\n')
    assert evaluate(trained, tmp_path, '--class-map', str(tmp_path / 'map.txt'))['top1'] == 100
    (tmp_path / 'map.txt').write_text('cow\nbee\nant\nzebra\n')
    assert evaluate(trained, tmp_path, '--class-map', str(tmp_path / 'map.txt')) == 2
    assert "gives the class 'cow' the number 0, and in" in capsys.readouterr().err


@pytest.fixture(scope='module')
def published(trained, tmp_path_factory):
    """The trained model, as published."""
    folder = tmp_path_factory.mktemp('published') / 'animals'
    checkpoint = str(trained / 'a' / 'last.pth.tar')
    assert publish.main([checkpoint, '--output', str(folder), '--dry-run', '--no-evaluate']) == 0
    return folder


@pytest.fixture(scope='module')
def imagenet(tmp_path_factory):
    """Weights with ImageNet's classes that see a goldfish everywhere."""
    folder = tmp_path_factory.mktemp('imagenet')
    model = timm.create_model('test_vit', img_size=16)
    for value in model.head.parameters():
        torch.nn.init.zeros_(value)
    model.head.bias.data[ImageNetInfo().label_names().index('n01443537')] = 9
    timm.models.save_for_hf(model, str(folder), safe_serialization=True)
    return folder


class TestPublished:
    """Published weights keep their head, and their names say which class is which."""

    def evaluate(self, model, root, *flags):
        result = root / 'result.json'
        line = f'--model local-dir:{model} --pretrained --data-dir {root} --img-size 16 --workers 0 --device cpu'
        flags = [*flags, '--results-file', str(result), '--results-format', 'json']
        return json.loads(result.read_text()) if validate.main([*line.split(), *flags]) == 0 else 2

    def test_classes_go_by_name(self, published, tmp_path, capsys):
        write(tmp_path / 'validation', ['cow', 'bee'])
        assert self.evaluate(published, tmp_path)['top1'] == 100
        GREY['Kuh'] = GREY['cow']
        write(tmp_path / 'validation', ['Kuh'])
        assert self.evaluate(published, tmp_path) == 2
        assert "has the class 'Kuh'" in capsys.readouterr().err

    def test_other_names_are_refused_though_there_are_as_many(self, published, tmp_path, capsys):
        GREY.update(dict(x=20, y=120, z=220))
        write(tmp_path / 'validation', ['x', 'y', 'z'])
        assert self.evaluate(published, tmp_path) == 2 and "has the class 'x'" in capsys.readouterr().err
        (tmp_path / 'map.txt').write_text('x\ny\nz\n')
        assert self.evaluate(published, tmp_path, '--class-map', str(tmp_path / 'map.txt'))['top1'] == 100

    def test_no_head_without_training_is_made(self, published, tmp_path, capsys):
        write(tmp_path / 'validation', ['ant', 'bee'])
        assert self.evaluate(published, tmp_path, '--num-classes', '2') == 2
        assert 'have 3 classes, and a head of --num-classes 2' in capsys.readouterr().err

    def test_a_part_of_imagenet_is_scored_by_all_its_classes(self, imagenet, tmp_path):
        GREY.update(dict.fromkeys(('n01443537', 'n01440764'), 50))
        write(tmp_path / 'validation', ['n01443537'], 6)
        write(tmp_path / 'validation', ['n01440764'], 2)
        whole = timm.create_model('test_vit', img_size=16)
        row = self.evaluate(imagenet, tmp_path, '--in-chans', '3')
        assert row['top1'] == 75 and row['param_count'] == round(sum(map(torch.numel, whole.parameters())) / 1e6, 2)

    def test_names_that_say_nothing_need_a_word_of_the_user(self, imagenet, tmp_path, capsys):
        GREY.update(dict(fish=20, dog=120))
        write(tmp_path / 'validation', ['fish', 'dog'], 4)
        assert self.evaluate(imagenet, tmp_path) == 2
        assert 'has 1000 classes, and' in (error := capsys.readouterr().err)
        assert '--valid-labels or --class-map' in error and error.count('\n') == 1
        (tmp_path / 'labels').write_text('5\n1\n')  # dog, fish
        assert self.evaluate(imagenet, tmp_path, '--valid-labels', str(tmp_path / 'labels'))['top1'] == 50
        (tmp_path / 'labels').write_text('5\n1000\n')
        assert self.evaluate(imagenet, tmp_path, '--valid-labels', str(tmp_path / 'labels')) == 2
        assert 'the model has classes 0 to 999' in capsys.readouterr().err

    def test_names_of_a_configuration_are_a_list_or_a_mapping(self):
        for names in (['b', 'a'], {'0': 'b', '1': 'a'}, {1: 'a', 0: 'b'}):
            assert label_names({'label_names': names}, 2) == ['b', 'a'] and label_names({'label_names': names}, 3) == []
        assert label_names({}, 2) == []


def test_a_run_from_a_published_folder_is_evaluated_without_naming_it_again(trained, tmp_path, capsys):
    """Its checkpoint says the registered model; an address is never taken from a file."""
    checkpoint, folder = str(trained / 'a' / 'last.pth.tar'), tmp_path / 'hub'
    assert publish.main([checkpoint, '--repo-id', 'o/x', '--output', str(folder), '--dry-run', '--no-evaluate']) == 0
    line = [*RUN[2:], '--model', f'local-dir:{folder}', '--pretrained', '--epochs', '1']
    assert train.main([*line, '--data-dir', str(trained / 'data'), '--output', str(tmp_path), '--experiment', 'b']) == 0
    row = json.loads((tmp_path / 'b' / 'summary.json').read_text())[-1]
    flags = ['--checkpoint', str(tmp_path / 'b' / 'last.pth.tar'), '--device', 'cpu', '--workers', '0']
    result = tmp_path / 'r.json'
    assert validate.main([*flags, '--results-file', str(result)]) == 0
    found = json.loads(result.read_text())
    assert found['model'] == 'test_vit' and found['loss'] == pytest.approx(row['eval_loss'], abs=1e-4)


@pytest.mark.parametrize(
    ('names', 'kind', 'status'),
    [
        (['ant', 'bee', 'cow'], 'logit', 0), (['cow', 'ant', 'bee'], 'logit', 2), (['cow', 'ant', 'bee'], 'feature', 0),
        (['x', 'y', 'z'], 'logit', 0), (['cow', 'cow', 'ant'], 'logit', 0),
    ],
)  # fmt: skip
def test_a_teacher_has_the_numbers_of_the_students_classes(names, kind, status, trained, tmp_path, capsys):
    """Else each class would learn the logit of another one."""
    teacher = timm.create_model('test_vit', num_classes=3, img_size=16, in_chans=1)
    config = dict(label_names=names, num_classes=3)
    timm.models.save_for_hf(teacher, tmp_path / 'teacher', config, model_args=dict(img_size=16, in_chans=1))
    flags = [*RUN, '--epochs', '1', '--data-dir', str(trained / 'data'), '--output', str(tmp_path), '--experiment', 'a']
    flags += ['--kd-model-name', f'local-dir:{tmp_path / "teacher"}', '--kd-distill-type', kind]
    assert train.main(flags) == status
    if status:
        assert "gives the class 'ant' the number 1, and in this data it is 0" in capsys.readouterr().err
        (tmp_path / 'map.txt').write_text('\n'.join(names))
        assert not (tmp_path / 'a').exists() and train.main([*flags, '--class-map', str(tmp_path / 'map.txt')]) == 0
