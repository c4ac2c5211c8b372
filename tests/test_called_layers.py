"""What is hooked, wrapped, parametrized, pruned, quantized or sharded inside a block is called, on every backend."""

import copy

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import prune
from torch.nn.utils import weight_norm as hooked_weight_norm

from vim_timm import ops
from vim_timm.layers import BiMamba, BiSSD, Layout, PatchEmbed, RmsNorm, bissd
from vim_timm.layers.plain import is_plain

LAYERS = ('in_proj', 'conv1d', 'conv1d_b', 'x_proj', 'x_proj_b', 'dt_proj', 'dt_proj_b', 'out_proj')
BACKENDS = [s.name for s in ops.explain() if s.available and s.name in ('cpu', 'torch', 'export')]
OLD = tuple(map(int, torch.__version__.split('.')[:2])) < (2, 7)
every_layer = pytest.mark.parametrize('name', LAYERS)


@pytest.fixture(params=['auto', 'export'])
def backend(request):
    with ops.use_scan_backend(request.param):
        yield


@pytest.fixture
def block():
    torch.manual_seed(0)
    return BiMamba(16, proj_bias=True)


@pytest.fixture
def x():
    return torch.randn(2, 5, 16)


def output_and_gradients(block, *inputs):
    block.zero_grad()
    y = block(*inputs)
    y.square().sum().backward()
    return [y.detach(), *(p.grad for p in block.parameters() if p.grad is not None)]


def assert_close(found, wanted):
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w, rtol=1e-4, atol=1e-5 * max(1.0, w.abs().max().item()))


@every_layer
def test_a_hook_sees_and_changes(block, x, name, backend):
    plain, seen = block(x), []
    block.get_submodule(name).register_forward_hook(lambda module, args, out: seen.append(out.shape) or 2 * out)
    assert not torch.allclose(block(x), plain) and len(seen) == 1


@every_layer
def test_being_called_changes_no_number(block, x, name, backend):
    wanted = output_and_gradients(block, x)
    block.get_submodule(name).register_forward_pre_hook(lambda *_: None)
    assert_close(output_and_gradients(block, x), wanted)


@every_layer
def test_weights_that_are_no_parameters_are_read_as_they_are(block, x, name, backend):
    """As in a replica of torch.nn.DataParallel, or where FSDP shows views of its flat parameter."""
    wanted, layer = block(x), block.get_submodule(name)
    weight = layer.weight.detach()
    del layer.weight
    layer.weight = weight
    assert torch.equal(block(x), wanted)
    layer.weight = 2 * weight
    assert not torch.equal(block(x), wanted)


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize('name', ['A_log', 'D', 'A_b_log', 'D_b'])
def test_a_mixers_own_parameters_are_read_as_they_are(block, x, name, backend):
    """Parametrized, given for one call, or no parameters, as in a replica."""
    plain, own = block(x), getattr(block, name)
    other = torch.func.functional_call(block, {name: 2 * own.detach()}, (x,))
    assert not torch.allclose(other, plain) and torch.equal(block(x), plain)
    nn.utils.parametrize.register_parametrization(block, name, Twice())
    y = block(x)
    y.square().sum().backward()
    assert torch.equal(y, other) and own.grad.abs().sum() > 0
    nn.utils.parametrize.remove_parametrizations(block, name)
    value = getattr(block, name).detach()
    delattr(block, name)
    setattr(block, name, value)
    assert torch.equal(block(x), other)


def replacement(layer):
    """A plain layer of the same sizes with a bias where there was none, and without one where there was."""
    bias = layer.bias is None
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, layer.out_features, bias=bias)
    kind, size = type(layer), layer.kernel_size
    return kind(layer.in_channels, layer.out_channels, size, padding=layer.padding, groups=layer.groups, bias=bias)


def law(block, *inputs):
    """Output and gradients of a copy in float64 whose layers are all called, on the `reference` backend."""
    block = copy.deepcopy(block).double()
    for module in block.modules():
        module.register_forward_pre_hook(lambda *_: None)
    with ops.use_scan_backend('reference'):
        return output_and_gradients(block, inputs[0].double(), *inputs[1:])


EVERY_BACKEND = ['auto', *(s.name for s in ops.explain() if s.available)]
SSD_LAYERS = ('in_proj', 'conv2d', 'norm', 'out_proj')


@pytest.mark.parametrize('name', EVERY_BACKEND)
@pytest.mark.parametrize('layer', LAYERS)
def test_a_replaced_layer_counts_whole_on_every_backend(block, x, layer, name):
    setattr(block, layer, replacement(block.get_submodule(layer)))
    with ops.use_scan_backend(name):
        assert_close(output_and_gradients(block, x), [w.float() for w in law(block, x)])


@pytest.fixture
def ssd():
    torch.manual_seed(0)
    return BiSSD(16, d_state=16, headdim=16)


GRID = Layout((3, 4), [], None)


@pytest.mark.parametrize('name', EVERY_BACKEND)
@pytest.mark.parametrize('padded', [False, True])  # as on GPUs
@pytest.mark.parametrize('layer', [*SSD_LAYERS, 'circular conv2d'])
def test_a_replaced_layer_of_a_grid_mixer_counts_whole_on_every_backend(ssd, layer, padded, name, monkeypatch):
    x, conv = torch.randn(1, 12, 16), ssd.conv2d
    if layer == 'norm':
        ssd.norm = RmsNorm(32, eps=0.3)
    elif layer == 'circular conv2d':
        ssd.conv2d = nn.Conv2d(64, 64, 3, padding=1, groups=64, padding_mode='circular')
    else:
        setattr(ssd, layer, replacement(conv if layer == 'conv2d' else ssd.get_submodule(layer)))
    monkeypatch.setattr(bissd, '_pads_rows', lambda x: padded)
    with ops.use_scan_backend(name):
        assert_close(output_and_gradients(ssd, x, GRID), [w.float() for w in law(ssd, x, GRID)])


def test_what_comes_in_float32_is_projected_in_the_dtype_of_autocast(ssd, backend):
    class InFloat32(nn.Linear):
        def forward(self, x):
            with torch.autocast('cpu', enabled=False):
                return super().forward(x)

    ssd.in_proj = InFloat32(16, ssd.in_proj.out_features)
    with torch.autocast('cpu', torch.bfloat16):
        assert ssd(torch.randn(1, 12, 16), GRID).dtype == torch.bfloat16


def test_hooks_on_all_modules_see_every_layer(block, x, backend):
    wanted, seen = block(x), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        torch.testing.assert_close(block(x), wanted)
    finally:
        handle.remove()
    assert {block.get_submodule(name) for name in LAYERS} <= set(seen)


class Adapter(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.change = layer, nn.Parameter(torch.ones(()))

    weight = property(lambda self: self.layer.weight)
    bias = property(lambda self: self.layer.bias)

    def forward(self, x):
        return self.layer(x) + self.change


@every_layer
def test_an_adapter_acts_and_learns(block, x, name, backend):
    plain, adapter = block(x), Adapter(block.get_submodule(name))
    setattr(block, name, adapter)
    y = block(x)
    y.square().sum().backward()
    assert not torch.allclose(y, plain) and adapter.change.grad.abs() > 0


@every_layer
def test_a_replaced_forward_is_called(block, x, name, backend):
    plain, layer = block(x), block.get_submodule(name)
    forward = layer.forward
    layer.forward = lambda tokens: 2 * forward(tokens)
    assert not torch.allclose(block(x), plain)


WAYS = {
    'prune': lambda layer: prune.l1_unstructured(layer, 'weight', amount=0.5),
    'hooked weight_norm': hooked_weight_norm,
    'weight_norm': nn.utils.parametrizations.weight_norm,
    'spectral_norm': nn.utils.parametrizations.spectral_norm,
}


@pytest.mark.filterwarnings('ignore::FutureWarning')
@pytest.mark.parametrize('way', WAYS)
@every_layer
def test_weights_that_are_computed_stay_fresh_and_learn(block, x, name, way, backend):
    """Against the same block whose layer got the computed weight as its own."""
    layer = block.get_submodule(name)
    WAYS[way](layer)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        block(x).square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in layer.parameters())
        optimizer.step()
    torch.manual_seed(0)
    frozen = BiMamba(16, proj_bias=True)
    block.eval()
    frozen.load_state_dict({k: v for k, v in block.state_dict().items() if not k.startswith(name + '.')}, strict=False)
    layer(torch.zeros(1, layer.weight.shape[0], 9) if 'conv' in name else torch.zeros(1, layer.weight.shape[1]))
    with torch.no_grad():
        frozen.get_submodule(name).weight.copy_(layer.weight)
        frozen.get_submodule(name).bias.copy_(layer.bias) if layer.bias is not None else None
        torch.testing.assert_close(block(x), frozen(x), rtol=1e-4, atol=1e-5)


class Int8(torch.Tensor):
    """Rows of int8 with a scale each, as torchao has them: F.linear knows them, a kernel does not."""

    @staticmethod
    def __new__(cls, rows, scale):
        return torch.Tensor._make_wrapper_subclass(cls, rows.shape, dtype=scale.dtype)

    def __init__(self, rows, scale):
        self.rows, self.scale = rows, scale

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            x, weight, *bias = args
            return function(x, weight.rows.to(weight.scale.dtype) * weight.scale, *bias, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].rows, args[0].scale)
        raise NotImplementedError(f'{function} of a quantized weight')


def test_weights_of_another_class_are_left_to_their_layer(block, x, backend):
    wanted = block(x).detach()
    for name in LAYERS:
        layer = block.get_submodule(name)
        if isinstance(layer, nn.Linear):
            scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
            rows = (layer.weight.detach() / scale).round().to(torch.int8)
            layer.weight = nn.Parameter(Int8(rows, scale), requires_grad=False)
    assert (block(x) - wanted).abs().max() < 0.05 * wanted.abs().max()


@pytest.mark.parametrize('scan', ['shared', 'forward'])
def test_a_convolution_of_other_scans_is_called_too(scan, x, backend):
    block = BiMamba(16, scan=scan)
    plain = block(x)
    handle = block.conv1d.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(block(x), plain, rtol=1e-4, atol=1e-5)
    handle.remove()
    block.conv1d.register_forward_hook(lambda module, args, out: 2 * out)
    assert not torch.allclose(block(x), plain)


def test_one_wrapped_step_size_projection_leaves_the_other_its_bias(block, x):
    """The forward direction's bias is in the called layer, the backward one's is the scan's to add."""
    wanted = block(x)
    block.dt_proj.register_forward_hook(lambda *_: None)
    for name in BACKENDS:
        with ops.use_scan_backend(name):
            torch.testing.assert_close(block(x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings('ignore')
def test_tracing_and_copying_take_plain_layers_for_plain(block, x):
    assert all(is_plain(block.get_submodule(name)) for name in LAYERS)
    assert is_plain(copy.deepcopy(block).conv1d)
    program = torch.export.export(block.eval(), (x,))
    assert not any('conv1d' in str(node.target) for node in program.graph.nodes if node.op == 'call_function')


@pytest.mark.skipif(not torch.distributed.is_available(), reason='needs torch.distributed')
@pytest.mark.skipif(OLD, reason='torch 2.6 shards on no CPU')
def test_layers_sharded_one_by_one(block, x, tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    wanted = output_and_gradients(block, x)
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        mesh = init_device_mesh('cpu', (1,))
        for name in LAYERS:
            fully_shard(block.get_submodule(name), mesh=mesh)
        fully_shard(block, mesh=mesh)
        y, *gradients = output_and_gradients(block, x)
        assert_close([y, *(g.full_tensor() for g in gradients)], wanted)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize('other', [dict(padding=1), dict(dilation=2, padding=2), dict(stride=2), dict(groups=3)])
def test_another_convolution_cuts_the_patches(other):
    embed = PatchEmbed(12, 4, None, 3, 6)
    embed.proj = nn.Conv2d(3, 6, 4, **{'stride': 4, **other})
    images = torch.randn(2, 3, 12, 12)
    assert torch.equal(embed(images), embed.proj(images).flatten(2).transpose(1, 2))


@pytest.mark.skipif(OLD, reason='torch 2.6 does not see a forward that is set after compilation')
@pytest.mark.parametrize('path', ['patch_embed.proj', 'blocks.0.mixer.conv1d', 'blocks.0.mixer.out_proj'])
def test_a_forward_that_is_wrapped_after_compilation_is_called(path):
    model = timm.create_model('vim_nano_patch4_32', depth=1, embed_dim=32, img_size=16).eval()
    images = torch.randn(2, 3, 16, 16)
    compiled = torch.compile(model, backend='eager')
    with torch.no_grad():
        before = compiled(images)
        layer = model.get_submodule(path)
        layer.forward = lambda x, call=layer.forward: 2 * call(x)
        torch.testing.assert_close(compiled(images), model(images))
    assert not torch.allclose(model(images), before)
