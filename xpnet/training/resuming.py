"""Settings that must be equal in a checkpoint and the run that resumes from it, and on all ranks; and Rollback."""

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy

from xpnet.distributed.process_group import ProcessGroup
from xpnet.errors import ArgumentError, DistributedError
from xpnet.layers.containers import Container


class Settings(NamedTuple):
    """What must be equal in a run and the one that it resumes from.

    model, training: always.  batches: if the checkpoint was written within an epoch.  environment: for the results to
    be equal bit for bit.
    """

    model: dict[str, Any]
    training: dict[str, str]
    batches: dict[str, Any]
    environment: dict[str, str]


class Rollback:
    """A copy, on the host, of what `fit` and a checkpoint change in a model before the first step."""

    def __init__(self, model: Container, state: Any) -> None:
        store, backend = model.context.store, model.backend
        optimizer, scale = getattr(state, "optimizer_state", None), getattr(state, "loss_scale", None)
        objects = [o for o in (model, model.context, state, optimizer) if o is not None]
        arrays = [store.values, *(buffer.value for buffer in store.buffers)]
        arrays += [] if optimizer is None else optimizer.slots.values()
        arrays += [] if scale is None else [scale.state, scale.gate]
        self._backend, self._lock = backend, store.guard.lock
        self._attributes = [(o, dict(vars(o))) for o in objects]
        self._arrays = [(array, numpy.array(backend.to_numpy(array))) for array in arrays]
        self._trainable = [(parameter, parameter.trainable) for parameter in model.parameters]

    def restore(self) -> None:
        """Write the copy back into the model."""
        with self._lock:  # another thread may predict
            for o, attributes in self._attributes:
                vars(o).update(attributes)
                for name in vars(o).keys() - attributes.keys():
                    delattr(o, name)
            for array, copy in self._arrays:
                array[...] = self._backend.asarray(copy)
            for parameter, trainable in self._trainable:
                parameter.trainable = trainable


def description(value: Any) -> str:
    """repr(value) without memory addresses, which differ between processes."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def refuse_another_run(path: Any, own: Settings, architecture: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Raise ArgumentError if a checkpoint, with this architecture and these values, is from another run."""
    for name, value in json.loads(json.dumps(own.model)).items():
        if name != "frozen" and value != architecture.get(name):  # callbacks may freeze layers during training
            raise ArgumentError(
                f"{path}: the checkpoint is from another model: {name} is {architecture.get(name)!r} "
                f"there and {value!r} here. Make the same model, or load only its weights with xpnet.load."
            )
    for name, text in own.training.items():
        if text != values["what"][name]:
            raise ArgumentError(
                f"{path}: the checkpoint is from a fit with {name}={values['what'][name]}, and this one has {text}. "
                "Pass the same, or load only its weights with xpnet.load and start afresh."
            )
    for name, value in own.batches.items():
        if values["under_way"] and value != values["batches"][name]:
            raise ArgumentError(
                f"{path}: the checkpoint was written within an epoch with {name}={values['batches'][name]}, which "
                f"cannot be finished with {value}."
            )


def different_environment(own: Settings, values: Mapping[str, Any]) -> list[str]:
    """["NumPy was '2.1' and is '2.2'", …]: the reasons why a resumed run will differ by rounding."""
    before = {"ranks": "1", **values["environment"]}
    return [
        f"{name} was {before.get(name)!r} and is {now!r}"
        for name, now in own.environment.items()
        if now != before.get(name)
    ]


def refuse_unequal_settings(group: ProcessGroup, own: Mapping[str, Any]) -> None:
    """Raise DistributedError on all ranks if their models, data or arguments, by name, are different."""
    settings = group.all_gather({name: str(value) for name, value in own.items()})
    for rank, other in enumerate(settings):
        for name, value in other.items():
            if value != settings[0][name]:
                raise DistributedError(
                    f"rank {rank} has {name} = {value}, but rank 0 has {settings[0][name]}: give every rank the same."
                )
