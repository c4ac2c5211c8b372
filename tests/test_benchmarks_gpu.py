"""Benchmarks of models on a GPU: which models a command line names."""

from argparse import Namespace

from benchmarks import gpu
from vim_timm.ops import mamba_ssm_adapter


def test_families_without_a_model_of_a_size_are_left_out(monkeypatch):
    """The small models of other authors are of one size alone."""
    monkeypatch.setattr(gpu, 'measure_model', lambda name, *others: name)
    monkeypatch.setattr(mamba_ssm_adapter, 'unavailable', lambda: '')
    options = Namespace(sizes=[224], models=['tiny', 'small'], families=['mambaout'], ways=['eager'])
    assert gpu.measure_models(options, False) == ['mambaout_femto']
    options.families = ['vim']
    assert gpu.measure_models(options, False) == 2 * ['vim_tiny_patch16_224'] + 2 * ['vim_small_patch16_224']
