"""From a folder of class folders to a prediction: what is held out, said, shown, and named when it is misplaced."""

import itertools
import json
import re
import shlex
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from vim_timm import data, predict, train, validate
from vim_timm.data.__main__ import main as look
from vim_timm.data.folder import Images
from vim_timm.data.survey import near_duplicates, survey
from vim_timm.engine import Hooks
from vim_timm.engine.record import held_out_of
from vim_timm.errors import UserError
from vim_timm.hub import publish
from vim_timm.hub.repeat import data_flags
from vim_timm.report.samples import as_picture
from vim_timm.settings import Settings
from vim_timm.settings.fit import undecayed, with_warmup

DOCS = Path(__file__).parents[1] / 'docs'
SMALL = '--model test_vit --img-size 32 --workers 0 --device cpu --batch-size 8 --opt adamw --lr 1e-3'.split()


def photos(root, count=10, classes=('ant', 'bee', 'cow')):
    """Noisy pictures of one grey value a class."""
    rng = np.random.default_rng(0)
    for place, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            coarse = rng.normal(30 + 90 * place, 25, (6, 8, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(coarse).resize((48, 36), Image.Resampling.BICUBIC).save(root / name / f'{i}.jpg')
    return root


def held_out(root, share=0.2, seed=42):
    parts = data.hold_out(data.datasets.Pictures(Images(str(root), {'.jpg'}), 'RGB'), share, seed)
    return [part.filenames() for part in parts]


def test_a_share_of_each_class_is_held_out(tmp_path):
    rest, out = held_out(photos(tmp_path))
    assert not set(rest) & set(out) and len(rest) + len(out) == 30
    assert [sum(name.startswith(kind) for name in out) for kind in ('ant', 'bee', 'cow')] == [2, 2, 2]


def test_what_is_held_out_follows_from_seed_and_names(tmp_path):
    here, there = photos(tmp_path / 'a'), photos(tmp_path / 'b' / 'c')
    assert held_out(here) == held_out(there) != held_out(here, seed=43)
    before = set(held_out(here)[1])
    Image.new('RGB', (8, 8)).save(here / 'ant' / 'new.jpg')
    assert len(before - set(held_out(here)[1])) <= 1  # one more picture does not mix all others anew


def test_what_was_trained_on_is_not_evaluated_though_images_come_and_go(tmp_path, capsys):
    """A share of more images is more of them, so that some of those before would change their part."""
    root = photos(tmp_path / 'data')
    run = [*SMALL, str(root), '--output', str(tmp_path), '--experiment', 'a']
    assert train.main([*run, '--epochs', '1']) == 0
    trained, out = held_out(root)
    for path in [*root.glob('*/*.jpg')]:
        path.with_name(f'more-{path.name}').write_bytes(path.read_bytes())
    (root / out[0]).unlink()
    assert set(held_out(root)[1]) & set(trained)
    args, content = validate.read_args(['--checkpoint', str(tmp_path / 'a' / 'last.pth.tar')])
    evaluated = validate.make_dataset(args, content).filenames()
    assert not set(evaluated) & set(trained) and set(out[1:]) <= set(evaluated) and len(evaluated) > len(out)
    assert len(validate.make_dataset(args.replace(seed=43), content)) == 12  # the user's own choice
    assert train.main([*run, '--epochs', '2', '--resume', 'auto']) == 0
    assert 'some that are evaluated from now on it was trained on' in capsys.readouterr().out


@pytest.mark.parametrize('bounds', [[], {'ant': 1}, {1: 'a'}])
def test_bounds_of_a_damaged_checkpoint_are_none(bounds):
    args = Settings({'val_fraction': 0.2, 'seed': 42})
    content = {'args': dict(vars(args)), 'held_out': bounds}
    with pytest.raises(UserError, match='x is damaged: it does not say which images'):
        held_out_of(content, args, 'x')


@pytest.mark.parametrize('count, share, expected', [(1, 0.5, 0), (2, 0.1, 1), (2, 0.9, 1), (10, 0.25, 2), (10, 0.9, 9)])
def test_each_part_has_an_image_of_each_class_that_has_two(count, share, expected, tmp_path):
    photos(tmp_path, count, ['a'])
    photos(tmp_path, 4, ['b'])
    assert sum(name.startswith('a/') for name in held_out(tmp_path, share)[1]) == expected


def test_nothing_to_hold_out_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match='a class needs two of them'):
        held_out(photos(tmp_path, 1))


@pytest.mark.parametrize('kind', ['flat', 'train alone', 'torchvision'])
def test_a_run_says_what_it_reads_and_prints_the_line_that_evaluates_the_same_images(kind, tmp_path, capsys):
    root = photos(tmp_path / 'photos' / ('train' if kind == 'train alone' else ''))
    (root / 'cow' / 'clip.mov').write_bytes(b'x')
    more = ['--dataset', 'torch/image_folder'] if kind == 'torchvision' else []
    run = [
        *SMALL,
        str(tmp_path / 'photos'),
        '--epochs',
        '3',
        '--output',
        str(tmp_path / 'o'),
        '--experiment',
        'a',
        *more,
    ]
    assert train.main([*run, '--seed', '7', '--val-fraction', '0.3'] if kind == 'flat' else run) == 0
    text = capsys.readouterr().out
    counts = (21, 9) if kind == 'flat' else (24, 6)
    for split, count in zip(('train', 'validation'), counts):
        line = next(line for line in text.splitlines() if line.startswith(f'{split}: '))
        assert f'{count} images of 3 classes (ant, bee, cow) in ' in line and ', of 30 in all: --val-fraction' in line
        assert 'passed over: 1 with the ending .mov (cow/clip.mov)' in line
    command = shlex.split(next(line for line in text.splitlines() if line.startswith('evaluate it: ')))
    command = command[command.index('--checkpoint') :]
    best = float(re.search(r'best top1: ([\d.]+)', text)[1])
    result = tmp_path / 'result.json'
    flags = ['--workers', '0', '--device', 'cpu', '--results-file', str(result), '--results-format', 'json']
    assert validate.main([*command[: command.index('--report')], *flags]) == 0
    found = json.loads(result.read_text())
    assert found['count'] == counts[1] and found['top1'] == pytest.approx(best, abs=0.01)


def test_a_split_of_its_own_is_taken_and_a_share_refused(tmp_path):
    photos(tmp_path / 'train')
    photos(tmp_path / 'val', 3)
    args = train.parse_args([*SMALL, str(tmp_path)])
    _, sets = train.make_datasets(args, Hooks())
    assert [len(part) for part in sets] == [30, 9]
    with pytest.raises(UserError, match='has a split to evaluate on, val: leave --val-fraction out'):
        train.make_datasets(args.replace(val_fraction=0.2), Hooks())


def test_another_split_is_not_mixed_into_training(tmp_path):
    photos(tmp_path / 'train')
    photos(tmp_path / 'test', 3)
    args = train.parse_args([*SMALL, str(tmp_path)])
    with pytest.raises(UserError, match=r'has folders of splits \(test, train\), but none for split .validation'):
        train.make_datasets(args, Hooks())
    _, sets = train.make_datasets(args.replace(val_fraction=0.5), Hooks())
    assert [len(part) for part in sets] == [15, 15]
    _, sets = train.make_datasets(args.replace(val_split='test'), Hooks())
    assert [len(part) for part in sets] == [30, 9]


def test_other_data_have_splits_of_their_own():
    with pytest.raises(UserError, match='holds out files of a folder or tar, not of digits'):
        train.make_datasets(train.parse_args([*SMALL, '--dataset', 'digits', '--val-fraction', '0.2']), Hooks())


@pytest.mark.parametrize('folder, flags', [
    ('', '--val-split train'), ('', '--val-split training'), ('train', '--val-split validation'),
    ('', '--train-split validation --val-split val'),
])  # fmt: skip
def test_an_evaluation_on_training_images_is_said(folder, flags, tmp_path, capsys):
    photos(tmp_path / 'data' / 'train')
    photos(tmp_path / 'data' / 'val')
    run = [*SMALL, str(tmp_path / 'data' / folder), '--epochs', '1', '--output', str(tmp_path / 'o')]
    assert train.main([*run, *flags.split()]) == 0
    assert 'the evaluation is on images that were trained on' in capsys.readouterr().out


@pytest.mark.parametrize('layout', ['folder', 'tar'])
def test_splits_with_files_of_one_name_are_two(layout, tmp_path):
    for split in ('train', 'val'):
        photos(tmp_path / 'data' / split, 2)
    with tarfile.open(tmp_path / 'data.tar', 'w') as tar:
        tar.add(tmp_path / 'data', '.')
    root = tmp_path / ('data.tar' if layout == 'tar' else 'data')
    _, sets = train.make_datasets(train.parse_args([*SMALL, str(root)]), Hooks())
    assert not data.same_images(*sets) and data.same_images(sets[0], sets[0])


@pytest.mark.parametrize('linked', [('val',), ('val/ant', 'val/bee', 'val/cow'), ('val/ant',)])
def test_a_split_of_links_to_the_other_ones_folders_is_the_same(linked, tmp_path):
    photos(tmp_path / 'train', 2)
    if linked != ('val',):
        photos(tmp_path / 'val', 2)
    for name in linked:
        if (tmp_path / name).exists():
            shutil.rmtree(tmp_path / name)
        (tmp_path / name).symlink_to(tmp_path / name.replace('val', 'train'))
    _, sets = train.make_datasets(train.parse_args([*SMALL, str(tmp_path)]), Hooks())
    assert data.same_images(*sets) == (linked != ('val/ant',))


@pytest.mark.parametrize('split, count', [('train', 1438), ('validation', 359), ('test', 359)])
def test_a_split_of_the_digits_is_the_one_that_is_named(split, count):
    args = validate.parse_args(
        ['--model', 'vim_nano_patch4_32', '--pretrained', '--dataset', 'digits', '--in-chans', '1']
    )
    assert len(validate.make_dataset(args.replace(split=split), {})) == count


@pytest.mark.parametrize(
    'flags, words',
    [
        ('--dataset FOLDER', 'FOLDER is a folder: --data-dir FOLDER reads it'),
        ('--scale 0.5 1 FOLDER', 'if FOLDER is the data: --data-dir FOLDER'),
        ('--model-kwargs depth=1 FOLDER', 'if FOLDER is the data: --data-dir FOLDER'),
        ('--clip-mode FOLDER', 'if FOLDER is the data: --data-dir FOLDER'),
        ('--wandb-tags x FOLDER', '--wandb-tags took the folder FOLDER'),
        ('--torchcompile FOLDER', '--torchcompile took the folder FOLDER'),
        ('FOLDER --data-dir /other', 'FOLDER and --data-dir /other are two data folders'),
    ],
)
def test_a_folder_in_the_place_of_a_value_is_named(flags, words, tmp_path, capsys):
    folder = str(photos(tmp_path / 'photos', 2))
    assert train.main(flags.replace('FOLDER', folder).split()) == 2
    assert words.replace('FOLDER', folder) in capsys.readouterr().err


@pytest.mark.parametrize(
    'flags, epochs, said',
    [
        ('--epochs 300', 5, ''),
        ('--epochs 25', 5, ''),
        ('--epochs 10', 2, '2 epochs of warm-up, not 5, for there are 10'),
        ('--epochs 6', 1, '1 epoch of warm-up, not 5, for there are 6'),
        ('--epochs 3', 0, 'no epochs of warm-up, not 5, for there are 3'),
        ('--epochs 1', 0, 'no epochs of warm-up, not 5, for there is 1'),
        ('--epochs 10 --warmup-epochs 5', 5, ''),
        ('--epochs 5 --warmup-epochs 5', 5, 'the warm-up of 5 epochs does not end: there are 5'),
        ('--epochs 5 --warmup-epochs 5 --lr-cycle-limit 2', 5, ''),
        ('--epochs 5 --warmup-epochs 5 --cooldown-epochs 2', 5, ''),
        ('--epochs 3 --warmup-prefix', 5, ''),
        ('--epochs 3 --sched none', 5, ''),
    ],
)
def test_a_warm_up_that_nobody_chose_does_not_eat_the_run(flags, epochs, said):
    args, remark = with_warmup(train.parse_args(['--data-dir', 'x', *flags.split()]))
    assert args.warmup_epochs == epochs and remark.startswith(said) and bool(remark) == bool(said)


def assert_said_or_refused(args):
    """As timm's own schedule has it, whose defaults those of the flags are."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0)
    try:
        schedule, total = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=20)
    except ValueError:
        with pytest.raises(UserError, match=f'^--sched {args.sched}'):
            undecayed(args)
        return
    rates = []
    for time in range(20 * total if args.sched_on_updates else total):
        schedule.step_update(time) if args.sched_on_updates else schedule.step(time)
        rates.append(optimizer.param_groups[0]['lr'])
    stable = 1.0
    if args.sched == 'rsqrt':  # which falls all the time: what matters is its last decay
        stable = ((len(rates) - 1) / schedule.warmup_t) ** -0.5
    assert (rates[-1] < 0.999 * stable) == (not undecayed(args)), (args.epochs, args.decay_epochs, rates)


@pytest.mark.parametrize('more', ['', '--sched-on-updates', '--warmup-prefix', '--cooldown-epochs 1'])
@pytest.mark.parametrize('sched', ['step', 'multistep --decay-milestones 9', 'multistep', 'wsd', 'rsqrt'])
def test_a_schedule_that_does_not_decay_is_said_or_refused(sched, more):
    args = train.parse_args(f'--data-dir x --sched {sched} {more}'.split())
    for epochs, decay in itertools.product((1, 2, 3, 6, 10, 11), (None, 1.0, 2.0, 9.0, 10.0)):
        assert_said_or_refused(args.replace(epochs=epochs, decay_epochs=decay, warmup_epochs=min(1, epochs - 1)))


def test_fewer_pictures_than_a_batch_name_the_flag(tmp_path, capsys):
    root = str(photos(tmp_path / 'photos'))
    assert train.main([*SMALL, root, '--batch-size', '128', '--output', str(tmp_path)]) == 2
    assert '24 training images do not fill one batch of 128: a smaller --batch-size\n' in capsys.readouterr().err


@pytest.mark.parametrize('flags, updates, said', [
    ('', 10, False), ('--model-ema', 4999, True), ('--model-ema', 5001, False),
    ('--model-ema --model-ema-decay 0.9', 11, False), ('--model-ema --model-ema-decay 1', 10**6, True),
    ('--model-ema --model-ema-warmup', 10, False),
])  # fmt: skip
def test_an_average_that_stays_at_its_first_weights_is_said(flags, updates, said):
    args = train.parse_args(['--data-dir', 'x', *flags.split()])
    assert bool(train.slow_average(args, updates)) == said


def test_a_cpu_run_that_pins_memory_says_nothing_of_torchs(tmp_path, recwarn):
    flags = ['--epochs', '1', '--pin-mem', '--output', str(tmp_path / 'runs')]
    assert train.main([*SMALL, str(photos(tmp_path / 'photos')), *flags]) == 0
    assert not [warning for warning in recwarn if 'pin' in str(warning.message)]


def test_without_a_model_named_it_is_one_of_ours():
    assert train.parse_args(['--data-dir', 'x']).model == 'vim_tiny_patch16_224'
    assert train.parse_args(['--data-dir', 'x', '--img-size', '48']).model == 'vim_tiny_patch4_32'
    assert train.parse_args(['--data-dir', 'x', '--model', 'resnet50']).model == 'resnet50'


def seen(pictures):
    return survey([(picture, 0) for picture in pictures], as_picture, 0)


def test_near_duplicates_are_found_and_others_not():
    rng = np.random.default_rng(0)
    some = [Image.fromarray(rng.integers(0, 256, (6, 8, 3)).astype(np.uint8)).resize((160, 120)) for _ in range(20)]
    brighter = Image.fromarray((np.asarray(some[3]).astype(int) + 4).clip(0, 255).astype(np.uint8))
    others = [some[5].copy(), some[7].resize((80, 60)), brighter, some[9].transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    flat = [Image.new('RGB', (40, 40), (shade,) * 3) for shade in (20, 120, 220)]  # alike in nothing but their hashes
    pairs = near_duplicates(seen([*some, flat[0]]), seen([*others, flat[1], flat[2]]))
    assert pairs == [(5, 0), (7, 1), (3, 2)]


def test_the_page_of_a_data_set(tmp_path, capsys):
    root = photos(tmp_path / 'photos')
    for i in range(10):
        Image.open(root / 'ant' / f'{i}.jpg').save(root / 'ant' / f'{i} (1).jpg')
    (root / 'bee' / 'half.jpg').write_bytes((root / 'bee' / '0.jpg').read_bytes()[:300])
    (root / 'bee' / '<b>.txt').write_text('')
    exif = Image.Exif()
    exif[0x112] = 6
    for name in '01':
        Image.open(root / 'cow' / f'{name}.jpg').save(root / 'cow' / f'{name}.jpg', exif=exif)
    page = tmp_path / 'page.html'
    assert look([*SMALL, str(root), '--page', str(page)]) == 0
    text = page.read_text()
    assert 'cannot be read: ' in text and 'bee/&lt;b&gt;.txt' in text and '<b>.txt' not in text
    assert int(re.search(r'<b>(\d+)</b><span>evaluation images much like', text)[1]) > 0
    assert len(re.findall('class="sample pair"', text)) > 0
    assert all(source.startswith('data:image/') for source in re.findall(r'src="([^"]*)"', text))
    assert not re.search(r'https?://|<link|@import', text)
    said = capsys.readouterr().out
    assert f'page: {page}' in said and re.search(r'^\w+: 1 of them cannot be read, first bee/half.jpg: ', said, re.M)
    assert '2 of them have an orientation in EXIF data' in text
    counts = re.findall(r'^\w+: (\d) with an orientation in EXIF data, which is not applied, first cow/', said, re.M)
    assert sum(map(int, counts)) == 2
    assert 'The shorter side is 36 pixels in every image;' in text


def test_the_page_shows_the_batch_of_the_run(tmp_path):
    root = photos(tmp_path / 'photos')
    for flags in ('', '--dataset digits --in-chans 1'):
        page = tmp_path / 'page.html'
        assert look([*SMALL, *(flags.split() or [str(root)]), '--page', str(page)]) == 0
        batch = page.read_text().partition('id="batch"')[2].partition('id="alike"')[0]
        assert batch.count('<img') == 8


@pytest.mark.parametrize('flags, words', [('--page nowhere/x.html', 'no such folder'), ('--dataset hfds', '--dataset')])
def test_a_page_that_cannot_be_made_is_a_sentence(flags, words, capsys):
    assert look(['--data-dir', 'x', *flags.split()]) == 2
    assert words in capsys.readouterr().err


def commands(name):
    text = (DOCS / name).read_text()
    return [
        shlex.split(line) for block in re.findall(r'```bash\n(.*?)```', text, re.DOTALL) for line in block.splitlines()
    ]


def test_every_line_of_the_guide_works(tmp_path, monkeypatch, capsys):
    """In the order of the page, with a tiny model and without the published weights."""
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / 'photos')
    photos(tmp_path / 'new', 2)
    tiny = ['--model', 'test_vit', '--img-size', '32', '--epochs', '2', '--workers', '0', '--device', 'cpu']
    ran = []
    for words in commands('own-photos.md'):
        if words[:3] == ['python', '-m', 'vim_timm.data']:
            assert look([*words[3:], *SMALL]) == 0
        elif words[:2] == ['python', 'train.py']:
            assert train.main([*(word for word in words[2:] if word != '--pretrained'), *tiny]) == 0
        elif words[:2] == ['python', 'validate.py']:
            assert validate.main([*words[2:], '--workers', '0', '--device', 'cpu']) == 0
        elif words[:3] == ['python', '-m', 'vim_timm.predict']:
            assert predict.main(words[3:]) == 0
        else:
            continue
        ran.append(words)
    assert len(ran) == 5
    for file in ('data.html', 'report/report.html', 'sheet.html', 'output/train/photos/model_best.pth.tar'):
        assert (tmp_path / file).exists()


def test_lines_on_fine_tuning_are_command_lines():
    lines = commands('fine-tuning.md')
    assert lines and all(train.parse_args(words[2:]).pretrained for words in lines)
    for flags in re.findall(r'`(--[^`]*)`', (DOCS / 'fine-tuning.md').read_text()):
        words = shlex.split(flags.replace('FILE', 'x.pth'))
        if words[0] not in ('--report', '--save-encoder', '--initial-checkpoint', '--img-size', '--scale'):
            train.parse_args(['--data-dir', 'x', *words])


def evaluate(folder, *flags):
    """validate.py's row."""
    result = folder / 'result.json'
    more = ['--workers', '0', '--device', 'cpu', '--results-file', str(result), '--results-format', 'json']
    assert validate.main([*map(str, flags), *more]) == 0
    return json.loads(result.read_text())


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A run that holds out 9 of 30 pictures by seed 0, and its folder."""
    root = tmp_path_factory.mktemp('run')
    flags = ['--epochs', '1', '--seed', '0', '--val-fraction', '0.3', '--output', root, '--experiment', 'a']
    assert train.main([*SMALL, str(photos(root / 'photos')), *map(str, flags)]) == 0
    return root / 'a'


def test_the_folder_of_a_run_is_evaluated_as_far_as_it_was_held_out(run, tmp_path, capsys):
    checkpoint, own = ['--checkpoint', run / 'last.pth.tar'], run.parent / 'photos'
    (tmp_path / 'link').symlink_to(own)
    for folder in (own, f'{own}/', tmp_path / 'link'):
        assert evaluate(tmp_path, *checkpoint, '--data-dir', folder)['count'] == 9
    assert evaluate(tmp_path, *checkpoint, own, '--split', 'train')['count'] == 30
    assert evaluate(tmp_path, *checkpoint, own, '--val-fraction', '0.5', '--split', 'train')['count'] == 15
    assert evaluate(tmp_path, *checkpoint, own, '--seed', '0')['count'] == 9
    capsys.readouterr()
    for folder in ([], [str(own)]):
        assert validate.main([*map(str, checkpoint), *folder, '--seed', '1']) == 2
        assert (
            '--seed 1 would pick other images than those that the run held out by --seed 0' in capsys.readouterr().err
        )
    assert evaluate(tmp_path, *checkpoint, photos(tmp_path / 'other'))['count'] == 30
    remark = f'where {tmp_path / "other"} has the same ones, --split train --val-fraction 0.3 --seed 0 evaluates'
    assert remark in capsys.readouterr().out


def test_a_folder_of_checkpoints_takes_model_and_data_from_each(run, tmp_path, capsys):
    row = evaluate(tmp_path, '--checkpoint', run / 'last.pth.tar')
    rows = evaluate(tmp_path, '--checkpoint', run)
    assert [Path(each.pop('checkpoint')).name for each in rows] == [path.name for path in sorted(run.glob('*.tar'))]
    assert rows == [row] * 3 and row['count'] == 9
    (tmp_path / 'empty').mkdir()
    assert validate.main(['--checkpoint', str(tmp_path / 'empty')]) == 2
    assert f'there is no checkpoint in {tmp_path / "empty"}' in capsys.readouterr().err


@pytest.mark.parametrize('flag, value', [('--seed', '1'), ('--val-fraction', '0.4'), ('--train-split', 'training')])
def test_a_run_goes_on_only_with_the_images_that_it_held_out(flag, value, run, tmp_path, capsys):
    flags = ['--seed', '0', '--val-fraction', '0.3', '--resume', run / 'last.pth.tar', '--output', tmp_path]
    line = [*SMALL, str(run.parent / 'photos'), *map(str, flags), '--epochs', '2']
    assert train.main([*line, flag, value]) == 2
    assert f'held out other images: {flag} was' in capsys.readouterr().err
    if flag == '--seed':
        assert train.main(line) == 0


def test_the_card_of_a_run_names_the_images_that_it_held_out(run, tmp_path):
    flags = data_flags({**vars(train.parse_args(SMALL)), 'val_fraction': 0.3, 'seed': 0, 'input_span': [0, 9]})
    assert flags == {'input_span': [0, 9], 'split': 'train', 'val_fraction': 0.3, 'seed': 0, 'dataset': 'digits'}
    checkpoint, folder = str(run / 'last.pth.tar'), tmp_path / 'ants'
    assert publish.main([checkpoint, '--repo-id', 'org/ants', '--output', str(folder), '--dry-run']) == 0
    card = (folder / 'README.md').read_text()
    assert '--data-dir DATA --split train --val-fraction 0.3 --seed 0' in card
    assert '| 0.3 of train, held out | 9 |' in card


def test_a_key_that_chose_the_files_of_a_run_is_asked_for(tmp_path, capsys):
    root = photos(tmp_path / 'photos', 5)
    for path in root.glob('*/*.jpg'):
        Image.open(path).save(path.with_suffix('.png'))
    flags = ['--epochs', '1', '--input-key', '.png', '--output', tmp_path, '--experiment', 'a']
    assert train.main([*SMALL, str(root), *map(str, flags)]) == 0
    line = ['--checkpoint', str(tmp_path / 'a' / 'last.pth.tar')]
    capsys.readouterr()
    for more in ([], [str(root)]):
        assert validate.main([*line, *more]) == 2
        error = capsys.readouterr().err
        assert "--input-key '.png'" in error and error.count('\n') == 1
    assert evaluate(tmp_path, *line, '--input-key', '.png')['count'] == 3
