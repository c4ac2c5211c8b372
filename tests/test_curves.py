"""Curves of a training."""

from vim_timm import train
from vim_timm.report import curves, extras

ROWS = [
    {'epoch': 0, 'train_loss': 2.0, 'eval_loss': 1.5, 'eval_top1': 40.0, 'eval_f1': 0.3, 'lr': 0.1, 'skipped': 0,
     'time': 60.0, 'images_per_second': 100.0},
    {'epoch': 1, 'train_loss': 1.0, 'eval_loss': '', 'eval_top1': None, 'eval_f1': '', 'lr': 0.05, 'skipped': 0,
     'time': 120.0, 'images_per_second': 110.0},
]  # fmt: skip


def test_training_draws_curves(tmp_path, capsys):
    flags = (
        '--device cpu --workers 0 --dataset digits --model test_vit --img-size 16 --in-chans 1 --epochs 2 --opt adamw'
    )
    assert train.main([*flags.split(), '--model-ema', '--output', str(tmp_path), '--experiment', 'a']) == 0
    assert (tmp_path / 'a' / 'curves.png').exists()
    page = (tmp_path / 'a' / 'curves.html').read_text()
    assert 'best top-1 accuracy' in page and 'best top-1 of the moving average' in page
    (tmp_path / 'a' / 'curves.html').unlink()
    assert curves.main([str(tmp_path / 'a')]) == 0
    assert (tmp_path / 'a' / 'curves.html').read_text() == page
    assert curves.main([str(tmp_path / 'b')]) == 2
    assert 'summary.csv' in capsys.readouterr().err


def test_curves_have_a_panel_for_each_quantity():
    found = curves.panels(ROWS)
    assert {title: [(line.name, line.x, line.y) for line in lines] for title, lines in found.items()} == {
        'loss': [('training', [0, 1], [2.0, 1.0]), ('evaluation', [0], [1.5])],
        'accuracy (%)': [('evaluation top-1', [0], [40.0])],
        'learning rate': [('learning rate', [0, 1], [0.1, 0.05])],
        'f1': [('evaluation', [0], [0.3])],
        'images a second': [('images a second', [0, 1], [100.0, 110.0])],
    }
    assert [line.time for line in found['loss']] == [[60.0, 120.0], [60.0]]
    old = [{name: value for name, value in row.items() if name not in ('time', 'images_per_second')} for row in ROWS]
    assert all(line.time is None for lines in curves.panels(old).values() for line in lines)


def test_a_value_that_is_not_finite_is_no_best_one_of_the_curves(tmp_path):
    for broken in (float('nan'), float('inf')):
        rows = [{**ROWS[0], 'eval_top1': broken}, {**ROWS[0], 'epoch': 1}]
        assert 'best top-1 accuracy, epoch 1' in open(curves.write_curves(str(tmp_path), rows)).read()


def test_training_without_matplotlib_is_complete(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(extras.importlib.util, 'find_spec', lambda name: None)
    flags = '--device cpu --workers 0 --dataset digits --model test_vit --img-size 16 --in-chans 1 --epochs 1'
    assert train.main([*flags.split(), '--output', str(tmp_path), '--experiment', 'a']) == 0
    assert "no curves: reports need matplotlib: pip install 'vim-timm[train]'" in capsys.readouterr().out
