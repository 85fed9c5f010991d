"""Compressors: what comes back, in how many bytes, and what their bits may depend on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.compressors import (
    Codec,
    Key,
    build_down_codec,
    build_up_codec,
    compress_in_place,
    decoded,
    encoded,
    encoded_span,
)
from phalanx.errors import InvalidArgument
from phalanx.frames import BLOCK_ELEMENTS
from phalanx.v1.job_spec_pb2 import Compression, Int8, JobSpec, Sign, TopK, Train

UP = {
    "bfloat16": Compression(cast_to="bfloat16"),
    "float16": Compression(cast_to="float16"),
    "int8": Compression(int8=Int8(bucket=64)),
    "top_k": Compression(top_k=TopK(fraction=0.05)),
    "sign": Compression(sign=Sign()),
}
CLOSE = ["bfloat16", "float16", "int8"]
FEEDBACK = ["top_k", "sign"]
DTYPES = ["float32", "float64"]
KEY = Key(2, 9)


def codec_of(name: str, dtype: str = "float32", seed: int = 5) -> Codec:
    spec = JobSpec(seed=seed)
    spec.train.dtype = dtype
    spec.train.compression.CopyFrom(UP[name])
    codec = build_up_codec(spec)
    assert codec is not None
    assert codec.name == name
    return codec


def vector(count: int, dtype: str = "float32", seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(count) * 10.0 ** rng.integers(-4, 5, count)).astype(dtype)


def round_trip(codec: Codec, values: Any, key: Key = KEY) -> Any:
    return decoded(codec, encoded(codec, values, key), len(values))


def test_without_compression_there_is_no_codec() -> None:
    assert build_up_codec(JobSpec()) is None
    assert build_down_codec(JobSpec().train) is None
    spec = JobSpec()
    spec.train.compression.down_cast_to = "float16"
    down = build_down_codec(spec.train)
    assert down is not None
    assert down.name == "float16"
    assert build_up_codec(spec) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "bound"), [("bfloat16", 2.0**-8), ("float16", 2.0**-11)])
def test_casts_round_to_the_nearest(name: str, bound: float, dtype: str) -> None:
    values = np.random.default_rng(1).uniform(0.5, 1, 4000).astype(dtype)
    values[::2] *= -1
    back = round_trip(codec_of(name, dtype), values)
    assert back.dtype == dtype
    assert np.abs(back - values).max() <= bound / 2 * 1.001
    again = round_trip(codec_of(name, dtype), back)
    assert again.tobytes() == back.tobytes(), "what it can say it says exactly"


def test_bfloat16_takes_ties_to_even_and_makes_no_infinity() -> None:
    codec = codec_of("bfloat16")
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8], np.float32)
    assert round_trip(codec, ties).tolist() == [1.0, 1 + 2**-6]
    largest = np.finfo(np.float32).max
    back = round_trip(codec, np.array([largest, -largest, 0.0], np.float32))
    assert np.isfinite(back).all()
    assert np.isfinite(round_trip(codec_of("bfloat16", "float64"), np.array([1e300]))).all()


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_float16_neither_overflows_nor_vanishes(scale: float) -> None:
    values = vector(1000) * np.float32(scale / 1e5)
    back = round_trip(codec_of("float16"), values)
    assert np.abs(back - values).max() <= np.abs(values).max() * 2.0**-11


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_is_unbiased_and_its_error_is_bounded(dtype: str) -> None:
    values = vector(640, dtype) / 1e4
    buckets = np.abs(values).reshape(-1, 64).max(axis=1)
    step = np.repeat(buckets / 127, 64)
    draws = np.stack(
        [round_trip(codec_of("int8", dtype), values, Key(0, each)) for each in range(400)]
    )
    assert (np.abs(draws - values) <= step * 1.0001).all()
    # Between two levels the variance is p (1 - p) step², at most a quarter.
    standard_error = step / 2 / np.sqrt(len(draws))
    assert (np.abs(draws.mean(axis=0) - values) <= 5 * standard_error).all()
    assert (draws.var(axis=0) <= step**2 / 4 * 1.5).all()
    largest = np.abs(values).reshape(-1, 64).argmax(axis=1) + np.arange(0, 640, 64)
    np.testing.assert_allclose(draws[:, largest], np.tile(values[largest], (400, 1)), rtol=1e-6)


def test_int8_gives_the_same_bytes_for_the_same_work_only() -> None:
    codec, values = codec_of("int8"), vector(1000)
    first = encoded(codec, values, Key(4, 7)).tobytes()
    assert encoded(codec_of("int8"), values, Key(4, 7)).tobytes() == first
    for other in (
        encoded(codec, values, Key(5, 7)),
        encoded(codec, values, Key(4, 8)),
        encoded(codec_of("int8", seed=6), values, Key(4, 7)),
    ):
        assert other.tobytes() != first


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", UP)
@pytest.mark.parametrize("count", [1, 63, 64, 65, 5000])
def test_zeros_and_small_vectors(name: str, dtype: str, count: int) -> None:
    codec = codec_of(name, dtype)
    zeros = np.zeros(count, dtype)
    assert not round_trip(codec, zeros).any()
    if name not in CLOSE:
        return
    values = np.full(count, -3.0, dtype)
    np.testing.assert_allclose(round_trip(codec, values), values, rtol=1e-6)


@given(
    name=st.sampled_from(sorted(UP)),
    dtype=st.sampled_from(DTYPES),
    tail=st.integers(0, 300),
    seed=st.integers(0, 99),
)
@settings(max_examples=15, deadline=None)
def test_frames_are_cut_out_of_the_encoded_vector(
    name: str, dtype: str, tail: int, seed: int
) -> None:
    codec, count = codec_of(name, dtype), 2 * BLOCK_ELEMENTS + tail
    values = vector(count, dtype, seed)
    whole = encoded(codec, values, Key(1, 2))
    assert len(whole) == codec.encoded_bytes(count) < values.nbytes
    in_place = np.zeros(count * values.itemsize, np.uint8)
    in_place.view(dtype)[:] = values
    compress_in_place(codec, in_place.view(dtype), in_place, Key(1, 2))
    assert in_place[: len(whole)].tobytes() == whole.tobytes()
    start, size = encoded_span(codec, BLOCK_ELEMENTS, count - BLOCK_ELEMENTS)
    part = decoded(codec, whole[start : start + size].tobytes(), count - BLOCK_ELEMENTS)
    everything = decoded(codec, whole, count)
    assert part.tobytes() == everything[BLOCK_ELEMENTS:].tobytes()


def test_sizes() -> None:
    assert codec_of("bfloat16").encoded_bytes(1000) == 2000
    assert codec_of("float16").encoded_bytes(1000) == 2004
    assert codec_of("int8").encoded_bytes(1000) == 1000 + 16 * 4
    assert codec_of("top_k").encoded_bytes(1000) == 50 * (2 + 4)
    assert codec_of("top_k", "float64").encoded_bytes(1) == 8
    assert codec_of("sign").encoded_bytes(1001) == 2 * 4 + 126
    assert codec_of("int8").encoded_bytes(BLOCK_ELEMENTS + 1) == BLOCK_ELEMENTS + 1024 * 4 + 1 + 4


@pytest.mark.parametrize("name", UP)
def test_bytes_of_another_size_are_refused(name: str) -> None:
    codec = codec_of(name)
    data = encoded(codec, vector(100))
    for wrong in (data[:-1], np.concatenate((data, data[:1])), data[:0]):
        with pytest.raises(InvalidArgument, match="100 elements"):
            decoded(codec, wrong, 100)


@pytest.mark.parametrize("name", [*CLOSE, "sign"])
def test_any_bytes_of_the_right_size_give_numbers(name: str) -> None:
    """A peer may send what it likes; whether it is finite is looked at after the sum."""
    codec = codec_of(name)
    noise = np.random.default_rng(3).integers(0, 256, codec.encoded_bytes(100), np.uint8)
    assert decoded(codec, noise, 100).shape == (100,)


def test_top_k_keeps_the_largest_and_of_equal_ones_the_first() -> None:
    codec = build_top_k(0.25)
    values = np.array([1, -3, 0, 3, 2, -3, 3, 1], np.float32)
    assert round_trip(codec, values).tolist() == [0, -3, 0, 3, 0, 0, 0, 0]
    assert round_trip(codec, np.ones(8, np.float32)).tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    values = vector(5000)
    kept = np.flatnonzero(round_trip(codec, values))
    assert len(kept) == 1250
    assert np.abs(values[kept]).min() >= np.abs(np.delete(values, kept)).max()


def test_a_block_that_nothing_is_saved_of_is_sent_as_it_is() -> None:
    values = vector(999)
    for fraction in (0.67, 1.0):
        codec = build_top_k(fraction)
        assert codec.encoded_bytes(999) == values.nbytes
        assert round_trip(codec, values).tobytes() == values.tobytes()


def test_indexes_that_are_not_in_order_are_refused() -> None:
    codec = codec_of("top_k")
    data = encoded(codec, vector(100))
    for wrong in ([0, 1, 2, 3, 100], [0, 1, 1, 2, 3], [4, 3, 2, 1, 0]):
        broken = data.copy()
        broken[:10] = np.array(wrong, "<u2").view(np.uint8)
        with pytest.raises(InvalidArgument, match="not in order"):
            decoded(codec, broken, 100)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sign_keeps_the_mean_magnitude_of_each_bucket(dtype: str) -> None:
    values = vector(1200, dtype)
    back = round_trip(codec_of("sign", dtype), values)
    assert (np.signbit(back) == np.signbit(values)).all()
    for first in range(0, 1200, 512):
        bucket = slice(first, first + 512)
        mean = np.abs(values[bucket]).mean(dtype=np.float64)
        np.testing.assert_allclose(np.abs(back[bucket]), mean, rtol=1e-5)
    largest = np.full(600, np.finfo(dtype).max / 2, dtype)
    assert np.isfinite(round_trip(codec_of("sign", dtype), largest)).all()


@pytest.mark.parametrize("name", FEEDBACK)
@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-12), ("float32", 1e-4)])
def test_what_was_sent_and_what_is_left_is_everything(name: str, dtype: str, bound: float) -> None:
    codec, count = codec_of(name, dtype), BLOCK_ELEMENTS + 500
    assert codec.feedback
    residual, sent, total = np.zeros(count, dtype), np.zeros(count), np.zeros(count)
    for step in range(60):
        gradient = vector(count, dtype, step)
        total += gradient
        values = gradient + residual
        data = np.zeros(values.nbytes, np.uint8)
        compress_in_place(codec, values, data, Key(0, step), residual)
        back = decoded(codec, data[: codec.encoded_bytes(count)], count)
        assert (residual == values - back).all()
        sent += back
    scale = np.abs(total).max()
    assert np.abs(sent + residual - total).max() <= bound * scale
    assert np.abs(residual).max() > 1e-3 * scale, "nothing was left out, so nothing is shown"


@pytest.mark.parametrize("name", FEEDBACK)
def test_a_vector_is_encoded_where_it_is_and_what_it_loses_kept(name: str) -> None:
    codec, values = codec_of(name), vector(2 * BLOCK_ELEMENTS + 7)
    memory, lost = values.copy(), np.empty_like(values)
    compress_in_place(codec, memory, memory.view(np.uint8), KEY, lost)
    expected = encoded(codec, values, KEY)
    assert memory.view(np.uint8)[: len(expected)].tobytes() == expected.tobytes()
    assert (lost == values - decoded(codec, expected, len(values))).all()


def build_top_k(fraction: float) -> Codec:
    codec = build_up_codec(
        JobSpec(train=Train(compression=Compression(top_k=TopK(fraction=fraction))))
    )
    assert codec is not None
    return codec
