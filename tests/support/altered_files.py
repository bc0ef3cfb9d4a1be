"""Model files and checkpoints taken apart, so that they can be altered and signed again."""

import copy
import json

import safetensors
import safetensors.numpy

from xpnet.training import model_files

#: What each value of the JSON texts becomes.
VALUES = [None, True, "text", "", -1, -1.5, 0, 0.5, 7, 1e300, 10**30, float("nan"), float("inf"), [], {}, [[1]],
          {"a": {"b": 1}}, [None], ["text"]]  # fmt: skip
DELETED = object()


class File:
    """A file taken apart: its arrays, its JSON texts as values, and its other texts.

    signed: whether the checksum in it was right.
    """

    def __init__(self, content):
        """content: the bytes of a file that is valid as a safetensors file and has a checksum."""
        self.arrays = safetensors.numpy.load(content)
        texts = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        self.signed = texts.pop("sha256") == model_files._digest(self.arrays, texts)
        self.values = {name: _json(texts.pop(name)) for name in ("training", "architecture") if name in texts}
        self.texts = texts

    def content(self):
        """The bytes of the file with the right checksum. A text in place of values is taken as it is."""
        texts = self.texts | {n: v if isinstance(v, str) else json.dumps(v) for n, v in self.values.items()}
        signed = {**texts, "sha256": model_files._digest(self.arrays, texts)}
        return safetensors.numpy.save(self.arrays, metadata=signed)

    def write(self, path):
        path.write_bytes(self.content())


def _json(text):
    """The value of a JSON text, or the text itself if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def places(value, path=()):
    """The path of each value in nested lists and dicts."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def value_at(value, place):
    for key in place:
        value = value[key]
    return value


def with_value(file, place, new):
    """A copy of the file with another value at this place."""
    changed = copy.copy(file)
    changed.values = copy.deepcopy(file.values)
    target = value_at(changed.values, place[:-1])
    if new is DELETED:
        del target[place[-1]]
    else:
        target[place[-1]] = new
    return changed
