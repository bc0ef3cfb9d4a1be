"""Backend: a device, with every operator as a plain formula in `xp`.

The formulas use only what NumPy and CuPy share, and never read a device value back to the host. They define what
an operator computes: an operator that a device overrides must agree with its formula up to rounding.
"""

from xpnet.backends.reference.attention import AttentionOperators
from xpnet.backends.reference.convolution import ConvolutionOperators
from xpnet.backends.reference.elementwise import ElementwiseOperators
from xpnet.backends.reference.fused import FusedOperators
from xpnet.backends.reference.matmul import MatmulOperators
from xpnet.backends.reference.random import RandomOperators
from xpnet.backends.reference.recurrent import RecurrentOperators
from xpnet.backends.reference.reductions import ReductionOperators
from xpnet.backends.reference.rows import RowOperators
from xpnet.backends.reference.sequences import SequenceOperators
from xpnet.backends.reference.special import SpecialFunctions
from xpnet.backends.reference.updates import UpdateOperators
from xpnet.backends.reference.windows import WindowOperators


class Backend(
    AttentionOperators,
    ConvolutionOperators,
    FusedOperators,
    RecurrentOperators,
    RowOperators,
    ElementwiseOperators,
    MatmulOperators,
    ReductionOperators,
    WindowOperators,
    RandomOperators,
    SequenceOperators,
    SpecialFunctions,
    UpdateOperators,
):
    """A device and its array module.

    `name` is what `get_backend` takes ("cpu", "gpu", "gpu:1"), and `xp` is numpy or cupy. Each model holds its backend;
    there is no global one. `Backend(name, xp)` runs the reference formulas on any module with NumPy's functions.
    """
