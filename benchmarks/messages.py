"""Messages from the parts of `benchmarks.gpu_check`: lines of JSON, which survive if a part is killed."""

import json
from typing import Any

MARK = "RESULT "


def send(kind: str, **values: Any) -> None:
    print(MARK + json.dumps({"kind": kind, **values}), flush=True)


def parse(text: str) -> list[dict[str, Any]]:
    """The messages in the output of a part. Truncated lines are ignored."""
    found = []
    for line in text.splitlines():
        _, mark, content = line.partition(MARK)  # a warning without a newline may come before
        try:
            message = json.loads(content) if mark else None
        except ValueError:
            continue
        if isinstance(message, dict) and "kind" in message:
            found.append(message)
    return found
