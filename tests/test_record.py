"""Numbers are the same bits in every process."""

import record
import torch


def test_processes_agree_bit_for_bit():
    one, other = (record.record_all('cpu', ['cpu'], PYTHONHASHSEED=seed) for seed in ('1', '2'))
    assert len(one) > 400
    assert record.differing(one, other) == []


def test_a_changed_bit_is_found():
    x = {'a': torch.ones(3), 'b': torch.ones(2)}
    y = {'a': torch.tensor([1.0, 1.0, 1.0 + 2**-23]), 'b': torch.ones(2)}
    assert record.differing(x, y) == ['a']
    assert record.differing(x, {'a': x['a']}) == ['b']
