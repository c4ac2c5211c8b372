"""`benchmarks.masked_autoencoding` refuses what it would pass over in silence."""

import sys

import pytest

from benchmarks import masked_autoencoding


def test_a_case_that_the_model_has_not_is_no_empty_table(monkeypatch, tmp_path):
    words = f'ablate --data-dir {tmp_path} --output {tmp_path} --model vim2_nano_patch4_32 --cases'.split()
    monkeypatch.setattr(sys, 'argv', ['masked_autoencoding', *words, 'ratio 0.5', 'shuffled tokens'])
    with pytest.raises(SystemExit, match='^vim2_nano_patch4_32 has no shuffled tokens$'):
        masked_autoencoding.main()
