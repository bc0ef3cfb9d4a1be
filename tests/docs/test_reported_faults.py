"""The tests that tests/README.md names for the reported faults exist."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parents[1]


def _faults() -> list[str]:
    """The items of the list, each with its number, its text and its tests."""
    faults = re.split(r"\n- \*\*", (TESTS / "README.md").read_text(encoding="utf-8"))[1:]
    assert len(faults) > 40
    return faults


def test_each_reported_fault_has_tests_that_exist() -> None:
    texts: dict[str, str] = {}
    functions: dict[str, set[str]] = {}
    missing = []
    for fault in _faults():
        named = re.findall(r"`tests/([\w/]+\.py)::(\w+)`(?:\s+\((.*?)\))?", fault)
        assert named, f"no test of the fault {fault}"
        assert len(named) == fault.count("\n  - "), f"not path::name for the fault {fault}"
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


def test_each_reported_fault_has_one_item() -> None:
    numbers = [int(re.match(r"\d+", fault)[0]) for fault in _faults()]
    assert numbers == sorted(set(numbers))
