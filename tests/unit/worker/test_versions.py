"""Two buffers, whole versions only."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.errors import InvalidArgument
from phalanx.frames import BLOCK_ELEMENTS, frame_grid
from phalanx.v1 import training_pb2
from worker.core.versions import VersionAssembly

#: Two ranges; the first has two frames.
RANGES = [
    training_pb2.ParameterRange(index=0, first_element=0, element_count=5 * BLOCK_ELEMENTS),
    training_pb2.ParameterRange(index=1, first_element=5 * BLOCK_ELEMENTS, element_count=100),
]
FRAMES = [
    (piece.index, first, count)
    for piece in RANGES
    for first, count in frame_grid(piece.element_count, 4)
]


def _store(assembly: VersionAssembly, version: int, frame: tuple[int, int, int]) -> bool:
    index, first, count = frame
    place = assembly.place(index, version, first, count)
    return place is not None and assembly.stored(place)


def test_a_version_is_whole_with_its_last_frame_of_the_last_range() -> None:
    assembly = VersionAssembly(RANGES, 4)
    assert [_store(assembly, 3, frame) for frame in FRAMES] == [False] * (len(FRAMES) - 1) + [True]
    assert assembly.whole_version == 3


def test_places_count_from_the_start_of_the_vector() -> None:
    assembly = VersionAssembly(RANGES, 4)
    place = assembly.place(1, 0, 0, 100)
    assert place is not None
    assert (place.first_element, place.element_count) == (5 * BLOCK_ELEMENTS, 100)


def test_the_version_in_use_keeps_its_buffer_until_the_one_after_next_begins() -> None:
    assembly = VersionAssembly(RANGES, 4)
    for frame in FRAMES:
        _store(assembly, 0, frame)
    kept = assembly.buffer_of(0)
    for frame in FRAMES[:-1]:
        place = assembly.place(frame[0], 1, frame[1], frame[2])
        assert place is not None
        assert place.buffer != kept
        assembly.stored(place)
    assert assembly.whole_version == 0
    # Version 2 proves that all ranges have committed version 1: nobody needs version 0.
    place = assembly.place(0, 2, FRAMES[0][1], FRAMES[0][2])
    assert place is not None
    assert place.buffer == kept
    assert assembly.whole_version == -1
    # Version 1 can still become whole.
    assert _store(assembly, 1, FRAMES[-1])
    assert assembly.whole_version == 1


def test_old_and_repeated_frames_are_not_wanted() -> None:
    assembly = VersionAssembly(RANGES, 4)
    for frame in FRAMES:
        assert assembly.place(frame[0], 5, frame[1], frame[2]) is not None
        _store(assembly, 5, frame)
        assert assembly.place(frame[0], 5, frame[1], frame[2]) is None
    assert assembly.place(0, 4, FRAMES[0][1], FRAMES[0][2]) is None


def test_a_frame_beside_the_grid_is_refused() -> None:
    assembly = VersionAssembly(RANGES, 4)
    for index, first, count in ((0, 1, 10), (2, 0, 100), (1, 0, 99)):
        with pytest.raises(InvalidArgument, match="no frame of range"):
            assembly.place(index, 0, first, count)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, len(FRAMES) - 1)), max_size=60))
def test_whatever_the_order_a_whole_version_has_all_frames_in_one_buffer(
    arrivals: list[tuple[int, int]],
) -> None:
    assembly = VersionAssembly(RANGES, 4)
    buffers: dict[int, dict[int, int]] = {0: {}, 1: {}}
    for version, index in arrivals:
        frame = FRAMES[index]
        place = assembly.place(frame[0], version, frame[1], frame[2])
        if place is not None:
            buffers[place.buffer][index] = version
            assembly.stored(place)
        whole = assembly.whole_version
        assert len(assembly.held_versions) <= 2
        if whole >= 0:
            held = buffers[assembly.buffer_of(whole)]
            assert held == dict.fromkeys(range(len(FRAMES)), whole)
