"""erf and erfc, which neither NumPy nor CuPy's core has.

The rational approximations are those of W. J. Cody, "Rational Chebyshev approximations for the error function",
Mathematics of Computation 23 (1969), as his program CALERF arranges them: one for |x| ≤ 15/32, one up to 4, one beyond.
"""

import math
from collections.abc import Sequence
from typing import Any

from xpnet.backends.arrays import Array
from xpnet.backends.base import Device

_SMALL = 0.46875
_LARGE = 4.0
_UNDERFLOW = 28.0  # from here on, erfc is 0 in float64 too

# Coefficients of rational functions, highest power first.
# fmt: off
_SMALL_NUMERATOR = (
    1.85777706184603153e-1, 3.16112374387056560e00, 1.13864154151050156e02, 3.77485237685302021e02,
    3.20937758913846947e03,
)
_SMALL_DENOMINATOR = (
    1.0, 2.36012909523441209e01, 2.44024637934444173e02, 1.28261652607737228e03, 2.84423683343917062e03,
)
_MIDDLE_NUMERATOR = (
    2.15311535474403846e-8, 5.64188496988670089e-1, 8.88314979438837594e00, 6.61191906371416295e01,
    2.98635138197400131e02, 8.81952221241769090e02, 1.71204761263407058e03, 2.05107837782607147e03,
    1.23033935479799725e03,
)
_MIDDLE_DENOMINATOR = (
    1.0, 1.57449261107098347e01, 1.17693950891312499e02, 5.37181101862009858e02, 1.62138957456669019e03,
    3.29079923573345963e03, 4.36261909014324716e03, 3.43936767414372164e03, 1.23033935480374942e03,
)
_LARGE_NUMERATOR = (
    1.63153871373020978e-2, 3.05326634961232344e-1, 3.60344899949804439e-1, 1.25781726111229246e-1,
    1.60837851487422766e-2, 6.58749161529837803e-4,
)
_LARGE_DENOMINATOR = (
    1.0, 2.56852019228982242e00, 1.87295284992346725e00, 5.27905102951428412e-1, 6.05183413124413191e-2,
    2.33520497626869185e-3,
)
# fmt: on


class SpecialFunctions(Device):
    def erf(self, x: Array) -> Array:
        """2/√π ∫₀ˣ e^-t² dt, elementwise, in x's floating-point dtype, exact to a few units in the last place.

        On a GPU, float32 numbers of magnitude below 1.2e-38 (subnormal) are treated as 0, in x and in the result.
        """
        xp, magnitude = self.xp, self.xp.abs(x)
        tail = xp.copysign(1.0 - _erfc_of_magnitude(xp, magnitude), x)
        return xp.where(magnitude <= _SMALL, _erf_near_zero(xp, x), tail)

    def erfc(self, x: Array) -> Array:
        """1 - erf(x), elementwise, without losing the digits of a small result.

        On a GPU, float32 results of magnitude below 1.2e-38 are 0.
        """
        xp, magnitude = self.xp, self.xp.abs(x)
        tail = _erfc_of_magnitude(xp, magnitude)
        tail = xp.where(x < 0, 2.0 - tail, tail)
        return xp.where(magnitude <= _SMALL, 1.0 - _erf_near_zero(xp, x), tail)

    def gelu(self, x: Array, out: Array, slope: Array) -> Array:
        """out = x Φ(x) and its derivative, slope = Φ(x) + x φ(x), with the standard normal Φ and φ. Returns out."""
        xp = self.xp
        phi = 0.5 * self.erfc(x * -math.sqrt(0.5))  # 1 + erf would lose all digits for large negative x
        near = xp.clip(x, -40.0, 40.0)  # beyond them φ is 0
        xp.multiply(near, xp.exp(-0.5 * near * near), out=slope)
        slope *= 1.0 / math.sqrt(2.0 * math.pi)
        slope += phi
        return xp.multiply(xp.maximum(x, -40.0), phi, out=out)


def _erf_near_zero(xp: Any, x: Any) -> Any:
    x = xp.clip(x, -_SMALL, _SMALL)
    square = x * x
    return x * (_polynomial(_SMALL_NUMERATOR, square) / _polynomial(_SMALL_DENOMINATOR, square))


def _erfc_of_magnitude(xp: Any, y: Any) -> Any:
    """erfc(y) for y ≥ 15/32. For smaller y the result is not defined."""
    y = xp.clip(y, _SMALL, _UNDERFLOW)
    middle_y = xp.minimum(y, _LARGE)
    middle = _polynomial(_MIDDLE_NUMERATOR, middle_y) / _polynomial(_MIDDLE_DENOMINATOR, middle_y)
    large_y = xp.maximum(y, _LARGE)
    inverse = 1.0 / (large_y * large_y)
    large = inverse * (_polynomial(_LARGE_NUMERATOR, inverse) / _polynomial(_LARGE_DENOMINATOR, inverse))
    large = (1.0 / math.sqrt(math.pi) - large) / large_y
    # e^-y² as two factors, because rounding y² would lose digits: coarse is y rounded down to a multiple of 1/16.
    coarse = xp.floor(y * 16.0) * 0.0625
    exponential = xp.exp(-coarse * coarse) * xp.exp(-(y - coarse) * (y + coarse))
    return exponential * xp.where(y <= _LARGE, middle, large)


def _polynomial(coefficients: Sequence[float], x: Any) -> Any:
    """Horner's rule. The coefficients are Python floats, which keep x's dtype."""
    value = coefficients[0] * x
    for coefficient in coefficients[1:-1]:
        value += coefficient
        value *= x
    value += coefficients[-1]
    return value
