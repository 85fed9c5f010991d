"""The lock files say what pyproject.toml asks for, with hashes, and name no place."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[3]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]


def _locked(name: str) -> dict[str, Version]:
    """Return the version of each package in requirements/NAME.txt; every one must carry a hash."""
    text = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8")
    entries = re.split(r"\n(?=\S)", text.replace("\\\n", " "))
    locked = {}
    for entry in entries:
        if entry.startswith("#"):
            continue
        assert "--hash=sha256:" in entry, entry[:60]
        requirement = Requirement(entry.partition(" --hash")[0].strip())
        (specifier,) = requirement.specifier
        assert specifier.operator == "=="
        locked[canonicalize_name(requirement.name)] = Version(specifier.version)
    return locked


def _asked(lines: list[str]) -> list[Requirement]:
    requirements = [Requirement(line) for line in lines]
    return [one for one in requirements if one.name != PROJECT["name"]]


@pytest.mark.parametrize(
    ("lock", "lines"),
    [
        ("runtime", PROJECT["dependencies"] + EXTRAS["plot"]),
        ("dev", PROJECT["dependencies"] + EXTRAS["plot"] + EXTRAS["dev"]),
        ("image", PROJECT["dependencies"] + EXTRAS["postgres"] + EXTRAS["s3"]),
        ("build", PYPROJECT["build-system"]["requires"]),
    ],
)
def test_lock_satisfies_the_project(lock: str, lines: list[str]) -> None:
    locked = _locked(lock)
    wrong = [
        str(requirement)
        for requirement in _asked(lines)
        if canonicalize_name(requirement.name) not in locked
        or locked[canonicalize_name(requirement.name)] not in requirement.specifier
    ]
    assert wrong == [], "run `make lock`"


def test_development_uses_the_versions_that_users_run() -> None:
    runtime, dev = _locked("runtime"), _locked("dev")
    assert {name: dev.get(name) for name in runtime} == runtime


def test_the_image_has_the_versions_that_were_tested_and_no_more_than_it_needs() -> None:
    runtime, image = _locked("runtime"), _locked("image")
    both = runtime.keys() & image.keys()
    assert {name: image[name] for name in both} == {name: runtime[name] for name in both}
    assert image.keys().isdisjoint({"matplotlib", "pytest", "torch", "pip"})


def test_demo_never_installs_deep_learning_or_tools() -> None:
    assert _locked("runtime").keys().isdisjoint({"torch", "pytest", "mypy", "grpcio-tools"})
    assert "torch" not in _locked("dev")


@pytest.mark.parametrize("lock", ["runtime", "dev", "image", "build"])
def test_lock_names_no_registry(lock: str) -> None:
    text = (ROOT / "requirements" / f"{lock}.txt").read_text(encoding="utf-8")
    assert not re.search(r"://|--index|--find-links|--extra-index|--trusted-host", text)


def test_grpc_refuses_compressed_bombs_from_this_version_on() -> None:
    assert _locked("runtime")["grpcio"] >= Version("1.84")


def test_packages_are_listed_by_name_and_never_published() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    wheel = tomllib.loads(text)["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == ["phalanx", "coordinator", "worker", "storage"]
    assert "Private :: Do Not Upload" in PROJECT["classifiers"]
