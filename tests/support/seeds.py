"""How many random cases run: few in every session, more in `nox -s tests-slow`, most in `python -m reliability`."""

import os

import pytest


def seeds(always: int, count: int) -> list:
    """range(count), of which the first `always` run in every session. XPNET_RANDOM_CASES multiplies `count`."""
    count = round(count * float(os.environ.get("XPNET_RANDOM_CASES", "1")))
    return [*range(always), *(pytest.param(seed, marks=pytest.mark.sweep) for seed in range(always, count))]
