"""The tests that tests/README.md names for the reported faults exist."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parents[1]


def _rows() -> list[str]:
    table = (TESTS / "README.md").read_text(encoding="utf-8").split("\n|---|---|---|\n")[1]
    return table.strip().splitlines()


def test_each_reported_fault_has_tests_that_exist() -> None:
    rows = _rows()
    assert len(rows) > 40
    texts: dict[str, str] = {}
    functions: dict[str, set[str]] = {}
    missing = []
    for row in rows:
        named = re.findall(r"`tests/([\w/]+\.py)::(\w+)`(?: \((.*?)\))?", row)
        assert named, f"no test in the row {row}"
        assert len(named) == row.count("`tests/"), f"not path::name in the row {row}"
        for file, name, sections in named:
            if file not in texts:
                path = TESTS / file
                texts[file] = path.read_text(encoding="utf-8") if path.exists() else ""
                nodes = ast.walk(ast.parse(texts[file]))
                functions[file] = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
            if name not in functions[file]:
                missing.append(f"tests/{file}::{name}")
            missing += [f"{s} in tests/{file}" for s in re.findall(r"\*(.*?)\*", sections) if s not in texts[file]]
    assert not missing


def test_each_reported_fault_has_one_row() -> None:
    numbers = [int(re.match(r"\| (\d+)", row)[1]) for row in _rows()]
    assert numbers == sorted(set(numbers))
