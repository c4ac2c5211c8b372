"""Own B and C of each order of a block, the choice that `benchmarks.equal_time` compares and no model offers."""

import timm
import torch

import benchmarks.own_projections  # noqa: F401  registers its models
import vim_timm  # noqa: F401


def test_the_registered_mixer_without_its_fused_kernel_computes_the_same():
    shared = timm.create_model('vim2_tiny_patch4_32_shared', depth=2)
    registered = timm.create_model('vim2_tiny_patch4_32', depth=2, orders='both')
    registered.load_state_dict(shared.state_dict())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(shared(images), registered(images))


def test_own_b_and_c_that_are_alike_are_shared_ones():
    shared = timm.create_model('vim2_tiny_patch4_32_shared', depth=2)
    own = timm.create_model('vim2_tiny_patch4_32_own', depth=2)
    mixer, state = shared.blocks[0].mixer, shared.state_dict()
    for name, weight in state.items():
        if '.in_proj.' in name or '.conv2d.' in name:
            before = 2 * mixer.d_inner if '.in_proj.' in name else mixer.d_inner
            x, BC, rest = weight.split([before, 2 * mixer.d_state, len(weight) - before - 2 * mixer.d_state])
            state[name] = torch.cat([x, BC, BC, rest])
    own.load_state_dict(state)
    images = torch.randn(2, 3, 32, 32)
    y, y_own = shared(images), own(images)
    torch.testing.assert_close(y_own, y)
    y_own.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in own.blocks.parameters())
