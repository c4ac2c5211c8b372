"""Runs side by side: their curves, what differs in their settings, and which is best."""

import csv
import json
import re

import pytest
import yaml

from vim_timm import compare, train
from vim_timm.report.comparison import Run, best_numbers, comparison_page, differing, panels, read_runs


def make_run(folder, accuracies, losses, **settings):
    folder.mkdir(parents=True)
    with open(folder / 'summary.csv', 'w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(['epoch', 'train_loss', 'eval_loss', 'eval_top1', 'lr', 'skipped', 'time', 'images_per_second'])
        for epoch, (accuracy, loss) in enumerate(zip(accuracies, losses)):
            writer.writerow([epoch, loss + 0.1, loss, accuracy, 0.1, 0, 10.0 * (epoch + 1), 100 + 10 * epoch])
    (folder / 'args.yaml').write_text(yaml.safe_dump({'model': 'm', 'lr': 0.1, 'experiment': folder.name, **settings}))
    return str(folder)


@pytest.fixture
def runs(tmp_path):
    first = make_run(tmp_path / 'a', [40.0, 60.0, 55.0], [2.0, 1.0, 1.5], lr=0.1, mixup=0.0)
    second = make_run(tmp_path / '<b>', [50.0, 58.0], [1.9, 0.9], lr=0.2, mixup=0.0, opt='adamw')
    return [first, second]


def data_of(text):
    found = re.search('<div class="charts-data"><script type="application/json">(.*?)</script>', text)[1]
    return json.loads(found, parse_constant=pytest.fail)  # a browser reads no NaN


def test_only_settings_that_differ_are_shown(runs):
    assert differing(read_runs(runs)) == {'lr': [0.1, 0.2], 'opt': ['–', 'adamw']}


def test_a_setting_that_one_run_leaves_empty_and_another_does_not_name_is_no_difference(tmp_path):
    folders = [make_run(tmp_path / 'a', [1.0], [1.0], old=None, older=''), make_run(tmp_path / 'b', [1.0], [1.0])]
    assert differing(read_runs(folders)) == {}


def test_the_best_of_each_run_and_of_all(runs):
    head, rows, winners = best_numbers(read_runs(runs))
    assert head == [
        'run', 'epochs', 'time', 'images a second, the median epoch', 'evaluation loss', 'evaluation top-1 (%)',
        'training loss',
    ]  # fmt: skip
    assert rows == [
        ['a', '3', '30 s', '110', '1 (epoch 1)', '60 (epoch 1)', '1.1 (epoch 1)'],
        ['<b>', '2', '20 s', '105', '0.9 (epoch 1)', '58 (epoch 1)', '1 (epoch 1)'],
    ]
    assert winners == {(1, 4), (0, 5), (1, 6)}


@pytest.mark.parametrize('column, less', [
    ('eval_loss', True), ('ema_focalloss', True), ('eval_mse', True), ('ema_mae', True), ('eval_top1_err', True),
    ('eval_psnr_of_mean_mse', False), ('eval_mean_psnr', False), ('ema_top1', False), ('eval_terrain', False),
])  # fmt: skip
def test_losses_and_errors_are_better_where_they_are_smaller(column, less):
    rows = [{'epoch': 0, column: 1.0}, {'epoch': 1, column: 2.0}]
    assert Run('a', rows, {}).best(column) == ((1.0, 0) if less else (2.0, 1))


def test_curves_lie_over_each_other_in_one_colour_a_run(runs):
    found = panels(read_runs(runs))
    assert list(found) == [
        'evaluation loss', 'evaluation top-1 (%)', 'training loss', 'learning rate', 'images a second',
    ]  # fmt: skip
    assert [(line.name, line.x, line.y, line.time) for line in found['evaluation top-1 (%)']] == [
        ('a', [0, 1, 2], [40, 60, 55], [10, 20, 30]), ('<b>', [0, 1], [50, 58], [10, 20]),
    ]  # fmt: skip
    colours = {(line.name, line.colour) for lines in found.values() for line in lines}
    assert len(colours) == len({colour for _, colour in colours}) == 2


def test_the_page_needs_nothing_else(runs, tmp_path, capsys):
    path = tmp_path / 'x.html'
    assert compare.main([*runs, '--output', str(path)]) == 0
    printed = capsys.readouterr().out
    assert '60 (epoch 1) *' in printed and '0.9 (epoch 1) *' in printed and f'page: {path}' in printed
    text = path.read_text()
    assert '<b>' not in re.sub(r'<script.*?</script>', '', text, flags=re.S) and '&lt;b&gt;' in text
    assert text.count('class="best"') == 3 and not re.search(r'https?://|<link|@import|src="', text)
    assert data_of(text)['common'] and len(data_of(text)['panels']) == 5


def test_runs_of_one_name_have_their_paths(tmp_path):
    paths = [make_run(tmp_path / part / 'a', [1.0], [1.0]) for part in 'xy']
    assert [run.name for run in read_runs(paths)] == paths


def test_runs_as_they_are_written_can_be_compared(tmp_path, capsys):
    flags = '--dataset digits --model test_vit --img-size 16 --in-chans 1 --device cpu --workers 0 --epochs 1'.split()
    for name, rate in (('a', '1e-3'), ('b', '1e-2')):
        more = ['--opt', 'adamw', '--lr', rate, '--output', str(tmp_path), '--experiment', name]
        assert train.main([*flags, *more, '--batch-size', '359']) == 0
    runs = read_runs([str(tmp_path / 'a'), str(tmp_path / 'b' / 'summary.csv')])
    assert differing(runs) == {'lr': [0.001, 0.01]}
    assert compare.main([str(tmp_path / 'a'), str(tmp_path / 'b'), '-o', str(tmp_path / 'c.html')]) == 0


@pytest.mark.parametrize(
    'make, message',
    [
        (lambda folder: folder.mkdir(), 'no summary.csv'),
        (lambda folder: (folder.mkdir(), (folder / 'summary.csv').write_text('lr\n1\n')), 'no column epoch'),
        (lambda folder: (folder.mkdir(), (folder / 'summary.csv').write_text('epoch\nx\n')), 'could not convert'),
        (lambda folder: None, 'no summary.csv'),
    ],
)
def test_what_is_no_run_is_named(make, message, runs, tmp_path, capsys):
    make(tmp_path / 'odd')
    assert compare.main([runs[0], str(tmp_path / 'odd'), '-o', str(tmp_path / 'x.html')]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / 'x.html').exists()


def test_a_run_without_an_epoch_is_named_and_costs_the_others_nothing(runs, tmp_path, capsys):
    (tmp_path / 'new').mkdir()
    (tmp_path / 'new' / 'summary.csv').write_text('epoch\n')
    line = ['-o', str(tmp_path / 'x.html'), str(tmp_path / 'new')]
    assert compare.main([*line, *runs]) == 0
    printed = capsys.readouterr().out
    assert 'new: no epoch yet, left out' in printed and '60 (epoch 1) *' in printed
    assert compare.main([*line, str(tmp_path / 'new')]) == 2
    assert 'none of the runs has an epoch yet' in capsys.readouterr().err


def test_a_value_that_is_no_number_is_no_best_one_and_leaves_the_page_readable(tmp_path):
    losses = {'a': [float('nan'), 3.0], 'b': [float('-inf'), 4.0]}
    runs = read_runs([make_run(tmp_path / name, [1.0, 2.0], values) for name, values in losses.items()])
    _, rows, winners = best_numbers(runs)
    assert [row[4] for row in rows] == ['3 (epoch 1)', '4 (epoch 1)'] and (0, 4) in winners and (1, 4) not in winners
    lines = data_of(comparison_page(runs))['panels'][0]['lines']
    assert [line['y'] for line in lines] == [[None, 3.0], [None, 4.0]]


def test_one_run_is_not_compared(runs, capsys):
    assert compare.main(runs[:1]) == 2
    assert 'two runs or more' in capsys.readouterr().err
