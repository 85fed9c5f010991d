"""The commit at which a figure was measured."""

import shutil
import subprocess

import pytest

from bench.checkout import UNKNOWN, WRITTEN, commit_of

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def _git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@needs_git
def test_the_commit_of_a_checkout_and_whether_it_was_changed(tmp_path):
    root = tmp_path.resolve()
    _git(root, "init", "-q")
    assert commit_of(root) == UNKNOWN, "nothing was committed yet"
    paths = [root / "code.py", *(root / path for path in WRITTEN)]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_text("before")
    _git(root, "add", "-A")
    _git(root, "commit", "-qm", "all")
    commit = commit_of(root)
    assert _git(root, "rev-parse", "HEAD").startswith(commit)
    for path in paths[1:]:
        path.write_text("figures")
    assert commit_of(root) == commit
    paths[0].write_text("after")
    assert commit_of(root) == commit + "+"


@needs_git
def test_a_copy_inside_another_checkout_has_no_commit(tmp_path):
    _git(tmp_path, "init", "-q")
    _git(tmp_path, "commit", "-qm", "another", "--allow-empty")
    copy = tmp_path.resolve() / "copy"
    copy.mkdir()
    assert commit_of(copy) == UNKNOWN


def test_without_git_no_commit_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit_of(tmp_path) == UNKNOWN
