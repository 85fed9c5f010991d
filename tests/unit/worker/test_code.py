"""Folders of code on a worker's disk: shared while used, gone when nobody uses them."""

from __future__ import annotations

from pathlib import Path

from worker.code import folder_name, open_folder, remove_all_unused


def test_a_folder_goes_with_its_last_user(tmp_path: Path) -> None:
    # Locks belong to open files, so one process stands for two workers here.
    one, two = open_folder(tmp_path, "a"), open_folder(tmp_path, "a")
    one.fill({"net.py": b"x = 1"}, {})
    one.release()
    one.release()
    assert (two.path / "net.py").read_bytes() == b"x = 1"
    two.release()
    assert list(tmp_path.iterdir()) == []
    again = open_folder(tmp_path, "a")
    assert list(again.path.iterdir()) == []
    again.release()


def test_a_start_removes_what_the_dead_left_and_nothing_else(tmp_path: Path) -> None:
    used = open_folder(tmp_path, "used")
    used.fill({"net.py": b""}, {})
    (tmp_path / "left" / "deep").mkdir(parents=True)
    (tmp_path / ".gone-abc" / "half").mkdir(parents=True)
    remove_all_unused(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["used"]
    assert (used.path / "net.py").exists()
    used.release()
    remove_all_unused(tmp_path / "never made")


def test_the_name_tells_code_apart() -> None:
    names = {
        folder_name({"net.py": "1", "part.py": "2"}),
        folder_name({"net.py": "2", "part.py": "1"}),
        folder_name({"net.py": "1"}),
    }
    assert len(names) == 3
    assert folder_name({"b": "2", "a": "1"}) == folder_name({"a": "1", "b": "2"})
