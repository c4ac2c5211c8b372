"""A pytest plugin that turns timm's own tests, unmodified on disk and in memory, to chosen models.

timm parametrizes its tests over all of its models, or over the few for which a test was once written. The plugin puts
other rows in place of those when pytest expands a test, and leaves out every test that it has no rows for.
"""

from typing import Any, Callable, Iterator

import pytest
import timm

Rows = Callable[[str], list[Any]]


def itself(model: str) -> list[Any]:
    return [model]


def tagged(model: str) -> list[Any]:
    return timm.list_models(f'{model}.*', include_tags=True)


THREE = {'in_chans': 3}  # of the images in these tests

# test -> the rows of one model, for the arguments that the test's own `parametrize` names
CASES: dict[str, Rows] = {
    # what timm asks of every model
    'test_model_forward': itself,
    'test_model_backward': itself,
    'test_model_default_cfgs_non_std': tagged,
    'test_model_forward_torchscript': itself,
    'test_model_forward_intermediates_features': itself,
    'test_model_forward_intermediates': itself,
    'test_prune_intermediate_layers_contract': itself,
    'test_model_forward_fx': itself,
    'test_model_backward_fx': itself,
    'test_model_forward_fx_torchscript': itself,
    # what it asks of some models, and what holds for any with tokens
    'test_pruned_features_torchscript': itself,
    'test_prune_intermediate_layers_params_used': itself,
    'test_catavgmax_unsupported': itself,
    'test_head_hidden_size': lambda model: [(model, {**THREE, 'img_size': 64})],
    'test_model_init_weights_after_to_empty': lambda model: [(model, {**THREE, 'img_size': 64})],
    'test_headless_checkpoint_reload': lambda model: [(model, THREE)],
    'test_relpos_non_square_checkpoint_reload': lambda model: [(model, THREE)],
    'test_relpos_non_square_set_input_size': lambda model: [(model, THREE)],
    'test_relpos_family_set_input_size': lambda model: [(model, THREE, 224, 256), (model, THREE, 224, 160)],
    'test_default_resize_hub_roundtrip': lambda model: [(model, THREE, 64, 96)],
    'test_export_tracks_reset_classifier_structure': lambda model: [
        (model, THREE, 'avg', None),
        (model, {**THREE, 'global_pool': 'avg'}, 'max', None),
    ],
    'test_freeze_unfreeze_root_parameters': itself,
}

# tests of every model that say nothing about ours
LEFT_OUT = {
    'test_model_default_cfgs': 'of networks with a map in place of tokens',
    'test_model_forward_features': 'of networks with a map in place of tokens',
    'test_model_load_pretrained': 'downloads weights',
    'test_model_features_pretrained': 'downloads weights',
}
# tests that take what `forward` returns for logits, where a masked autoencoder returns predicted patches and a mask
OF_CLASSIFIERS = {
    'test_model_forward',
    'test_model_backward',
    'test_model_default_cfgs_non_std',
    'test_model_forward_torchscript',
    'test_model_forward_fx',
    'test_model_backward_fx',
    'test_model_forward_fx_torchscript',
    'test_prune_intermediate_layers_params_used',
    'test_head_hidden_size',
    'test_model_init_weights_after_to_empty',
    'test_relpos_non_square_set_input_size',
}
# tests that give every model, as it is, images of three channels
OF_THREE_CHANNELS = {'test_pruned_features_torchscript'}
# a list of this many models is a list of all
ALL = 500


class Suite:
    """Runs `CASES` for the models given."""

    def __init__(self, models: list[str]) -> None:
        self.models = models
        self.seen: set[str] = set()

    def pytest_report_header(self) -> str:
        return f'timm {timm.__version__}, models: {" ".join(self.models)}'

    @pytest.hookimpl(tryfirst=True)
    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        test = metafunc.function.__name__
        for i, mark in model_marks(metafunc):
            if test in CASES:
                self.seen.add(test)
                rows = [row for model in self.models if applies(test, model) for row in CASES[test](model)]
                metafunc.definition.own_markers[i] = pytest.mark.parametrize(mark.args[0], rows).mark
            elif len(mark.args[1]) > ALL and test not in LEFT_OUT:
                raise pytest.UsageError(
                    f'timm {timm.__version__} asks {test} of every model: add it to CASES or LEFT_OUT'
                )

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        missing = CASES.keys() - self.seen
        if missing:
            raise pytest.UsageError(f'timm {timm.__version__} has no {", ".join(sorted(missing))}')
        tests = {test for test in CASES if any(applies(test, model) for model in self.models)}
        ours = [item for item in items if item.originalname in tests]
        config.hook.pytest_deselected(items=[item for item in items if item not in ours])
        items[:] = ours


def applies(test: str, model: str) -> bool:
    """Whether a test says anything of a model."""
    if model.startswith('mae_') and test in OF_CLASSIFIERS:
        return False
    return test not in OF_THREE_CHANNELS or timm.get_pretrained_cfg(model).input_size[0] == 3


def model_marks(metafunc: pytest.Metafunc) -> Iterator[tuple[int, pytest.Mark]]:
    """Position and content of the `parametrize` that names models."""
    for i, mark in enumerate(metafunc.definition.own_markers):
        if mark.name == 'parametrize':
            names = mark.args[0].split(',') if isinstance(mark.args[0], str) else mark.args[0]
            if {'model_name', 'name'} & {name.strip() for name in names}:
                yield i, mark
