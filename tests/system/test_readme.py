"""What the documents say to type works."""

import ast
import contextlib
import csv
import functools
import importlib.util
import io
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import phalanx
from phalanx.cli.main import run
from phalanx.testing.arena import GUARD_S, wait_until
from phalanx.testing.datasets import REPOSITORY, classification, demo_data
from tests.system.documents import DOCUMENTS, README, blocks, commands

pytestmark = pytest.mark.slow

EXAMPLES = sorted((REPOSITORY / "examples").glob("*/job.yaml"))
PHALANX = ("-P", "-m", "phalanx.cli")
BECOME_OTHERS = {"aggregator", "coordinator", "restore", "storage", "worker"}
"""Commands that replace their process with another program."""
NAMED_MODEL = {
    "name": "fashion-forest",
    "data": {"name": "fashion", "shards": 2},
    "train": {"model": {"softmax_regression": {}}, "batch_size": 512, "stop": {"steps": 1}},
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[phalanx.LocalCluster]:
    with phalanx.LocalCluster(workers=2, slots=1) as local:
        local.data.add("fashion", demo_data())
        local.data.add("adult", *classification(2000, 8, 2), test=0.2)
        customers = REPOSITORY / "examples" / "columns" / "customers.csv"
        local.data.add("customers", customers, test=0.2)
        # A worker is ready before it has joined; a plan counts those that have.
        wait_until(lambda: len(local.workers()) == 2, "both workers to join")
        # A plan of rows through a model asks for one of that name, whatever it is.
        local.submit(NAMED_MODEL).wait(timeout_s=GUARD_S)
        yield local


def test_every_code_block_has_a_language_that_is_tested_here() -> None:
    languages = set()
    for path in DOCUMENTS:
        text = path.read_text()
        languages |= set(re.findall(r"^```(\w+)$", text, re.MULTILINE))
    assert {"sh", "yaml", "python"} <= languages
    assert languages <= {"sh", "yaml", "python", "json", "mermaid"}


@functools.cache
def options_of(*program: str) -> set[str]:
    """The options of a program of ours, by its own help, which many commands ask for."""
    return set(re.findall(r"--[a-z-]+", help_of(*program)))


def help_of(*program: str) -> str:
    if program[:3] == PHALANX and program[3] not in BECOME_OTHERS:
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):
            assert run([*program[3:], "--help"]) == 0
        return shown.getvalue()
    done = subprocess.run(
        [sys.executable, *program, "--help"],
        cwd=REPOSITORY,
        capture_output=True,
        timeout=GUARD_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.decode()


def arguments_unknown_to(program: list[str], arguments: list[str]) -> set[str]:
    """Options among the arguments that a program does not have."""
    named = {word.partition("=")[0] for word in arguments if word.startswith("--")}
    return named - options_of(*program)


@pytest.mark.parametrize(("document", "command"), commands())
def test_commands_exist(document: str, command: str) -> None:
    program, *arguments = shlex.split(command)
    if program == "phalanx":
        positions = [word for word in arguments if not word.startswith("-")]
        known = 2 if arguments[0] in {"data", "code", "models", "certs", "token"} else 1
        unknown = arguments_unknown_to([*PHALANX, *positions[:known]], arguments)
        assert not unknown, f"{document} shows {unknown} of {command}"
    elif program == "python" and arguments[0] == "-m":
        unknown = arguments_unknown_to(arguments[:2], arguments)
        assert not unknown, f"{document} shows {unknown} of {command}"
    elif program == "make":
        makefile = (REPOSITORY / "Makefile").read_text()
        assert re.search(rf"^[\w -]*\b{arguments[0]}\b[\w -]*:", makefile, re.MULTILINE), command
    elif program == "sh":
        assert (REPOSITORY / arguments[0]).is_file()
        syntax = ["sh", "-n", str(REPOSITORY / arguments[0])]
        assert subprocess.run(syntax, timeout=GUARD_S, check=False).returncode == 0
    elif program == "cd":
        assert (REPOSITORY / arguments[0]).is_dir()
    elif program in {"docker", "kubectl"}:
        # What they do with these files tests/deploy tries.
        options = {"-f", "--file", "-k"}
        named = [path for option, path in itertools.pairwise(arguments) if option in options]
        assert all((REPOSITORY / path).exists() for path in named), command
    else:
        assert program in {".", "export", "grpcurl", "pip", "python3", "umask"}, (
            f"{document}: who tests {command}?"
        )


def lacks_torch(job: str) -> bool:
    """Whether a job needs PyTorch, and it is not installed."""
    return "torch:" in job and importlib.util.find_spec("torch") is None


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_jobs_in_documents_are_accepted(
    path: Path, cluster: phalanx.LocalCluster, tmp_path: Path
) -> None:
    for text in blocks(path, "yaml"):
        (tmp_path / "job.yaml").write_text(text)
        answer = cluster.plan(tmp_path / "job.yaml")
        assert answer.plan.steps > 0
        assert answer.plan.eligible_workers == (0 if lacks_torch(text) else 2)
    for text in blocks(path, "python"):
        ast.parse(text)
    for text in blocks(path, "json"):
        assert isinstance(json.loads(text), dict)


def example_commands(path: Path) -> list[list[str]]:
    """What an example says to type, in the comment at its top; one that leaves it to the README is
    submitted."""
    said = re.findall(r"^# +phalanx (.*)$", path.read_text(), re.MULTILINE)
    return [shlex.split(line) for line in said] or [["submit", _name(path), "--wait"]]


def _name(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.parent.name)
def test_examples_run_as_they_say(
    path: Path,
    cluster: phalanx.LocalCluster,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The commands at the top of each, with two steps of training where there are steps at all."""
    if lacks_torch(path.read_text()):
        pytest.skip("PyTorch is not installed: pip install 'phalanx[torch]'")
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("PHALANX_ADDRESS", cluster.address)
    is_training = "\ntrain:" in path.read_text()
    before = len(cluster.jobs())
    assert run(["submit", _name(path), "--dry-run"]) == 0
    assert len(cluster.jobs()) == before
    job_id = ""
    for words in example_commands(path):
        if words[0] == "submit" and is_training:
            words += ["--set", "train.stop={steps: 2}"]
        capfd.readouterr()
        assert run([job_id if word == "JOB" else word for word in words]) == 0, words
        if words[0] == "submit":
            assert words[1] == _name(path)
            job_id = capfd.readouterr().out.split()[0]
    job = cluster.get(job_id)
    assert job.state == "SUCCEEDED"
    if is_training:
        assert job.wait().steps == 2
        # What a secret was drawn for, nobody computes again.
        private = job.message.spec.train.HasField("privacy")
        assert cluster.verify(job).equal != private


@pytest.mark.parametrize("example", ["custom_model", "cnn"])
def test_the_code_of_an_example_is_the_file_beside_it(example: str) -> None:
    spec = phalanx.load(REPOSITORY / "examples" / example / "job.yaml")
    assert spec.code.files
    for name, text in spec.code.files.items():
        assert (REPOSITORY / "examples" / example / name).read_text() == text


def test_the_all_reduce_example_has_the_bits_of_a_parameter_server(
    cluster: phalanx.LocalCluster,
) -> None:
    hashes = set()
    for topology in ("all_reduce", "parameter_server"):
        spec = phalanx.load(REPOSITORY / "examples" / "all_reduce" / "job.yaml")
        assert spec.train.WhichOneof("topology") == "all_reduce"
        spec.train.stop.epochs = 2
        getattr(spec.train, topology).SetInParent()
        hashes.add(cluster.submit(spec).wait(timeout_s=60.0).parameters_sha256)
    assert len(hashes) == 1


def test_the_python_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(9)
    monkeypatch.chdir(tmp_path)
    for name, rows in (("adult.csv", 400), ("new-people.csv", 20)):
        with open(name, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["age", "work", "income"])
            for age, word in zip(
                generator.integers(17, 90, rows),
                generator.choice(["a", "b", "?"], rows),
                strict=True,
            ):
                writer.writerow([age, word, ">50K" if age > 50 else "<=50K"])
    [job] = blocks(README, "yaml")
    job = job.replace("name: fashion,", "name: adult,").replace("epochs: 20", "epochs: 2")
    Path("job.yaml").write_text(job)
    [code] = blocks(README, "python")
    names: dict[str, Any] = {}
    exec(compile(code, str(README), "exec"), names)
    assert set(names["labels"]) <= {"<=50K", ">50K"}
    assert len(names["labels"]) == 20


def test_the_session_of_the_readme(
    cluster: phalanx.LocalCluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The lines from `data add` to `predict`; `up` and `down` have tests of their own."""
    for part in ("examples/data/fashion-mnist-small", "examples/demo"):
        shutil.copytree(REPOSITORY / part, tmp_path / part)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PHALANX_ADDRESS", cluster.address)
    monkeypatch.setenv("PHALANX_CACHE", str(tmp_path / "cache"))
    job_id = ""
    for document, command in commands():
        words = shlex.split(command)
        if document != "README.md" or words[0] != "phalanx" or words[1] in {"up", "down"}:
            continue
        arguments = [job_id if word.endswith("-xxxxxxxx") else word for word in words[1:]]
        if arguments[0] == "submit":
            arguments += ["--set", "train.stop.epochs=2"]
        capfd.readouterr()
        assert run(arguments) == 0, command
        if arguments[0] == "submit":
            job_id = capfd.readouterr().out.split()[0]
    with open("labels.csv") as file:
        assert len(list(csv.DictReader(file))) == 2_000
