"""Numbers in messages agree with their nouns."""

import pytest

from phalanx.texts import number_of, verb_for


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 slots"), (1, "1 slot"), (2, "2 slots"), (2048, "2,048 slots")]
)
def test_the_noun_goes_with_the_number(count: int, text: str) -> None:
    assert number_of(count, "slot") == text


def test_a_plural_of_its_own() -> None:
    assert number_of(1, "class", "classes") == "1 class"
    assert number_of(10, "class", "classes") == "10 classes"


def test_the_verb_goes_with_the_number() -> None:
    assert [verb_for(count, "is", "are") for count in (0, 1, 2)] == ["are", "is", "are"]
