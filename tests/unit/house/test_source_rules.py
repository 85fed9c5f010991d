"""Rules of the house that no linter knows, checked on the source itself."""

import ast
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PACKAGES = ("phalanx", "coordinator", "worker", "storage")

SERIALISERS_THAT_RUN_CODE = {
    "cloudpickle",
    "cPickle",
    "dill",
    "joblib",
    "jsonpickle",
    "marshal",
    "pickle",
    "shelve",
}
CODE_RUNNERS = {"compile", "eval", "exec", "pandas.read_pickle", "torch.load"}
# multiprocessing pickles whatever crosses its processes; these parts of it do not.
MULTIPROCESSING_ALLOWED = {"shared_memory", "resource_tracker"}

# These calls are open as long as a member or a watcher lives; they are ended by it, not by a clock.
STREAMS = {"Exchange", "ReadJobLogs", "Session", "WatchJob"}


# Nouns that follow numbers in messages; bytes and seconds are units, and stay as they are.
COUNTED = re.compile(
    r" (?:evaluation |good |more |wrong )?(?:attempts|blobs|checkpoints|chunks|classes|columns|"
    r"connections|evaluations|examples|failures|features|fields|files|jobs|lines|nodes|predictions|ranges|rows|"
    r"shards|slots|steps|submissions|targets|times|vectors|workers)(?![\w/])"
)


def _sources(*folders: str) -> list[Path]:
    found = [
        path
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*.py"))
        if "phalanx/v1" not in path.as_posix()
    ]
    assert found
    return found


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _found(rule: Callable[[Iterator[ast.AST]], Iterator[str]], *folders: str) -> list[str]:
    """Return what ``rule`` finds in the sources of some folders."""
    return [
        f"{_name(path)}: {finding}"
        for path in _sources(*folders)
        for finding in rule(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    ]


def _dotted(node: ast.AST) -> str:
    """Return a name with the names of its attributes; empty: it is something else."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(names)]) if isinstance(node, ast.Name) else ""


def _dangers(tree: Iterator[ast.AST]) -> Iterator[str]:
    """Say what in a module could run code out of data."""
    for node in tree:
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            modules = []
        for module in modules:
            first, _, rest = module.partition(".")
            if first in SERIALISERS_THAT_RUN_CODE:
                yield f"line {node.lineno}: imports {module}"  # type: ignore[attr-defined]
            if first == "multiprocessing" and rest.partition(".")[0] not in MULTIPROCESSING_ALLOWED:
                yield f"line {node.lineno}: imports {module}"  # type: ignore[attr-defined]
        if isinstance(node, ast.Call):
            called = _dotted(node.func)
            if called in CODE_RUNNERS:
                yield f"line {node.lineno}: calls {called}"
            if any(
                keyword.arg == "allow_pickle"
                and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
                for keyword in node.keywords
            ):
                yield f"line {node.lineno}: allows pickle"


def test_no_data_is_ever_run_as_code() -> None:
    assert _found(_dangers, *PACKAGES) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "from joblib import load",
        "import multiprocessing",
        "from multiprocessing import Queue",
        "import multiprocessing.connection",
        "eval('1')",
        "exec(text)",
        "torch.load(path)",
        "numpy.load(path, allow_pickle=True)",
        "numpy.load(path, allow_pickle=flag)",
    ],
)
def test_each_danger_is_seen(source: str) -> None:
    assert list(_dangers(ast.walk(ast.parse(source)))) != []


@pytest.mark.parametrize(
    "source",
    [
        "from multiprocessing import shared_memory",
        "numpy.load(path, allow_pickle=False)",
        "re.compile('x')",
        "model.eval()",
    ],
)
def test_harmless_look_alikes_pass(source: str) -> None:
    assert list(_dangers(ast.walk(ast.parse(source)))) == []


def _rpc_methods() -> set[str]:
    import importlib

    names = set()
    for path in sorted((ROOT / "phalanx/v1").glob("*_service_pb2.py")):
        module = importlib.import_module(f"phalanx.v1.{path.stem}")
        for service in module.DESCRIPTOR.services_by_name.values():
            names.update(method.name for method in service.methods)
    return names


RPC_METHODS = _rpc_methods()


def _calls_without_deadline(tree: Iterator[ast.AST]) -> Iterator[str]:
    """Say which calls of a stub's methods have no ``timeout``.

    A method handed to a helper (``call_with_retry(stub.GetJob, …)``) is not called here. Two
    positional arguments are a servicer calling a servicer: a request and a context.
    """
    for node in tree:
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in RPC_METHODS - STREAMS
            and len(node.args) < 2
            and not any(keyword.arg in ("timeout", None) for keyword in node.keywords)
        ):
            yield f"line {node.lineno}: {ast.unparse(node.func)}"


def test_every_call_has_a_deadline() -> None:
    assert _found(_calls_without_deadline, *PACKAGES, "bench", "examples") == []


def test_a_call_without_deadline_is_seen() -> None:
    wrong = "stub.GetJob(request)"
    right = "stub.GetJob(request, timeout=5); call_with_retry(stub.GetJob, request, timeout_s=1)"
    assert list(_calls_without_deadline(ast.walk(ast.parse(wrong)))) != []
    assert list(_calls_without_deadline(ast.walk(ast.parse(right)))) == []


def test_streams_without_deadline_are_methods_that_exist() -> None:
    assert STREAMS <= RPC_METHODS


CLOCKS = {"monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "time", "time_ns"}


def _times_in_tests(tree: Iterator[ast.AST]) -> Iterator[str]:
    """Say where a test sleeps without looking for anything, and where it asserts how long it took.

    A sleep inside ``while`` is between two looks, ``sleep(0)`` lets others go on, and a deadline is
    compared with the clock as it is; a duration is a difference of two of its readings.
    """
    nodes = list(tree)
    looped = {
        inner
        for node in nodes
        if isinstance(node, ast.While)
        for inner in ast.walk(node)
        if isinstance(inner, ast.Call)
    }
    for node in nodes:
        if isinstance(node, ast.Call) and _dotted(node.func) in ("time.sleep", "asyncio.sleep"):
            if node not in looped and ast.unparse(node.args[0]) != "0":
                yield f"line {node.lineno}: sleeps"
        elif isinstance(node, ast.Assert):
            for inner in ast.walk(node.test):
                if isinstance(inner, ast.BinOp) and isinstance(inner.op, ast.Sub):
                    calls = [each for each in ast.walk(inner) if isinstance(each, ast.Call)]
                    if any(ast.unparse(each.func).rpartition(".")[2] in CLOCKS for each in calls):
                        yield f"line {node.lineno}: asserts how long something took"


TIMELESS = tuple(
    f"tests/{layer}"
    for layer in ("chaos", "contract", "integration", "reference", "system", "unit")
)
"""The simulation has a clock of its own."""


def test_no_test_sleeps_or_measures_time() -> None:
    assert _found(_times_in_tests, *TIMELESS) == []


@pytest.mark.parametrize(
    "source",
    [
        "time.sleep(1)",
        "for _ in range(3):\n    await asyncio.sleep(0.1)",
        "assert time.monotonic() - began < 10",
        "assert 0 < loop.time() - began",
    ],
)
def test_sleeps_and_measured_times_are_seen(source: str) -> None:
    assert list(_times_in_tests(ast.walk(ast.parse(source)))) != []


@pytest.mark.parametrize(
    "source",
    [
        "while not done():\n    time.sleep(0.01)",
        "await asyncio.sleep(0)",
        "assert time.monotonic() < deadline_s",
    ],
)
def test_waiting_for_something_is_no_sleep(source: str) -> None:
    assert list(_times_in_tests(ast.walk(ast.parse(source)))) == []


def test_no_file_is_too_long_to_read() -> None:
    sources = _sources(*PACKAGES, "tests", "bench", "examples")
    lengths = {_name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in sources}
    assert {name: length for name, length in lengths.items() if length > 600} == {}


def test_no_package_in_tests_hides_a_shipped_one() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_every_package_is_one() -> None:
    folders = {path.parent for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert [_name(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_tells_type_checkers_that_it_is_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").exists()


def _uncounted(tree: Iterator[ast.AST]) -> Iterator[str]:
    """Say where a message puts a number before a plural that stays one when the number is 1."""
    for node in tree:
        if not isinstance(node, ast.JoinedStr):
            continue
        for value, text in itertools.pairwise(node.values):
            if not isinstance(value, ast.FormattedValue) or not isinstance(text, ast.Constant):
                continue
            shown = ast.unparse(value.value)
            # Not numbers: a quoted text, `what` and the like. Constants are larger than 1.
            text_or_constant = (
                value.conversion != -1
                or shown.endswith(("name", "_text", "what"))
                or shown.startswith("number_of(")
                or shown.rpartition(".")[2].isupper()
            )
            if not text_or_constant and COUNTED.match(text.value):
                yield f"line {value.lineno}: {{{shown}}}{text.value[:20]}"


def test_numbers_and_their_nouns_agree() -> None:
    """`number_of` writes both."""
    assert not _found(_uncounted, *PACKAGES)


def test_a_number_before_a_plural_would_be_found() -> None:
    tree = ast.parse("f'{len(found)} shards, {n} evaluation shards, {LIMIT} rows'")
    assert len(list(_uncounted(ast.walk(tree)))) == 2
