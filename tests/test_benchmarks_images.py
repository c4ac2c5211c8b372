"""Measuring programs take the images that they say."""

import argparse
import json
import os
import sys
import tarfile
import time

import pytest
import torch
from PIL import Image

from benchmarks import bands, equal_time, explain, linear_probe, loader
from benchmarks import train as of_train
from vim_timm import train


def write_images(folder, count=5):
    """Images of 8 x 8 pixels, all of one grey level."""
    folder.mkdir(parents=True)
    for number in range(count):
        Image.new('RGB', (8, 8), (number,) * 3).save(folder / f'{number}.png')


def test_bands_of_another_run_are_not_mixed_with_these(monkeypatch, tmp_path):
    write_images(tmp_path / 'colours' / 'train' / 'a', 10)
    target = tmp_path / 'bands'
    monkeypatch.setattr(sys, 'argv', ['bands', str(tmp_path / 'colours'), str(target), '--images', '8'])
    (tmp_path / 'bands.part' / 'train' / 'a').mkdir(parents=True)
    (tmp_path / 'bands.part' / 'train' / 'a' / 'cut.npy').touch()
    bands.main()
    assert len(list(target.glob('*/*/*'))) == 8
    with pytest.raises(SystemExit, match='bands is there'):
        bands.main()


def test_a_probe_knows_classes_by_name(tmp_path):
    write_images(tmp_path / 'train' / 'b')
    write_images(tmp_path / 'validation' / 'a')
    write_images(tmp_path / 'validation' / 'b')
    model = torch.nn.Flatten()
    _, train_classes = linear_probe.features(model, tmp_path / 'train', 'cpu')
    _, classes = linear_probe.features(model, tmp_path / 'validation', 'cpu')
    assert train_classes.tolist() == ['b'] * 5 and classes.tolist() == ['a'] * 5 + ['b'] * 5
    assert len(linear_probe.part(classes, 0.4)) == 4


def test_maps_are_of_images_that_the_run_held_out(monkeypatch, tmp_path):
    for name in 'ab':
        write_images(tmp_path / 'data' / name, 20)
    common = '--device cpu --batch-size 4 --workers 0 --epochs 1 --warmup-epochs 0 --img-size 8 --model-kwargs depth=1'
    words = f'--data-dir {tmp_path / "data"} --model vim_nano_patch4_32 {common} --output {tmp_path} --experiment run'
    assert train.main(words.split()) == 0
    taken = []
    monkeypatch.setattr(
        explain, 'measure', lambda model, images, labels, heat: taken.append((images, labels)) or (0, 0)
    )
    for count in ('6', '100'):
        monkeypatch.setattr(sys, 'argv', ['explain', str(tmp_path / 'run' / 'last.pth.tar'), '--images', count])
        explain.main()
    first, last = taken[0][1], taken[-1][1]
    assert len(first) == 6 and first.unique().tolist() == [0, 1]
    assert len(last) == 8  # a fifth of either class, where there are no more


def test_a_variant_too_slow_for_one_pass_is_not_given_more_time(tmp_path, capsys):
    slow = object.__new__(equal_time.Variant)  # without its process
    slow.name, slow.facts = 'slow', {'rate': 40.0}
    options = argparse.Namespace(seeds=[0], budget=5.0, jobs=1, limit=60.0, output=tmp_path)
    assert equal_time.run([slow], options, time.perf_counter(), images=400) == []
    assert 'slow: left out, 5 s are 0.50 passes' in capsys.readouterr().out


def test_a_variant_trains_every_seed_where_there_are_more_jobs_than_variants(tmp_path):
    class Variant:
        """Answers at once, if it has been asked once."""

        name, facts = 'only', {'rate': 100.0}

        def __init__(self):
            end, self.answers = os.pipe()
            self.process, self.asked = argparse.Namespace(stdout=open(end)), []

        def tell(self, line):
            self.asked.append({**json.loads(line), 'seconds': 0.0})
            os.write(self.answers, b'\n')

        def hear(self, patience):
            self.process.stdout.readline()
            (answer,), self.asked = self.asked, []
            return answer

    options = argparse.Namespace(seeds=[0, 1, 2], budget=5.0, jobs=3, limit=60.0, output=tmp_path)
    rows = equal_time.run([Variant()], options, time.perf_counter(), images=100)
    assert [row['seed'] for row in rows] == [0, 1, 2]


def test_shards_hold_the_images_that_links_lead_to(tmp_path):
    write_images(tmp_path / 'a', 1)
    (tmp_path / 'link.png').symlink_to(tmp_path / 'a' / '0.png')
    loader.write_shards([tmp_path / 'link.png'], tmp_path, 1)
    with tarfile.open(tmp_path / 'train-0000.tar') as tar:
        assert all(member.isreg() for member in tar)


def test_flags_that_choose_rows_of_a_gpu_are_not_passed_over(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', 'train --device cpu --models vim_tiny_patch4_32'.split())
    with pytest.raises(SystemExit):
        of_train.main()
    assert 'leave them out' in capsys.readouterr().err
