"""In which order data sets and places are tried for a linked chunk."""

from phalanx.data.link_plans import ChunkPlace
from phalanx.v1.dataset_service_pb2 import Dataset
from storage.links.ranking import Ranking

CHUNK, OTHER = "chunk", "other"
HERE, THERE = ChunkPlace("train", 0, 10), ChunkPlace("test", 0, 10)


def datasets(*manifests: str) -> list[Dataset]:
    return [Dataset(name=f"d{index}", manifest_digest=m) for index, m in enumerate(manifests)]


def order(ranking: Ranking, chunk: str, *manifests: str) -> str:
    return "".join(each.manifest_digest for each in ranking.sources(chunk, datasets(*manifests)))


def test_they_stay_in_order_until_something_is_known() -> None:
    ranking = Ranking()
    assert order(ranking, CHUNK, "c", "a", "b") == "cab"
    assert ranking.places(CHUNK, "c", [THERE, HERE]) == [THERE, HERE]


def test_of_versions_with_one_manifest_only_the_newest_is_tried() -> None:
    (first, second) = Ranking().sources(CHUNK, datasets("a", "b", "a"))
    assert (first.name, second.name) == ("d0", "d1")


def test_what_gave_a_chunk_is_first_for_it_and_what_failed_last_for_all() -> None:
    ranking = Ranking()
    ranking.failed(CHUNK, "a")
    ranking.gave(CHUNK, "c", HERE)
    assert order(ranking, CHUNK, "a", "b", "c") == "cba"
    assert order(ranking, OTHER, "a", "b", "c") == "bca"
    assert ranking.places(CHUNK, "c", [THERE, HERE]) == [HERE, THERE]
    assert ranking.places(CHUNK, "b", [THERE, HERE]) == [THERE, HERE]
    ranking.gave(OTHER, "a", HERE)
    assert order(ranking, CHUNK, "a", "b", "c") == "cab"
    ranking.failed(CHUNK, "c")
    assert order(ranking, CHUNK, "a", "c", "b") == "abc"


def test_it_forgets_the_oldest() -> None:
    ranking = Ranking(chunks=2, sources=1)
    for chunk in ("1", "2", "3"):
        ranking.gave(chunk, "b", HERE)
    assert [order(ranking, chunk, "a", "b") for chunk in ("1", "2", "3")] == ["ab", "ba", "ba"]
    ranking.failed(OTHER, "a")
    ranking.failed(OTHER, "c")
    assert order(ranking, OTHER, "a", "c") == "ac"
