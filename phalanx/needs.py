"""What jobs need that not every machine has: libraries that are no part of every installation, and
GPUs. None of these is loaded here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from phalanx.v1.job_spec_pb2 import JobSpec


@dataclass(frozen=True)
class Library:
    """One of them: its package, what people call it, and the extra of Phalanx that brings it."""

    package: str
    title: str
    extra: str


TORCH = Library("torch", "PyTorch", "torch")
LIBRARIES = (TORCH,)

_BY_KIND = {"torch": TORCH}
"""What models of a kind are made with."""

_ON_GPUS = ("custom", "torch")
"""Kinds of models that may compute on GPUs."""


def kind_of(spec: JobSpec) -> str:
    """Return of which kind the model of a job is: that of `train.model`, else the program that
    makes it; empty where nothing is said."""
    program = spec.WhichOneof("program") or ""
    return (spec.train.model.WhichOneof("kind") or "") if program == "train" else program


def libraries_of_model(spec: JobSpec) -> list[str]:
    """Return the packages without which nobody can compute the model that a job left."""
    library = _BY_KIND.get(kind_of(spec))
    return [library.package] if library else []


def libraries_of_job(spec: JobSpec, of_model: Iterable[str]) -> list[str]:
    """Return the packages that a job needs, sorted; `of_model` as in `lacking`."""
    return sorted({package for package, _ in _needed(spec, of_model)})


def title_of(package: str) -> str:
    """Return what people call a library."""
    return _library(package).title


def lacking(spec: JobSpec, of_model: Iterable[str], installed: Mapping[str, str]) -> str:
    """Return what a job needs and a worker does not have, as a sentence; empty: nothing.

    `of_model` are the packages of the stored model that the job puts rows through, see
    `libraries_of_model`; `installed` are versions by package.
    """
    for package, purpose in _needed(spec, of_model):
        if package not in installed:
            known = _library(package)
            install = f"pip install 'phalanx[{known.extra}]'"
            return f"it has no {known.title}, which {purpose} needs ({install} there)"
    return ""


def _library(package: str) -> Library:
    # A newer control process may have journalled one that this version does not know.
    unknown = Library(package, package, package)
    return next((each for each in LIBRARIES if each.package == package), unknown)


def _needed(spec: JobSpec, of_model: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield (package, what needs it)."""
    kind = kind_of(spec)
    if kind in _BY_KIND:
        yield _BY_KIND[kind].package, f"train.model.{kind}"
    for package in of_model:
        yield package, f"the model {spec.evaluate.model or spec.predict.model}"


def gpus_complaint(kind: str, gpus: int) -> str:
    """Return why a model of a kind cannot have so many GPUs for each slot; empty if it can, or if
    nothing is known of it."""
    if gpus > 0 and kind and kind not in _ON_GPUS:
        return f"{kind} computes on CPUs; leave it out, or use a model of train.model.torch"
    if gpus > 1 and kind == "torch":
        return "a PyTorch module computes on one GPU per slot; use 1"
    return ""
