"""Which GPUs a worker has, and which of them the leaves of a slot see."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.config import build
from phalanx.errors import InvalidArgument
from worker.config import WorkerConfig
from worker.gpus import gpus_of_slot
from worker.leaf.limits import show_gpus
from worker.session import devices
from worker.session.devices import gpu_kinds, gpus_here, libraries_here


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
        ((), {"CUDA_VISIBLE_DEVICES": "0,0"}, ()),
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
    for names in ("0,1", ""):
        show_gpus(names)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == names


@pytest.mark.parametrize(
    ("gpus", "slots", "complaint"),
    [
        ("none", "1", ""),
        ("0,1", "2", ""),
        ("GPU-8f2,MIG-9a1", "1", ""),
        ("0,0", "2", ""),  # two slots share it
        ("0,0", "1", "one slot would have a GPU twice (0, 0)"),
        ("-1", "1", "'-1' is no GPU"),
        ("0,none", "1", "'none' is no GPU"),
        ("cuda:0", "1", "'cuda:0' is no GPU"),
    ],
)
def test_names_of_gpus_are_those_that_cuda_takes(gpus: str, slots: str, complaint: str) -> None:
    flags = {"gpus": gpus, "slots": slots}
    if not complaint:
        assert build(WorkerConfig, flags, {}).gpus == tuple(gpus.split(","))
        return
    with pytest.raises(InvalidArgument) as caught:
        build(WorkerConfig, flags, {})
    (violation,) = caught.value.violations
    assert complaint in violation.message


def test_only_what_is_installed_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "version", lambda package: f"1 of {package}")
    assert libraries_here() == {"torch": "1 of torch"}

    def missing(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(devices, "version", missing)
    assert libraries_here() == {}


H100, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-40GB"


def shown(folder: Path, *models: str) -> Path:
    """What the driver tells of a machine's GPUs."""
    for index, model in enumerate(models):
        gpu = folder / "gpus" / f"0000:{index:02x}:00.0"
        gpu.mkdir(parents=True)
        lines = [f"Model: \t\t {model}", "IRQ:   \t\t 16", f"GPU UUID: \t GPU-{index}f00-ba7"]
        (gpu / "information").write_text("\n".join([*lines, "Device Minor: \t 0", ""]))
    return folder


@pytest.mark.parametrize(
    ("models", "gpus", "kinds"),
    [
        ((H100, H100), ("0", "1"), (H100,)),
        ((H100, H100), ("1",), (H100,)),
        ((H100, H100), ("0", "0"), (H100,)),
        ((H100,), (), ()),
        ((), ("0",), ()),
        ((A100, H100), ("GPU-1f00-ba7",), (H100,)),
        ((A100, H100), ("GPU-1f", "GPU-0f"), (A100, H100)),  # CUDA takes the beginning of an id
        ((A100, H100), ("GPU-1f00-ba7", "GPU-5f00-ba7"), ()),
        # CUDA counts the fastest first, so a number says nothing where they differ.
        ((A100, H100), ("0", "1"), ()),
        ((A100, H100), ("GPU-1f00-ba7", "0"), ()),
        # A part of a GPU computes with fewer units.
        ((H100,), ("MIG-9a1",), ()),
        (("",), ("0",), ()),
    ],
)
def test_kinds_of_gpus(
    tmp_path: Path, models: tuple[str, ...], gpus: tuple[str, ...], kinds: tuple[str, ...]
) -> None:
    assert gpu_kinds(gpus, shown(tmp_path, *models)) == kinds


def test_of_gpus_in_parts_a_number_names_a_part(tmp_path: Path) -> None:
    folder = shown(tmp_path, H100)
    (folder / "capabilities" / "gpu0" / "mig").mkdir(parents=True)
    assert gpu_kinds(("0",), folder) == (H100,)
    (folder / "capabilities" / "gpu0" / "mig" / "gi1").mkdir()
    assert gpu_kinds(("0",), folder) == ()


def test_what_cannot_be_read_is_not_known(tmp_path: Path) -> None:
    folder = shown(tmp_path, H100)
    (folder / "gpus" / "0000:00:00.0" / "information").write_bytes(b"Model: \xff\xfe")
    assert gpu_kinds(("0",), folder) == ()
    (folder / "gpus" / "0000:00:00.0" / "information").unlink()
    (folder / "gpus" / "0000:00:00.0" / "information").mkdir()
    assert gpu_kinds(("0",), folder) == ()
