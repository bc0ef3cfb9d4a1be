"""What the parts of `benchmarks.gpu_check` tell it: lines of JSON, those before a part is killed too."""

import json
from typing import Any

MARK = "RESULT "


def send(kind: str, **facts: Any) -> None:
    print(MARK + json.dumps({"kind": kind, **facts}), flush=True)


def received(text: str) -> list[dict[str, Any]]:
    """The messages in what a part has printed. A line that was cut off is no message."""
    found = []
    for line in text.splitlines():
        _, mark, content = line.partition(MARK)  # behind a warning without a line's end, perhaps
        try:
            message = json.loads(content) if mark else None
        except ValueError:
            continue
        if isinstance(message, dict) and "kind" in message:
            found.append(message)
    return found
