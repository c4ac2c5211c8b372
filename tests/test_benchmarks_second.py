"""The second way of taking a table reads what train.py prints."""

from pathlib import Path

from benchmarks import second


def test_every_end_of_an_epoch_is_seen(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    small = '--model vim_nano_patch4_32 --model-kwargs depth=1 --img-size 16 --batch-size 718 --epochs 3 --device cpu'
    seconds = second.seconds_of_epochs(f'--dataset digits --workers 0 --warmup-epochs 0 {small}')
    assert len(seconds) == 2 and min(seconds) > 0
