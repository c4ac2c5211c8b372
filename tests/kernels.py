"""Kernels as functions of flat operands, the form in which tests draw operands and take gradients."""

from vim_timm.ops import operands


def scan(backend):
    """`backend.scan` of the fields of `operands.Scan`."""
    return lambda *flat: backend.scan(operands.Scan.of(*flat))


def conv(backend):
    """`backend.conv` of the fields of `operands.Conv`."""
    return lambda *flat: backend.conv(operands.Conv.of(*flat))


def mixer(backend):
    """`backend.mixer` of the fields of `operands.Mixer`."""
    return lambda *flat: backend.mixer(operands.Mixer.of(*flat))
