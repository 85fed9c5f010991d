"""Which GPUs a worker has, and which of them the leaves of a slot see."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.leaf.limits import show_gpus
from worker.session import devices
from worker.session.devices import gpus_here, gpus_of_slot, libraries_here


@pytest.fixture
def driver(tmp_path: Path) -> Path:
    """What the driver of a machine with two GPUs shows."""
    for name in ("nvidia0", "nvidia3", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("wanted", "environ", "found"),
    [
        ((), {}, ("0", "1")),
        (("1",), {}, ("1",)),
        (("GPU-8f2", "GPU-9a1"), {"CUDA_VISIBLE_DEVICES": "0"}, ("GPU-8f2", "GPU-9a1")),
        ((), {"CUDA_VISIBLE_DEVICES": "2, 5"}, ("2", "5")),
        ((), {"CUDA_VISIBLE_DEVICES": ""}, ()),
        # An index that no GPU can have ends the list: usual for "none".
        ((), {"CUDA_VISIBLE_DEVICES": "-1"}, ()),
        ((), {"CUDA_VISIBLE_DEVICES": "1,-1,0"}, ("1",)),
        ((), {"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, ()),
        ((), {"CUDA_VISIBLE_DEVICES": "GPU-8f2,MIG-9a1"}, ("GPU-8f2", "MIG-9a1")),
        (("none",), {}, ()),
    ],
)
def test_gpus_of_a_machine(
    driver: Path, wanted: tuple[str, ...], environ: dict[str, str], found: tuple[str, ...]
) -> None:
    assert gpus_here(wanted, environ, driver) == found


def test_a_machine_without_a_driver_has_none(tmp_path: Path) -> None:
    assert gpus_here((), {}, tmp_path) == ()
    assert gpus_here((), {}, tmp_path / "missing") == ()


@given(gpus=st.integers(0, 20), slots=st.integers(1, 20))
def test_slots_share_all_gpus_evenly_and_none_twice(gpus: int, slots: int) -> None:
    names = [str(index) for index in range(gpus)]
    shares = [gpus_of_slot(names, slot, slots) for slot in range(slots)]
    assert [name for share in shares for name in share] == names
    assert {len(share) for share in shares} <= {gpus // slots, -(-gpus // slots)}


def test_what_a_leaf_process_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    show_gpus(None)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"
    show_gpus("0,1")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_only_what_is_installed_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "version", lambda package: f"1 of {package}")
    assert libraries_here() == {"torch": "1 of torch"}

    def missing(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(devices, "version", missing)
    assert libraries_here() == {}
