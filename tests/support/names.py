"""Stable names for parametrized tests, and a check that every public class has an example."""

import re


def stable_repr(value):
    """repr without the addresses of functions, so that every process collects tests of the same names."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def missing_classes(module, base, examples, elsewhere=()):
    """The subclasses of `base` in the module's `__all__` that have no example and are not tested elsewhere."""
    public = [getattr(module, name) for name in module.__all__]
    required = {thing for thing in public if isinstance(thing, type) and issubclass(thing, base)}
    return required - {base, *elsewhere, *map(type, examples)}
