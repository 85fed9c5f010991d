"""Names: nothing that could leave a folder, a URL or a log line is one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.errors import InvalidArgument
from phalanx.ids import check_blob_id, check_name, is_made_id, is_name, new_id, split_version_name

BAD = [
    "",
    ".",
    "..",
    ".hidden",
    "-a",
    "_a",
    "a/b",
    "A",
    "a b",
    "a\n",
    "a\x00",
    "é",
    "%2e",
    "a" * 129,
]


@pytest.mark.parametrize("text", BAD)
def test_bad_names_are_refused_with_what_they_were_for(text: str) -> None:
    assert not is_name(text)
    with pytest.raises(InvalidArgument, match="job name"):
        check_name(text, "job name")


@pytest.mark.parametrize("text", ["a", "0", "fashion-mlp", "a.b_c-d", "a" * 128])
def test_good_names_are_kept(text: str) -> None:
    assert check_name(text, "job name") == text


@given(st.text(max_size=140))
def test_a_name_is_its_own_file_name(text: str) -> None:
    if is_name(text):
        assert "/" not in text
        assert "\x00" not in text
        assert text not in (".", "..")
        assert text == text.lower().strip()
        assert len(text.encode()) <= 128


def test_blob_ids_are_lower_case_sha_256() -> None:
    digest = "0123456789abcdef" * 4
    assert check_blob_id(digest) == digest
    for wrong in (digest[:-1], digest + "0", digest.upper(), "../" + digest[3:]):
        with pytest.raises(InvalidArgument):
            check_blob_id(wrong)


def test_new_ids_are_names_and_differ() -> None:
    made = {new_id("job") for _ in range(100)}
    assert len(made) == 100
    assert all(is_name(one) and one.startswith("job-") for one in made)


def test_made_ids_are_told_from_other_names() -> None:
    assert is_made_id(new_id("fashion-mlp"))
    for other in ("fashion-mlp", "code.0123456789abcdef", "job-1", "job-aeiouaei", "-bcdfghjk"):
        assert not is_made_id(other)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("digits", ("mine", "digits", "")),
        ("digits@3", ("mine", "digits", "3")),
        ("yours/digits@3", ("yours", "digits", "3")),
        ("/digits", ("", "digits", "")),
    ],
)
def test_the_name_of_a_version_is_taken_apart(text, parts):
    assert split_version_name(text, "mine") == parts
