"""Where control says that storage is."""

import pytest

from coordinator.control.config import ControlConfig, client_storage_address
from phalanx.config import build
from phalanx.errors import InvalidArgument


def config(**flags: str) -> ControlConfig:
    return build(ControlConfig, {"id": "control", **flags}, {})


def test_one_address_is_left_to_whoever_dials() -> None:
    made = config(storage="train.example:7420")
    assert made.storage == ("train.example:7420",)
    assert made.core().storage_address == ""
    assert client_storage_address(made) == "train.example:7420"


def test_replicas_are_told_to_members_and_people() -> None:
    made = config(storage="one:7420, two:7420")
    assert made.core().storage_address == "one:7420,two:7420"
    assert client_storage_address(made) == "one:7420,two:7420"
    assert config(storage="one:1,127.0.0.1:2").core().storage_address == "", "of this machine alone"


def test_people_may_reach_the_replicas_elsewhere() -> None:
    made = config(storage="one:7420,two:7420", public_address="a.example:1,b.example:2")
    assert client_storage_address(made) == "a.example:1,b.example:2"


@pytest.mark.parametrize("wrong", ["one:7420,two", "one:7420,two:x"])
@pytest.mark.parametrize("flag", ["storage", "public_address"])
def test_each_address_is_checked(flag: str, wrong: str) -> None:
    with pytest.raises(InvalidArgument):
        config(**{flag: wrong})
