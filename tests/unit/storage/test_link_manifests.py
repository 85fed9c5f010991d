"""Parsed manifests of linked data sets: kept up to a limit, and parsed once."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from phalanx.data.link_plans import ChunkPlace
from phalanx.errors import NotFound
from storage.links.maker import Plan
from storage.links.manifests import LinkedManifest, ManifestCache

GUARD_S = 30.0


def linked(name: str, chunks: int = 10) -> LinkedManifest:
    plan = Plan(name, b"plan", "/data/a.parquet")
    places = {
        f"{name}-{index}": (ChunkPlace("train", index, index + 1),) for index in range(chunks)
    }
    return LinkedManifest(plan, places)


def test_they_are_kept_up_to_a_limit_of_bytes() -> None:
    loaded: list[str] = []

    def load(digest: str) -> LinkedManifest:
        loaded.append(digest)
        return linked(digest, 1000 if digest == "large" else 10)

    cache = ManifestCache(load, 2 * linked("a").memory_bytes)
    for digest in ("a", "b", "a", "c", "a", "b"):
        assert cache.get(digest).plan.digest == digest
    # "b" was used least recently when "c" came.
    assert loaded == ["a", "b", "c", "b"]
    # One that is larger than all may be drives nothing out.
    assert len(cache.get("large").places) == 1000
    cache.get("a")
    assert loaded == ["a", "b", "c", "b", "large"]


def test_whoever_asks_while_one_is_parsed_waits_for_it_and_others_do_not() -> None:
    loaded: list[str] = []
    begun, may_end = threading.Event(), threading.Event()

    def load(digest: str) -> LinkedManifest:
        loaded.append(digest)
        if digest == "slow":
            begun.set()
            assert may_end.wait(GUARD_S)
        return linked(digest)

    cache = ManifestCache(load)
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(cache.get, "slow") for _ in range(2)]
        assert begun.wait(GUARD_S)
        assert cache.get("other").plan.digest == "other"
        may_end.set()
        assert asked[0].result(GUARD_S) is asked[1].result(GUARD_S)
    assert loaded == ["slow", "other"]


def test_one_that_could_not_be_read_is_tried_again() -> None:
    answers = [NotFound("gone"), linked("a")]

    def load(digest: str) -> LinkedManifest:
        answer = answers.pop(0)
        if isinstance(answer, LinkedManifest):
            return answer
        raise answer

    cache = ManifestCache(load)
    with pytest.raises(NotFound):
        cache.get("a")
    assert cache.get("a").plan.digest == "a"
