"""Precisions that a device may not have."""

import pytest


def require_precision(backend, precision):
    """Skip the test if the device cannot compute in this precision."""
    if reason := backend.precision_unavailable(precision):
        pytest.skip(reason)
