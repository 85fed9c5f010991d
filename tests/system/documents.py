"""The documents, what they say to type, and the programs that they say it to."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phalanx.testing.arena import GUARD_S
from phalanx.testing.datasets import REPOSITORY

README = REPOSITORY / "README.md"
DOCUMENTS = [
    README,
    REPOSITORY / "CONTRIBUTING.md",
    *sorted((REPOSITORY / "docs").rglob("*.md")),
]
MODULES = {"phalanx": "phalanx.cli", "grpcurl": "tests.system.grpcurl"}


def blocks(path: Path, language: str) -> list[str]:
    """The code blocks of a language in a document."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


def commands() -> list[tuple[str, str]]:
    """Every line of a shell block, as (document, command)."""
    lines = []
    for path in DOCUMENTS:
        for block in blocks(path, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                lines += [
                    (path.name, part.strip())
                    for part in line.partition("  #")[0].split("&&")
                    if part.strip() and not part.strip().startswith("#")
                ]
    return lines


def calls_by_grpcurl(*, plaintext: bool) -> list[tuple[str, str]]:
    """The commands that call grpcurl: those that a cluster without keys answers, or one with."""
    return [
        (document, command)
        for document, command in commands()
        if shlex.split(command)[0] == "grpcurl"
        and ("-plaintext" in shlex.split(command)) == plaintext
    ]


def install(folder: Path, *names: str) -> Path:
    """Put programs into a folder; return it. Whoever has grpcurl itself is tested with it."""
    folder.mkdir()
    for name in names:
        if name == "grpcurl" and shutil.which(name):
            continue
        program = folder / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -m {MODULES[name]} "$@"\n')
        program.chmod(0o755)
    return folder


def run_grpcurl(
    command: str, folder: Path, environ: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Type a command into a shell in a folder; the responses that it prints."""
    done = subprocess.run(
        ["sh", "-euc", command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **(environ or {})},
        capture_output=True,
        text=True,
        timeout=GUARD_S,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return json_values(done.stdout)


def json_values(text: str) -> list[dict[str, Any]]:
    """JSON values that follow each other."""
    decoder, rest, found = json.JSONDecoder(), text.strip(), []
    while rest:
        value, end = decoder.raw_decode(rest)
        found.append(value)
        rest = rest[end:].lstrip()
    return found
