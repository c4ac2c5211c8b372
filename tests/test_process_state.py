"""No number depends on the state of the process: default dtype and device, inference mode, memory filled by torch.

A run without TRITON_INTERPRET=1 leaves Triton's kernels out; `test_triton_kernels.py` starts one with it.
"""

import os

import pytest
import timm
import torch
from process_state import STATES

import vim_timm  # noqa: F401  registers the models
from vim_timm import ops
from vim_timm.ops import Direction, GridConv, GridMixer, Linear, Mixer, Ssd, SwiGlu, Taps, Visible, Weights, backends
from vim_timm.ops.operands import AddNorm, Conv, Noise, Norm, Pixels, Scan

INTERPRETER = os.environ.get('TRITON_INTERPRET') == '1'
AVAILABLE = [status.name for status in ops.explain() if status.available]
ON_CPU = ('reference', 'torch', 'export', 'cpu')
CELLS = [
    (operator, backend)
    for operator, cells in backends.TABLE.items()
    for backend in cells
    if backend in AVAILABLE and (backend in ON_CPU or backend == 'triton' and INTERPRETER)
]


every_state = pytest.mark.parametrize('state', STATES)


def operands_of(operator, dtype, length):
    """Small operands; those that are two-byte in a model are of `dtype`."""
    torch.manual_seed(0)
    channels, state, rank, width = 20, 4, 3, 4

    def draw(*shape, narrow=False):
        return torch.randn(shape).to(dtype if narrow else torch.float32).requires_grad_()

    def rows(size):
        return draw(2, length, size, narrow=True)

    def direction():
        parameters = draw(channels, state), rows(state), rows(state), draw(channels), draw(channels)
        return Direction(rows(channels), rows(channels), *parameters)

    def weights():
        projections = draw(rank + 2 * state, channels), draw(channels, rank), draw(channels)
        return Weights(draw(channels, width), draw(channels), *projections, draw(channels, state), draw(channels))

    if operator == 'scan':
        return Scan(direction(), direction(), rows(channels), 0.5)
    if operator == 'conv':
        return Conv(rows(channels), Taps(draw(channels, width), draw(channels)), Taps(draw(channels, width), None))
    if operator == 'mixer':
        return Mixer(rows(2 * channels), weights(), weights(), 0.5)
    if operator == 'ssd':
        x, steps = draw(2, length, 2, 16, narrow=True), rows(2)
        return Ssd(x, steps, draw(1, 2), rows(16), rows(16), draw(2), draw(2))
    if operator == 'grid_conv':
        return GridConv(rows(32), draw(32, 9), draw(32), 1, length - 1, 1)
    if operator in ('grid_mixer', 'masked_grid_mixer'):
        inside = 32 + 2 * 16  # two heads of 16 channels, d_state 16
        parameters = draw(inside, 9), draw(inside), draw(2), draw(1, 2), draw(2), draw(32)
        keep = torch.arange(1, length).expand(2, -1) if operator == 'masked_grid_mixer' else None
        height = length - 1 if keep is None else length
        return GridMixer(rows(2 * 32 + 2 * 16 + 2), *parameters, 1e-5, 16, True, 1, height, 1, keep)
    if operator == 'random_mask':
        return Noise(torch.rand(2, length), 2)
    if operator == 'visible_pixels':
        return Pixels(torch.randn(2, 3, 4, 6), torch.arange(2).expand(2, -1), 2, 3, dtype)
    if operator == 'visible_neighbours':
        return Visible(torch.arange(1, length).expand(2, -1), 1, length, 1)
    if operator == 'linear':
        return Linear(rows(channels), draw(6, channels, narrow=True), draw(6, narrow=True))
    if operator == 'swiglu':
        products = draw(6, channels, narrow=True), draw(6, narrow=True), draw(5, 3, narrow=True), draw(5, narrow=True)
        return SwiGlu(rows(channels), *products)
    if operator == 'add_norm':
        return AddNorm(rows(channels), rows(channels), draw(channels, narrow=True), 1e-5, dtype)
    assert operator == 'rms_norm'
    return Norm(rows(channels), draw(channels, narrow=True), 1e-5)


def results(operator, backend, operands):
    """Outputs and all gradients, whose own operands are made before."""
    out = backends.TABLE[operator][backend].run(operands)
    outputs = [y for y in (out if isinstance(out, tuple) else (out,)) if y is not None]
    flat = operands.flat() if hasattr(operands, 'flat') else operands
    learning = [x for x in flat if isinstance(x, torch.Tensor) and x.requires_grad]
    if not learning:  # of numbers of tokens
        return outputs
    return [*outputs, *torch.autograd.grad(outputs, learning, [torch.ones_like(y) for y in outputs])]


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('operator, backend', CELLS)
def test_operators_do_not_see_the_state_of_the_process(operator, backend, dtype):
    if backend == 'triton' and dtype != torch.float32:
        pytest.skip('its allocations are the same for all dtypes, and its interpreter is slow')
    operands = operands_of(operator, dtype, 3 if backend == 'triton' else 67)
    expected = results(operator, backend, operands)
    states = ('bfloat16', 'meta device') if backend == 'triton' else STATES  # its interpreter is slow
    for state in states:
        with STATES[state]():
            found = results(operator, backend, operands)
        for f, e in zip(found, expected, strict=True):
            assert f.dtype == e.dtype and f.device == e.device and torch.equal(f, e), state


@pytest.mark.parametrize('operator, backend', CELLS)
def test_inference_mode_gives_the_same_bits(operator, backend):
    operands = operands_of(operator, torch.float32, 5)

    def output():
        out = backends.TABLE[operator][backend].run(operands)
        return out[0] if isinstance(out, tuple) else out

    learning = output()
    with torch.no_grad():
        expected = output()
    with torch.inference_mode():
        assert torch.equal(output(), expected)
    two_forms = ('ssd', 'grid_mixer', 'masked_grid_mixer')  # of one sum, see `ops.cpu.ssd`
    if backend == 'cpu' and operator in two_forms:
        torch.testing.assert_close(learning, expected, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(learning, expected)


@every_state
@pytest.mark.parametrize('backend', [name for name in ON_CPU if name in AVAILABLE])
def test_a_model_does_not_see_the_state_of_the_process(backend, state):
    torch.manual_seed(0)
    model = timm.create_model('vim_nano_patch4_32', depth=1, embed_dim=32, img_size=8)
    images = torch.randn(2, 3, 8, 8)

    def logits_and_gradients():
        model.zero_grad()
        logits = model(images)
        logits.sum().backward()
        return [logits, *(p.grad for p in model.parameters())]

    with ops.use_scan_backend(backend):
        expected = logits_and_gradients()
        with STATES[state]():
            found = logits_and_gradients()
    assert all(f.dtype == e.dtype and torch.equal(f, e) for f, e in zip(found, expected, strict=True))


@every_state
@pytest.mark.parametrize('training', [False, True])
def test_a_masked_autoencoder_does_not_see_the_state_of_the_process(state, training):
    small = dict(img_size=8, embed_dim=32, depth=1, decoder_depth=1)
    model = timm.create_model('mae_vim_tiny_patch4_32', **small).train(training)
    images = torch.randn(2, 3, 8, 8)

    def prediction_and_mask():
        torch.manual_seed(1)
        return model(images)

    expected = prediction_and_mask()
    with STATES[state]():
        found = prediction_and_mask()
    assert all(f.dtype == e.dtype and torch.equal(f, e) for f, e in zip(found, expected, strict=True))
