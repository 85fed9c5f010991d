"""What names may look like; the same as everywhere in Phalanx."""

import random
import re

import pytest

from phalanx import ids
from phalanx.errors import InvalidArgument, PhalanxError
from storage.core import keys

GOOD = ["a", "0", "job-1", "a.b_c-d", "a" * 128, "0.tmp"]
BAD = [
    "", ".", "..", ".a", "-a", "_a", "A", "a" * 129, "a b", "a\0", "a\n", "a/b", "/", "\\",
    "%2e%2e", "ä", "ａ", "a\u202e", "con\x7f", "..\0", "~", "a:b", "a@1",
]  # fmt: skip


@pytest.mark.parametrize("text", GOOD)
def test_keys(text):
    assert keys.check_key(text, "name") == text
    assert keys.check_stream(text, "name") == text


@pytest.mark.parametrize("text", BAD)
def test_no_keys(text):
    with pytest.raises(InvalidArgument) as caught:
        keys.check_key(text, "name")
    assert caught.value.violations[0].field == "name"


@pytest.mark.parametrize("text", ["logs/job-1", "a/b/c", "a.b/c.d"])
def test_streams(text):
    assert keys.check_stream(text, "stream") == text


@pytest.mark.parametrize("text", ["a/b/c/d", "a//b", "/a", "a/", "a/../b", "../a", "a/.b", "a/B"])
def test_no_streams(text):
    with pytest.raises(InvalidArgument):
        keys.check_stream(text, "stream")


def test_long_names_are_shown_short():
    with pytest.raises(InvalidArgument) as caught:
        keys.check_key("x/" * 100_000, "name")
    assert len(caught.value.message) < 500


def fuzzed(generator):
    pieces = ["..", ".", "/", "\\", "\0", "%2e", "a", "Z", "\u2024", "\uff0f", "~", "-", "\n", "0"]
    if generator.random() < 0.5:
        return "".join(generator.choice(pieces) for _ in range(generator.randrange(8)))
    return "".join(chr(generator.randrange(0x250)) for _ in range(generator.randrange(200)))


def accepts(check, text):
    try:
        check(text)
    except PhalanxError:
        return False
    return True


def test_ten_thousand_fuzzed_names_are_judged_as_everywhere_else():
    generator = random.Random(1)
    plain = re.compile("[a-z0-9][a-z0-9._-]{0,127}(/[a-z0-9][a-z0-9._-]{0,127}){0,2}", re.ASCII)
    accepted = 0
    for _ in range(10_000):
        text = fuzzed(generator)
        is_key = accepts(lambda text: keys.check_key(text, "name"), text)
        is_stream = accepts(lambda text: keys.check_stream(text, "name"), text)
        assert is_key == ids.is_name(text)
        assert is_stream == (plain.fullmatch(text) is not None)
        accepted += is_stream
        if is_stream:
            assert ".." not in text.split("/")
            assert not text.startswith("/")
    assert accepted > 10, "the fuzzer makes nothing that is allowed"
