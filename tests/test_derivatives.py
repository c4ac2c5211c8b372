"""Derivatives are right on a backend that has them, or refused in a sentence that names one: never zero."""

import pytest
import timm
import torch
import torch.autograd.forward_ad as forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import vim_timm  # noqa: F401  registers the models
from vim_timm import ops
from vim_timm.ops import Direction, backends
from vim_timm.ops.operands import Norm, Scan

KERNELS = [s.name for s in ops.explain() if s.available and s.name in ('cpu', 'torch')]
KINDS = {
    'bidirectional': ('vim_nano_patch4_32', {}),
    'shared': ('vim_nano_patch4_32', dict(scan='shared', class_token='head')),
    'forward': ('vim_nano_patch4_32', dict(scan='forward', class_token='none', global_pool='avg')),
    'vim2': ('vim2_nano_patch4_32', dict(headdim=16, d_state=16)),
    'hybrid': ('vim_hybrid_tiny_patch4_32', dict(num_heads=2, ssm='mamba')),
    'favit': ('favit_small_patch16_224', dict(num_heads=2, patch_size=4, in_chans=3)),
}


@pytest.fixture(params=KINDS)
def model(request):
    torch.manual_seed(0)
    name, arguments = KINDS[request.param]
    return timm.create_model(name, depth=1, embed_dim=16, img_size=8, num_classes=3, **arguments).eval().double()


@pytest.fixture
def images():
    return torch.randn(2, 3, 8, 8, dtype=torch.float64)


def by_autograd(model, images):
    """The Jacobian (B, classes, ...) of each image's logits, one backward pass each."""
    images = images.clone().requires_grad_()
    with ops.use_scan_backend('reference'):
        logits = model(images)
        rows = [torch.autograd.grad(logits[:, i].sum(), images, retain_graph=True)[0] for i in range(logits.shape[1])]
    return torch.stack(rows, dim=1)


def test_forward_mode(model, images):
    tangent = torch.randn_like(images)
    expected = (by_autograd(model, images) * tangent[:, None]).flatten(2).sum(-1)
    torch.testing.assert_close(jvp(model, (images,), (tangent,))[1], expected)
    for context in (torch.enable_grad, torch.no_grad):
        with context(), forward_ad.dual_level():
            logits = model(forward_ad.make_dual(images, tangent))
            torch.testing.assert_close(forward_ad.unpack_dual(logits).tangent, expected)


def test_jacobians(model, images):
    expected = by_autograd(model, images)
    for transform in (jacrev, jacfwd):
        found = vmap(transform(lambda image: model(image[None])[0]))(images)
        torch.testing.assert_close(found, expected)


def test_gradients_of_each_sample(model, images):
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values, image):
        return functional_call(model, values, (image[None],)).square().sum()

    found = vmap(grad(loss), (None, 0))(parameters, images)
    for i, image in enumerate(images):
        model.zero_grad()
        model(image[None]).square().sum().backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(found[name][i], p.grad, msg=name)


def test_hessians(model, images):
    def logit(pixels):
        return model(pixels.view(1, 3, 8, 8))[0, 0]

    pixels = images[0].flatten()
    with ops.use_scan_backend('reference'):
        expected = torch.autograd.functional.hessian(logit, pixels)
    assert expected.any()
    torch.testing.assert_close(hessian(logit)(pixels), expected)
    torch.testing.assert_close(vmap(hessian(logit))(images.flatten(1))[0], expected)


def test_transforms_under_compile(images):
    torch.manual_seed(0)
    model = timm.create_model('vim_nano_patch4_32', depth=1, embed_dim=16, img_size=8).eval().double()
    tangent = torch.randn_like(images)

    def slope(x):
        return jvp(model, (x,), (tangent,))[1]

    compiled = torch.compile(slope, backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(compiled(images), slope(images))


def scan_operands():
    u, delta, B, C = (torch.randn(1, 5, size) for size in (4, 4, 3, 3))
    return Scan(Direction(u, delta, torch.randn(4, 3), B, C, torch.randn(4), None))


@pytest.mark.parametrize('name', KERNELS)
def test_a_forced_kernel_names_the_backend_that_has_the_derivative(name):
    torch.manual_seed(0)
    model = timm.create_model('vim_nano_patch4_32', depth=1, embed_dim=16, img_size=8).eval()
    images = torch.randn(1, 3, 8, 8)
    with ops.use_scan_backend(name):
        with pytest.raises(RuntimeError, match="use_scan_backend\\('export'\\)"):
            jvp(model, (images,), (images,))
        with pytest.raises(RuntimeError, match="use_scan_backend\\('export'\\)"):
            torch.autograd.functional.hessian(lambda x: model(x)[0, 0], images)


@pytest.mark.parametrize('name', ['auto', 'export'])
def test_several_gradients_at_once_are_right_or_refused(name, model, images):
    expected = by_autograd(model, images)[0].float()
    model, image = model.float(), images[0].float()
    with ops.use_scan_backend(name):
        try:
            found = torch.autograd.functional.jacobian(lambda image: model(image[None])[0], image, vectorize=True)
        except RuntimeError as error:
            assert name == 'auto' and "use_scan_backend('export')" in str(error)
        else:
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize('name', KERNELS)
def test_a_kernel_that_is_called_past_the_table_refuses_too(name):
    """Where no gradient is asked for, its operator would take dual numbers for plain ones: a slope of zero."""
    scan, operands = backends.TABLE['scan'][name].run, scan_operands()

    def call(u):
        return scan(operands._replace(forward=operands.forward._replace(u=u)))

    u = operands.forward.u
    for context in (torch.enable_grad, torch.no_grad):
        with context(), pytest.raises(RuntimeError, match='forward mode'):
            jvp(call, (u,), (u,))
        with context(), forward_ad.dual_level(), pytest.raises(RuntimeError, match='forward mode'):
            call(forward_ad.make_dual(u, u))
    with pytest.raises(RuntimeError, match='torch.func'):
        grad(lambda u: call(u).sum())(u)


def test_the_kernel_returns_after_a_transform(images):
    operands = Norm(torch.randn(3, 4), torch.ones(4), 1e-5)
    before = backends.choose('rms_norm', operands, operands.x)
    jvp(lambda x: ops.rms_norm(x, operands.weight, operands.eps), (operands.x,), (operands.x,))
    assert backends.choose('rms_norm', operands, operands.x) == before


@pytest.mark.parametrize('name', KERNELS)
def test_a_graph_of_gradients_may_be_kept_where_no_second_derivative_is_taken(name):
    operands = scan_operands()
    u = operands.forward.u.requires_grad_()
    plain, kept = (
        torch.autograd.grad(backends.TABLE['scan'][name].run(operands).sum(), u, create_graph=graph)[0]
        for graph in (False, True)
    )
    assert torch.equal(plain, kept)
