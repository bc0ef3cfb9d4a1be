"""The fixture `allocated`: what layers allocate on the device."""

import pytest

from xpnet.backends import Backend


@pytest.fixture
def allocated(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the arrays that the backend has allocated since the test began, or since it cleared this list."""
    shapes, empty = [], backend.empty
    monkeypatch.setattr(backend, "empty", lambda shape, dtype: shapes.append(tuple(shape)) or empty(shape, dtype))
    return shapes
