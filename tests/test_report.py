"""Reports say what the predictions are, whatever the classes are called, and need nothing but themselves."""

import base64
import csv
import dataclasses
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from processes import VALIDATE, finish, ranks
from safetensors.torch import save_file
from test_curves import ROWS
from timm.task import ClassificationEvaluator
from torch.utils.data import IterableDataset

from vim_timm import validate
from vim_timm.data import Digits, class_names
from vim_timm.errors import UserError
from vim_timm.report import confusion, curves, extras, page, plots
from vim_timm.report.chart import Line, charts
from vim_timm.report.classification import marker_sizes
from vim_timm.report.evaluation import PICTURES, Evaluation, write_report
from vim_timm.report.metrics import confused_pairs, measure, normalized
from vim_timm.report.names import words
from vim_timm.settings import Process

FILES = {
    'report.html', 'report.json', 'per_class.csv', 'predictions.csv', 'confusion_matrix.csv', 'confusion_matrix.png',
    'confusion_matrix_normalized.png', 'per_class.png', 'reliability.png', 'samples_right.png', 'samples_wrong.png',
}  # fmt: skip
NASTY = ['<b>bold</b>', '$x_{', 'a,"b"', 'Straße', 'x' * 80, '']
TARGETS = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
PREDICTED = torch.tensor([0, 0, 1, 1, 1, 0, 2, 1])


def logits_of(predicted, classes, score=0.9):
    """Logits whose softmax gives the predicted class `score`."""
    probabilities = torch.full((len(predicted), classes), (1 - score) / (classes - 1))
    probabilities[torch.arange(len(predicted)), predicted] = score
    return probabilities.log()


def small_scores(names=('a', 'b', 'c')):
    return measure(logits_of(PREDICTED, len(names)), TARGETS, torch.arange(8), names)


class Pictures:
    """A data set of small random images."""

    def __init__(self, classes):
        self.classes = classes

    def __getitem__(self, index):
        pixels = np.random.default_rng(index).integers(0, 256, (8, 6, 3)).astype(np.uint8)
        return Image.fromarray(pixels), 0


def row_of(count):
    return dict(model='m', top1=50.0, top1_err=50.0, top5=100.0, top5_err=0.0, count=count, param_count=1.0)


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """A file with untrained weights for the digits, and the flags that go with it."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('weights') / 'w.safetensors'
    model = timm.create_model('test_vit', num_classes=10, in_chans=1, img_size=16)
    save_file(model.state_dict(), str(path))
    flags = '--dataset digits --model test_vit --img-size 16 --in-chans 1 --device cpu --workers 0 --checkpoint'.split()
    return [*flags, str(path)]


def test_counts_precision_and_recall():
    scores = small_scores()
    assert scores.confusion.tolist() == [[2, 2, 0], [1, 1, 0], [0, 1, 1]]
    assert normalized(scores.confusion)[0].tolist() == [50, 50, 0]
    assert scores.per_class['recall'].tolist() == [50, 50, 50]
    assert scores.per_class['precision'] == pytest.approx([200 / 3, 25, 100])
    assert scores.averages['macro']['recall'] == 50


def scores_of(confusion):
    """Scores of images that a matrix of counts (C, C) tells of."""
    confusion = np.asarray(confusion)
    targets, predicted = np.nonzero(confusion)
    times = confusion[targets, predicted]
    targets, predicted = (torch.from_numpy(np.repeat(part, times)) for part in (targets, predicted))
    names = [f'class {index}' for index in range(len(confusion))]
    return measure(logits_of(predicted, len(confusion)), targets, torch.arange(len(targets)), names)


@pytest.mark.parametrize(
    'mistakes, listed, rest, most',
    [
        ({(0, 1): 3, (1, 0): 2}, [3, 2], 0, 1),
        ({(0, 1): 3, (1, 0): 1, (1, 2): 1}, [3], 2, 1),  # a pair that is confused once is no confusion
        ({(0, 1): 4, (1, 0): 2, (1, 2): 2, (2, 0): 2}, [4], 3, 2),  # a tie that the list would cut through
        ({(0, 1): 2, (1, 0): 2, (1, 2): 2, (2, 0): 2}, [], 4, 2),
        ({}, [], 0, 1),
    ],
)  # fmt: skip
def test_most_confused_are_those_that_are_confused_more_than_others(mistakes, listed, rest, most):
    confusion = 9 * np.eye(3, dtype=np.int64)
    for cell, count in mistakes.items():
        confusion[cell] = count
    pairs, others, bound = confused_pairs(scores_of(confusion), 3)
    assert [pair['count'] for pair in pairs] == listed and (others, bound) == (rest, most)
    if pairs:
        assert pairs[0] == {'true': 'class 0', 'predicted': 'class 1', 'count': listed[0],
                            'percent': pytest.approx(100 * listed[0] / confusion[0].sum())}  # fmt: skip


def test_calibration_error_is_the_gap_between_score_and_accuracy():
    scores = small_scores()
    assert scores.ece == pytest.approx(90 - 50, abs=0.01)
    assert scores.reliability['count'].tolist() == [8]
    assert (scores.reliability['score'][0], scores.reliability['accuracy'][0]) == pytest.approx((90, 50), abs=0.01)


def test_a_report_without_mistakes_keeps_no_pictures_of_an_earlier_one(tmp_path):
    for predicted, kinds in ((PREDICTED, {'right', 'wrong'}), (TARGETS, {'right'}), ((TARGETS + 1) % 3, {'wrong'})):
        scores = measure(logits_of(predicted, 3), TARGETS, torch.arange(8), 'abc')
        write_report(str(tmp_path), Evaluation(row_of(8), {'images_per_second': 1.0}, scores, Pictures('abc')))
        assert {path.stem.removeprefix('samples_') for path in tmp_path.glob('samples_*.png')} == kinds


def test_calibration_error_is_that_of_the_bins_beside_it_where_scores_are_one():
    logits = torch.zeros(200, 2)
    logits[:100, 0], logits[100:, 0] = 3, 200  # scores of 0.95, all right, and of 1.0, of which four fifths are
    targets = (torch.arange(200) >= 180).long()
    scores, sure = measure(logits, targets, torch.arange(200), 'ab'), 1 / (1 + np.exp(-3))
    assert scores.reliability['count'].tolist() == [200]
    assert scores.ece == pytest.approx(100 * ((1 + sure) / 2 - 0.9), abs=1e-4)


@pytest.mark.parametrize(
    'logits',
    [
        torch.zeros(50, 300),
        torch.randn(500, 1000, generator=torch.Generator().manual_seed(0)).mul(0.01).bfloat16().float(),  # many ties
        torch.randn(500, 10, generator=torch.Generator().manual_seed(0)) * 1e-8,  # probabilities are tied
        torch.arange(10.0).mul(200).expand(3, 10),  # all others' probabilities are zero
    ],
)
def test_a_report_counts_right_what_the_accuracy_counts(logits):
    best = logits.topk(5).indices
    scores = measure(logits, best[:, 0], torch.arange(len(logits)), [])
    assert scores.correct.all() and (scores.top_classes == best[:, :3].numpy()).all()
    evaluator = ClassificationEvaluator()
    evaluator.update(logits, best[:, 0])
    assert evaluator.compute()['top1'] == 100


def test_classes_without_images_have_no_recall():
    scores = measure(logits_of(torch.tensor([0, 1]), 4), torch.tensor([0, 1]), torch.arange(2), ['a', 'b'])
    assert scores.names == ['a', 'b', '2', '3']
    assert np.isnan(scores.per_class['recall'][2:]).all() and scores.averages['macro']['f1'] == 100


def test_a_class_without_images_is_in_no_plot_and_a_zero_in_averages_where_it_is_predicted(monkeypatch):
    titles = []
    monkeypatch.setattr('matplotlib.axes.Axes.set_title', lambda axes, title, **options: titles.append(title))
    scores = scores_of([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 2, 0], [0, 0, 0, 0]])
    plots.per_class(scores)
    plots.per_class(scores, 1)
    plots.per_class(small_scores())
    assert titles == [
        'Precision, recall and F1 of each class with images',
        'The 1 classes with images that have the lowest F1',
        'Precision, recall and F1 of each class',
    ]
    assert np.isnan(scores.per_class['recall'][[1, 3]]).all()
    assert scores.averages['macro']['recall'] == pytest.approx((50 + 0 + 100) / 3)


@pytest.mark.parametrize(
    'logits, targets, message',
    [
        (torch.full((2, 3), torch.nan), [0, 1], 'not finite for 2 of 2 images'),
        (torch.zeros(1, 3), [3], 'label 3'),
        (torch.zeros(0, 3), [], 'no image'),
    ],
)
def test_what_cannot_be_reported_ends_in_a_sentence(logits, targets, message):
    with pytest.raises(UserError, match=message):
        measure(logits, torch.tensor(targets, dtype=torch.int64), torch.arange(len(targets)), ['a', 'b', 'c'])


def test_names_with_markup_and_formulas_are_shown_as_they_are(tmp_path):
    scores = small_scores(NASTY)
    write_report(str(tmp_path), Evaluation(row_of(8), {'images_per_second': 1.0}, scores, Pictures(NASTY)))
    page = (tmp_path / 'report.html').read_text()
    assert '<b>bold</b>' not in page and '&lt;b&gt;bold&lt;/b&gt;' in page
    with open(tmp_path / 'per_class.csv', newline='') as file:
        assert [row['class'] for row in csv.DictReader(file)] == NASTY


def test_a_streamed_data_set_has_a_report_without_pictures(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            raise AssertionError('read twice')

    write_report(str(tmp_path), Evaluation(row_of(8), {'images_per_second': 1.0}, small_scores(), Stream()))
    assert not list(tmp_path.glob('samples*'))
    assert 'no pictures' in (tmp_path / 'report.html').read_text()


def stored(source):
    return Image.open(io.BytesIO(base64.b64decode(source.partition(',')[2])))


def test_tiny_pictures_are_enlarged_by_whole_pixels_and_photographs_are_not_pixelated():
    tiny, photograph = Digits(train=False)[0][0], Image.new('RGB', (500, 375))
    shown = page.picture(tiny, 'an image')
    assert 'class="tiny" width="128"' in shown  # 16 times 8 pixels
    assert np.array_equal(np.asarray(stored(re.search('src="(.*?)"', shown)[1]))[..., 0], np.asarray(tiny))
    shown = page.picture(photograph, 'an image')
    assert 'tiny' not in shown and stored(re.search('src="(.*?)"', shown)[1]).size == (160, 120)
    style = (Path(page.__file__).parent / 'page.css').read_text()
    assert re.findall(r'([^{}]*){[^{}]*pixelated', style) == ['\nimg.tiny ']


def test_a_tiny_picture_keeps_its_pixels_in_a_sheet_and_a_photograph_does_not():
    assert plots._resampling(Image.new('RGB', (28, 28))) == 'nearest'
    assert plots._resampling(np.zeros((224, 224, 3))) == 'antialiased'


def test_rows_of_a_gallery_are_as_high_as_its_pictures():
    def size(height):
        triples = [[np.zeros((height, 32, 3))] * 3] * 8
        return Image.open(io.BytesIO(plots.reconstructions(triples, 'of nothing'))).size

    (width, height), (same, low) = size(32), size(8)
    assert abs(width - same) < 20 and low < 0.5 * height


@pytest.mark.parametrize('classes', [10, 100, 1000])
def test_a_single_mistake_is_seen_in_the_matrix_of_any_size(classes):
    right = np.eye(classes, dtype=np.int64) * 50
    wrong = right.copy()
    wrong[classes // 2, classes // 4] = 1

    def orange(matrix):
        pixels = np.asarray(
            Image.open(
                io.BytesIO(plots.confusion_matrix(matrix, ['n'] * classes, False, *confusion.view(matrix)))
            ).convert('RGB')
        )
        share = 1 if classes <= confusion.WHOLE else 0.44  # the map of all, not its colour bars
        matrix_only = pixels[:, : int(share * pixels.shape[1])].astype(int)
        return int((matrix_only[..., 0] - matrix_only[..., 2] > 60).sum())

    assert orange(right) == 0
    assert orange(wrong) >= 9


def data_of(text, kind):
    """What the script of a page draws."""
    return json.loads(re.search(f'<div class="{kind}"><script type="application/json">(.*?)</script>', text)[1])


@pytest.mark.parametrize('classes', [10, 100, 1000])
def test_a_matrix_of_any_size_has_names_that_can_be_read(classes):
    """At most 25 rows with names: all classes, or those that are confused most, side by side with what they are."""
    counts = np.eye(classes, dtype=np.int64) * 20
    for first, second in ((0, 9), (3, 7), (2, 8)):
        counts[first * classes // 10, second * classes // 10] = 5
    order, shown = confusion.view(counts)
    assert sorted(order) == list(range(classes)) and len(shown) == (10 if classes == 10 else 6)
    if classes > 10:
        assert {(shown[i], shown[i + 1]) for i in (0, 2, 4)} <= {
            pair for a, b in ((0, 9), (3, 7), (2, 8)) for one, two in [(a * classes // 10, b * classes // 10)]
            for pair in [(one, two), (two, one)]
        }  # fmt: skip
    assert len(confusion.view(np.ones((classes, classes), dtype=np.int64))[1]) <= confusion.WHOLE


def test_every_cell_shows_its_pictures(tmp_path):
    evaluation = Evaluation(row_of(8), {'images_per_second': 1.0}, small_scores(), Pictures('abc'))
    write_report(str(tmp_path), evaluation)
    found = data_of((tmp_path / 'report.html').read_text(), 'confusion-data')
    cells = np.reshape(found['cells'], (-1, 3))
    assert {f'{true},{predicted}': count for true, predicted, count in cells.tolist()} == {
        cell: len(pictures) for cell, pictures in found['pictures'].items()
    }
    assert found['support'] == [4, 2, 2] and not found['balanced']
    (file, score, source, factor, width), _ = found['pictures']['0,1']
    assert (file, score, factor, width) == ('2', 90.0, 16, 6)
    assert np.array_equal(np.asarray(stored(source)), np.asarray(Pictures('abc')[2][0]))


def test_pictures_of_cells_are_limited_and_the_worst_confusions_come_first(monkeypatch):
    monkeypatch.setattr(confusion, 'PICTURES', 7)
    counts = 30 * np.eye(3, dtype=np.int64)
    counts[0, 1], counts[1, 2] = 9, 4
    found = confusion._pictures(scores_of(counts), [0, 1, 2], str, lambda place: ('data:', 1, 1))
    pictured = {cell: sum(one[2] is not None for one in entries) for cell, entries in found.items()}
    assert sum(pictured.values()) == 7 and pictured['0,1'] == max(pictured.values())
    assert all(one[2] is None for one in found['0,1'][pictured['0,1'] :]) and len(found['0,1']) == confusion.A_CELL


def test_both_matrices_of_balanced_data_are_one(tmp_path):
    evaluation = Evaluation(
        row_of(20), {'images_per_second': 1.0}, scores_of([[8, 2], [5, 5]]), Pictures('ab')
    )  # fmt: skip
    (tmp_path / 'confusion_matrix_normalized.png').write_text('of an earlier report')
    write_report(str(tmp_path), evaluation)
    assert {path.name for path in tmp_path.iterdir()} == FILES - {'confusion_matrix_normalized.png'}
    assert data_of((tmp_path / 'report.html').read_text(), 'confusion-data')['balanced']


def test_supports_are_whole_numbers(tmp_path):
    write_report(str(tmp_path), Evaluation(row_of(8), {'images_per_second': 1.0}, small_scores(), Pictures('abc')))
    text = (tmp_path / 'report.html').read_text()
    assert re.findall(r'<td>(\d+)</td></tr>', text)[:5] == ['4', '2', '2', '8', '8']
    with open(tmp_path / 'per_class.csv', newline='') as file:
        assert [row['support'] for row in csv.DictReader(file)] == ['4', '2', '2']


def test_markers_are_as_large_as_their_bins_are_full():
    sizes = marker_sizes(np.array([400, 100, 25, 1]), 12.0)
    assert sizes.tolist() == [12, 6, 3, 1.5]


def test_one_colour_has_one_meaning():
    style = (Path(page.__file__).parent / 'page.css').read_text()
    for theme in style.split('prefers-color-scheme: dark')[:2]:
        names = 'right wrong training evaluation average link text soft'.split()
        colours = [re.search(f'--{name}: (#[0-9a-f]+)', theme) for name in names]
        assert len({colour[1] for colour in colours if colour}) == len(names)
    used = {plots.RIGHT, plots.WRONG, plots.TRAINING, plots.EVALUATION, plots.AVERAGE, plots.INK, plots.GREY}
    assert len(used) == 7
    for name in ('right', 'wrong', 'training', 'evaluation', 'average'):  # the same on pages and pictures
        assert f'--{name}: {getattr(plots, name.upper())}' in style
    assert {line.colour for line in curves.panels(ROWS)['loss']} == {'var(--training)', 'var(--evaluation)'}


def test_rows_of_samples_are_full():
    style = (Path(page.__file__).parent / 'page.css').read_text()
    columns = [int(number) for number in re.findall(r'\.samples { grid-template-columns: repeat\((\d+)', style)]
    columns.append(int(re.search(r'\.samples {[^}]*repeat\((\d+)', style)[1]))
    assert len(columns) == 3 and not any(PICTURES % number for number in columns)


def test_a_page_cannot_be_ended_by_what_it_shows():
    text = page.live('charts-data', {'name': '</script><script>alert(1)</script>&\u2028'})
    assert text.count('<script') == 1 and '\u2028' not in text
    assert data_of(text, 'charts-data') == {'name': '</script><script>alert(1)</script>&\u2028'}


CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
ACTS = """<script>
const act = (element, kind, x, y) => { const box = element.getBoundingClientRect();
  const place = { clientX: box.left + x * box.width, clientY: box.top + y * box.height };
  element.dispatchEvent(new PointerEvent(kind, place)); };
setTimeout(() => {
  document.title = `${document.querySelectorAll('.matrix tbody tr').length} rows`;
  document.querySelectorAll('.cell.full')[1].click();
  document.querySelectorAll('.chart svg').forEach(picture => act(picture, 'pointermove', 1, 0.5));
}, 100);
</script></body>"""


def browsed(path):
    """A page's elements after its scripts have run."""
    profile = path.with_name('profile')
    command = [CHROMIUM, '--headless=new', '--no-sandbox', '--disable-gpu', f'--user-data-dir={profile}']
    command += ['--virtual-time-budget=2000', '--dump-dom', path.as_uri()]
    return subprocess.run(command, capture_output=True, encoding='utf-8', timeout=120).stdout


@pytest.mark.skipif(CHROMIUM is None, reason='no browser')
@pytest.mark.parametrize('values', [[100.0, 100.0], [99.0, 100.0]])
def test_no_axis_goes_beyond_100_percent(values, tmp_path):
    path = tmp_path / 'page.html'
    path.write_text(page.page('curves', [charts({'top-5 (%)': [Line('a', '#000', [0, 1], values)]})]))
    numbers = [float(text) for text in re.findall(r'text-anchor="end">([\d.]+)<', browsed(path))]
    assert len(numbers) > 2 and max(numbers) == 100


@pytest.mark.skipif(CHROMIUM is None, reason='no browser')
def test_a_browser_shows_pictures_of_a_cell_and_numbers_of_a_curve(tmp_path):
    names = [*NASTY, *(f'class {index}' for index in range(34))]
    counts = 3 * np.eye(40, dtype=np.int64)
    counts[0, 1] = 2
    scores = dataclasses.replace(scores_of(counts), names=names)
    evaluation = Evaluation(row_of(122), {'images_per_second': 1.0}, scores, Pictures(names), ROWS)
    write_report(str(tmp_path), evaluation)
    path = tmp_path / 'acted.html'
    path.write_text((tmp_path / 'report.html').read_text().replace('</body>', ACTS))
    dom = browsed(path)
    assert '<title>2 rows</title>' in dom and '<b>bold</b>' not in dom.partition('<script>')[0]
    assert 'true &lt;b&gt;bold&lt;/b&gt;, predicted $x_{: 2 of 5 images (40.0 %)' in dom
    assert dom.count('class="sample wrong"') == 2 + 2  # of the cell, and of the samples
    assert 'epoch 1 (2 min 0 s): training 1' in dom and '1 (2 min 0 s): 0.05' in dom


def test_wordnet_ids_become_words():
    assert words(class_names(Pictures(['n01440764', 'n02012849', 'n03126707']))) == [
        'tench', 'crane (n02012849)', 'crane (n03126707)',
    ]  # fmt: skip
    assert class_names(Digits(train=False)) == list('0123456789')
    assert class_names(object()) == []


def test_validate_writes_a_page_that_needs_nothing_else(tmp_path, weights):
    folder = tmp_path / 'report'
    results = ['--results-file', str(tmp_path / 'row.json'), '--results-format', 'json']
    assert validate.main([*weights, *results, '--report', str(folder)]) == 0
    assert {path.name for path in folder.iterdir()} == FILES
    row, report = (json.loads(path.read_text()) for path in (tmp_path / 'row.json', folder / 'report.json'))
    assert report['result'] == row and report['facts']['images_per_second'] > 0
    with open(folder / 'predictions.csv', newline='') as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == row['count'] == len(Digits(train=False))
    assert 100 * sum(int(line['right']) for line in lines) / len(lines) == pytest.approx(row['top1'], abs=1e-3)
    assert [line['true'] for line in lines] == [str(label) for label in Digits(train=False).labels]
    page = (folder / 'report.html').read_text()
    assert all(source.startswith('data:image/png;base64,') for source in re.findall(r'src="([^"]*)"', page))
    assert not re.search(r'https?://|<link|@import', page)


def test_the_document_names_every_file():
    text = (Path(__file__).parents[1] / 'docs' / 'evaluation.md').read_text()
    assert all(f'`{name}`' in text for name in FILES)


def test_report_is_the_same_on_any_number_of_ranks(tmp_path, weights):
    for count in (1, 3):
        finish(ranks(VALIDATE, *weights, '--report', str(tmp_path / str(count)), count=count, folder=tmp_path))
    for name in ('predictions.csv', 'per_class.csv', 'confusion_matrix.csv'):
        assert (tmp_path / '1' / name).read_text() == (tmp_path / '3' / name).read_text()


def test_a_missing_library_is_named_before_the_evaluation(monkeypatch, tmp_path, weights, capsys):
    monkeypatch.setattr(extras.importlib.util, 'find_spec', lambda name: None if name == 'matplotlib' else object())
    assert validate.main([*weights, '--report', str(tmp_path / 'report')]) == 2
    assert "reports need matplotlib: pip install 'vim-timm[train]'" in capsys.readouterr().err
    assert not (tmp_path / 'report').exists()


def test_a_folder_that_cannot_be_written_ends_before_the_evaluation(tmp_path, weights, capsys):
    (tmp_path / 'file').write_text('')
    assert validate.main([*weights, '--report', str(tmp_path / 'file')]) == 2
    assert '--report' in capsys.readouterr().err


@pytest.mark.parametrize('file, flags, is_json', [
    ('row.json', [], True), ('row.csv', [], False), ('row', [], False),
    ('row.json', ['--results-format', 'csv'], False),
])  # fmt: skip
def test_the_ending_of_a_results_file_is_its_format_where_none_is_named(file, flags, is_json, tmp_path, weights):
    assert validate.main([*weights, '--results-file', str(tmp_path / file), *flags]) == 0
    text = (tmp_path / file).read_text()
    assert (json.loads(text)['count'] == 359) if is_json else text.startswith('model,top1,')


def test_each_checkpoint_of_a_folder_has_a_report_of_its_own(tmp_path, weights):
    for name in ('a.1.pth', 'a.2.pth.tar', 'a.2.pth', 'b.safetensors'):
        (tmp_path / name).write_bytes(Path(weights[-1]).read_bytes())
    flags = [*weights[:-1], str(tmp_path), '--report', str(tmp_path / 'report')]
    assert validate.main(flags) == 0
    assert sorted(path.name for path in (tmp_path / 'report').iterdir()) == ['a.1', 'a.2', 'a.2-2', 'b']
    assert len(list((tmp_path / 'report').glob('*/report.html'))) == 4


def test_one_failing_model_of_a_list_does_not_cost_the_others(tmp_path, weights, capsys):
    (tmp_path / 'models.txt').write_text('test_vit\nresnet18\n')
    place = weights.index('test_vit')
    flags = [*weights[:place], str(tmp_path / 'models.txt'), *weights[place + 1 :]]
    results = ['--results-file', str(tmp_path / 'rows.csv'), '--report', str(tmp_path / 'report')]
    assert validate.main([*flags, *results]) == 2
    captured = capsys.readouterr()
    assert 'resnet18: ' in captured.out and '1 of 2 failed' in captured.err
    with open(tmp_path / 'rows.csv', newline='') as file:
        assert [row['model'] for row in csv.DictReader(file)] == ['test_vit']
    assert (tmp_path / 'report' / 'test_vit' / 'report.html').exists()


def test_test_time_pooling_is_for_models_with_a_map_of_features(tmp_path, weights, capsys):
    assert validate.main([*weights, '--test-pool']) == 2
    assert 'token model' in capsys.readouterr().err
    model = timm.create_model('test_resnet', num_classes=10, in_chans=1)
    save_file(model.state_dict(), str(tmp_path / 'r.safetensors'))
    flags = '--dataset digits --model test_resnet --in-chans 1 --img-size 224 --device cpu --workers 0 --test-pool'
    args = validate.parse_args([*flags.split(), '--checkpoint', str(tmp_path / 'r.safetensors'), '--num-classes', '10'])
    assert validate.validate(args, Process())['crop_pct'] == 1.0
