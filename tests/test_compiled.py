"""torch.compile keeps the kernels: a compiled model runs on the operators that the eager one runs on."""

import pytest
import timm
import torch

import vim_timm  # noqa: F401  registers the models
from vim_timm import ops

PRODUCTS = {'cpu_linear', 'cpu_gated_linear', 'cpu_swiglu'}  # torch's on some machines


def operators_of(model, images, learns=False):
    """Names of this package's operators, but products, in the graph that Dynamo makes of a model, and its result."""
    found = set()

    def look(graph, inputs):
        calls = [node.target for node in graph.graph.nodes if node.op == 'call_function']
        found.update(call.name() for call in calls if isinstance(call, torch._ops.OpOverload))
        found.update(call._qualified_op_name for call in calls if isinstance(call, torch._ops.OpOverloadPacket))
        return graph.forward

    with torch.set_grad_enabled(learns):
        result = torch.compile(model, backend=look, fullgraph=True)(images)
    return {name.partition('::')[2] for name in found if name.startswith('vim_timm::')} - PRODUCTS, result


@pytest.mark.skipif(bool(ops.cpu.unavailable()), reason='the native kernel is not built')
@pytest.mark.parametrize(
    'name, arguments, operators, learns',
    [
        ('vim_nano_patch4_32', dict(), {'cpu_mixer'}, False),
        ('vim_nano_patch4_32', dict(scan='forward'), {'cpu_conv', 'cpu_scan'}, False),
        ('vim2_nano_patch4_32', dict(headdim=16), {'cpu_grid_conv', 'cpu_dual', 'cpu_gated_norm'}, False),
        ('vim2_nano_patch4_32', dict(headdim=16), {'cpu_grid_conv', 'cpu_decayed', 'cpu_gated_norm'}, True),
        ('vim2_nano_patch4_32', dict(headdim=16, rope=True), {'cpu_dual'}, False),
    ],
)
def test_compiled_models_call_the_cpu_kernel(name, arguments, operators, learns):
    model = timm.create_model(name, depth=2, embed_dim=32, img_size=16, **arguments).eval()
    images = torch.randn(2, 3, 16, 16)
    found, result = operators_of(model, images, learns)
    assert found == operators
    torch.testing.assert_close(result, model(images))
