"""A sample of ``bench.reliability.bit_flips``, which flips every bit of a 64 KiB checkpoint."""

import random

import pytest

from bench.reliability.bit_flips import BITS, PART_BYTES, checkpoint_part, flip, whole_way
from storage.backends.blob_files import FileBlobReader

pytestmark = pytest.mark.slow


def test_flips_all_over_a_checkpoint_are_detected():
    draw = random.Random(11)
    content, _ = checkpoint_part(20)
    assert len(content) == PART_BYTES
    bits = [*range(64), *(draw.randrange(BITS) for _ in range(3000)), *range(BITS - 64, BITS)]
    assert flip(bits) == (len(bits), len(bits))


def test_a_reader_that_does_not_verify_is_found_out(monkeypatch):
    monkeypatch.setattr(
        FileBlobReader,
        "chunks",
        lambda self, offset, length, chunk_bytes: self._read(offset, length, chunk_bytes),
    )
    assert flip(range(10)) == (10, 0)


async def test_an_aggregator_is_refused_and_given_the_checkpoint_before(tmp_path):
    draw = random.Random(12)
    assert await whole_way(tmp_path, [draw.randrange(BITS) for _ in range(20)]) == (20, 20)
