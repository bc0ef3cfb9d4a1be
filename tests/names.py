"""Names of parametrised tests."""

import re


def shown(value):
    """repr, without the address of a function: so that every process collects tests of the same names."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
