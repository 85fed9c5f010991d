"""Benchmarks by name: which are wanted on the command line, and running one after another."""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType


def add_names(parser: argparse.ArgumentParser, known: Mapping[str, str]) -> None:
    """Let the command line name some of the known groups; default is all."""

    def name(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(known)}")
        return text

    parser.add_argument("names", nargs="*", type=name, metavar="NAME", help=", ".join(known))


def modules(
    package: str, known: Mapping[str, str], names: Sequence[str]
) -> Iterator[tuple[ModuleType, str]]:
    """Yield the module of each group with the command that makes its figures; tell what is done."""
    for name in names or known:
        print(f"… {name}: {known[name]}", flush=True)
        start = time.monotonic()
        yield importlib.import_module(f"{package}.{name}"), f"python -m {package} {name}"
        print(f"  {time.monotonic() - start:.0f} s", flush=True)
