"""Building a layer outside a model, with its own context."""

import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any

from xpnet.backends import DType, get_backend
from xpnet.concurrency.forks import held_in_forks
from xpnet.config import as_seed, float_dtype
from xpnet.errors import StateError
from xpnet.layers.context import Context, Shape
from xpnet.parameters import ParameterStore

#: Held while a layer or model is built: only one thread builds at a time.
building = held_in_forks(threading.RLock())


def standalone(build: Callable[[Any, Shape], Shape]) -> Callable[..., Shape]:
    """Decorate a layer's `build(input_shape)`, so that it can also be called outside a model.

    Then it takes `backend`, `seed` and `dtype`, and does what a model does: it makes a context and draws the initial
    values.
    """

    @functools.wraps(build)
    def wrapper(self: Any, input_shape: Any, *, backend: Any = "auto", seed: int = 0, dtype: DType = "float32") -> Any:
        with building:
            if self.is_built and self.context.store.allocated:
                raise StateError(f"this {type(self).__name__} is built already.")
            if self.is_built:  # `place` has given it a context
                return build(self, input_shape)
            device = get_backend(backend)
            store = ParameterStore(device, float_dtype(dtype))
            build_alone(self, Context(device, store, as_seed(self, seed)), input_shape)
            self.forward, self.backward = self._checked_forward, self._checked_backward
            return self.output_shape

    return wrapper


def build_alone(layer: Any, context: Context, input_shape: Any, state: Mapping[str, Any] | None = None) -> None:
    """Build a layer or model that is not part of another one. If that fails, it can be built again.

    state: {name: array} of parameters and buffers, used in place of initial values.
    """
    with building:
        try:
            with context.backend.device():
                layer.place(context, "", input_shape)
                context.store.allocate(context.seed, state)
        except BaseException:
            layer.unplace()
            raise
