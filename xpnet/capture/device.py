"""TracedDevice: what a backend does on any device while a step is traced."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from xpnet.backends import Array, Backend, DType
from xpnet.backends.base import Device
from xpnet.backends.step_numbers import StepNumber
from xpnet.capture.trace import Trace
from xpnet.errors import CaptureError


class StepPosition:
    """The number of a step as part of the key of its noise. Only the operators of noise can use it."""

    def __init__(self, number: StepNumber) -> None:
        self.number = number

    def _refuse(self, *_: Any) -> NoReturn:
        raise CaptureError("a layer reads the number of the step")

    __int__ = __index__ = __float__ = __bool__ = __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _refuse
    __hash__ = __str__ = _refuse


class TracedDevice(Backend):
    """A backend whose arrays are traced. It computes what the backend `real` does."""

    real: Any
    trace: Trace

    def __getattribute__(self, name: str) -> Any:
        """In other threads, and after the trace, what the real backend has."""
        own = object.__getattribute__(self, "__dict__")
        if "trace" in own and not own["trace"].active and name not in ("real", "__dict__", "__class__"):
            return getattr(own["real"], name)
        return object.__getattribute__(self, name)

    def empty(self, shape: Sequence[int], dtype: DType) -> Array:
        return self.trace.own(self.real.empty(shape, dtype))

    def zeros(self, shape: Sequence[int], dtype: DType) -> Array:
        zeros = self.empty(shape, dtype)
        zeros.fill(0)
        return zeros

    def to_numpy(self, a: Any) -> NoReturn:
        raise CaptureError("the step reads values on the host")

    def refuse_capture(self, reason: str, *values: object) -> None:
        raise CaptureError(reason % values)

    def random_bits(self, key: Sequence[Any], rows: int, columns: int, first_row: int = 0) -> Array:
        return self.trace.operator(_noise, (self.real.random_bits, *_parts(key), rows, columns, first_row), {})

    def dropout_mask(self, key: Sequence[Any], rate: float, out: Array, first_row: int = 0) -> Array:
        return self.trace.operator(_mask, (self.real.dropout_mask, *_parts(key), rate, out, first_row), {})


def _parts(key: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(map(number_of, key))


def number_of(part: Any) -> Any:
    """The number of the step in place of its position in a key."""
    return part.number if isinstance(part, StepPosition) else part


def _noise(random_bits: Any, seed: int, layer: int, step: int, rows: int, columns: int, first_row: int) -> Array:
    return random_bits((seed, layer, step), rows, columns, first_row)


def _mask(dropout_mask: Any, seed: int, layer: int, step: int, rate: float, out: Array, first_row: int) -> Array:
    return dropout_mask((seed, layer, step), rate, out, first_row)


#: The functions whose calls have the number of the step as an argument, which is only part of a key.
NOISE = (_noise, _mask)


def methods_of(kind: type) -> dict[str, Callable[..., Any]]:
    """The public methods of a class, by name."""
    members = inspect.getmembers(kind, inspect.isfunction)
    return {name: member for name, member in members if not name.startswith("_")}


def operators_of(backend: type) -> list[str]:
    """The names of the operators of a backend: its public methods, without those of the device."""
    return [name for name in methods_of(backend) if not hasattr(Device, name) and name != "loops"]
