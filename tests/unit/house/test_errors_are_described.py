"""The handbook has a row for every reason, code and exit code, and none for what is gone."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from phalanx.cli.errors import EXIT_OF_CODE
from phalanx.errors import Code
from phalanx.model_failures import REASONS

ROOT = Path(__file__).parents[3]
PACKAGES = ("phalanx", "coordinator", "worker", "storage")
REASON = re.compile(r"[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)*")
NAMES_REASONS = {"reason", "code"}
FAILS = {"fail", "_fail"}


def trees() -> Iterator[ast.Module]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if "_pb2" not in path.name and "testing" not in path.parts:
                yield ast.parse(path.read_text())


def texts(node: ast.AST) -> set[str]:
    """The literals that a value may be: of a conditional both."""
    branches = [node.body, node.orelse] if isinstance(node, ast.IfExp) else [node]
    if isinstance(node, ast.BoolOp):
        branches = node.values
    return {
        each.value
        for each in branches
        if isinstance(each, ast.Constant)
        and isinstance(each.value, str)
        and REASON.fullmatch(each.value)
    }


def reasons_in(tree: ast.Module) -> set[str]:
    found, constants = set[str](), dict[str, set[str]]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            constants[node.targets[0].id] = texts(node.value)
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg in NAMES_REASONS:
            value = node.value
            found |= constants.get(value.id, set()) if isinstance(value, ast.Name) else texts(value)
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in FAILS
        ):
            found |= {text for argument in node.args for text in texts(argument)}
    return found


def described(page: str, heading: str = "") -> set[str]:
    """What stands in backticks in the first cells of the tables of a page."""
    text = (ROOT / "docs" / page).read_text()
    if heading:
        text = text.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| ")]
    return {each.strip("` ") for cell in cells for each in cell.split(",")}


@dataclass
class Found:
    """What the sources have that the handbook is about."""

    reasons: set[str] = field(default_factory=set)
    texts: set[str] = field(default_factory=set)
    exit_codes: set[int] = field(default_factory=set)


@pytest.fixture(scope="module")
def sources() -> Found:
    """Each source is parsed once, which is most of what these tests do."""
    found = Found()
    for tree in trees():
        found.reasons |= reasons_in(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.texts.add(node.value)
            elif (
                isinstance(node, ast.Assign)
                and isinstance(node.targets[0], ast.Name)
                and "EXIT" in node.targets[0].id
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, int)
            ):
                found.exit_codes.add(node.value.value)
    return found


def test_every_reason_has_a_row(sources: Found) -> None:
    found = sources.reasons
    assert {"NOT_LEADER", "PROTOCOL_VERSION", "POISON_SHARD", "LINKED_FILE_CHANGED"} <= found
    missing = found - described("ERRORS.md")
    assert not missing, f"say in docs/ERRORS.md what happened and what to do: {sorted(missing)}"


def test_the_handbook_lists_the_reasons_of_models() -> None:
    text = (ROOT / "docs" / "ERRORS.md").read_text()
    told = text.partition("## Jobs\n")[2].partition("`POISON_TASK`: ")[2].partition(". ")[0]
    assert {each.strip("`") for each in re.split(r",\s+", told)} == REASONS
    assert described("ERRORS.md") >= REASONS


def test_no_row_is_about_what_is_gone(sources: Found) -> None:
    known = {str(each) for each in Code} | sources.texts
    made = {"DISK_SLOW", "DATABASE_SLOW", "WORKER_NOT_FOUND", "DATASET_NOT_FOUND"}
    made |= {"MODEL_NOT_FOUND", "WHEEL_NOT_FOUND"}  # of a medium, or a kind, and a word
    rows = {each for each in described("ERRORS.md") if REASON.fullmatch(each)}
    assert len(rows) > 150
    assert not rows - known - made


def test_every_code_has_a_row_with_its_exit_code() -> None:
    text = (ROOT / "docs" / "ERRORS.md").read_text()
    for code in Code:
        assert f"| `{code}` | {EXIT_OF_CODE[code]} |" in text, code


def test_every_exit_code_has_a_row(sources: Found) -> None:
    ours = set(EXIT_OF_CODE.values()) | sources.exit_codes
    assert {2, 70, 74, 130} <= ours
    assert {str(each) for each in ours} <= described("OPERATIONS.md", "Exit codes")
