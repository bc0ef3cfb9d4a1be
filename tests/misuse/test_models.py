"""Wrong calls of a model's methods end in an error of xpnet that says what to do, and the model still works."""

import pytest
from misuse import Misuse, Subject, check

from xpnet.errors import ShapeError

ROWS = [
    Misuse("predict_wrong_width", lambda s: s.model.predict(s.x[:, :3]), ShapeError, ("(N, 4)", "(12, 3)")),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_misuse(row, tmp_path):
    check(row, Subject(tmp_path))
