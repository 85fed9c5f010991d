"""Wheels that travel with a job: what is taken, what is refused, what lands in the folder."""

import sys
import threading
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from phalanx import wheels
from phalanx.errors import InvalidArgument
from phalanx.testing.wheels import make_wheel
from phalanx.wheels import check_wheel, write_code

DESCRIPTION = "mine-1.0.dist-info/WHEEL"


def written(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file() and ".dist-info" not in str(path)
    }


def raw_wheel(folder: Path, members: dict[str, str]) -> Path:
    path = folder / "mine-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return path


def test_files_and_wheels_become_one_folder(tmp_path: Path) -> None:
    one = make_wheel(tmp_path, {"one/__init__.py": "1", "one.data/purelib/two.py": "2"}, name="one")
    other = make_wheel(tmp_path, {"three.py": "3", "other.data/scripts/run": "left out"}, name="o")
    write_code(tmp_path / "code", {"net.py": b"0"}, {"one": one, "other": other})
    assert written(tmp_path / "code") == {
        "net.py": "0",
        "one/__init__.py": "1",
        "two.py": "2",
        "three.py": "3",
    }


def test_what_is_right_stays_and_what_is_damaged_is_written_again(tmp_path: Path) -> None:
    wheel, code = make_wheel(tmp_path, {"a.py": "a", "b.py": "b"}), tmp_path / "code"
    write_code(code, {}, {"wheel": wheel})
    before = (code / "a.py").stat().st_mtime_ns, (code / "a.py").stat().st_ino
    (code / "b.py").write_text("changed")
    write_code(code, {}, {"wheel": wheel})
    assert ((code / "a.py").stat().st_mtime_ns, (code / "a.py").stat().st_ino) == before
    assert (code / "b.py").read_text() == "b"


def test_two_jobs_with_the_same_code_may_be_prepared_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both, replace = threading.Barrier(2, timeout=30), Path.replace

    def replace_together(path: Path, target: Path) -> Path:
        both.wait()
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", replace_together)
    with ThreadPoolExecutor(2) as threads:
        jobs = [threads.submit(write_code, tmp_path, {"net.py": b"0"}, {}) for _ in range(2)]
        for job in jobs:
            job.result()
    assert written(tmp_path) == {"net.py": "0"}


def test_a_file_that_two_bring_is_refused(tmp_path: Path) -> None:
    one = make_wheel(tmp_path, {"net.py": "1"}, name="one")
    with pytest.raises(InvalidArgument, match=r"both code\.files and the wheel bring .* net\.py"):
        write_code(tmp_path / "code", {"net.py": b"0"}, {"the wheel": one})
    with pytest.raises(InvalidArgument, match="both a file and a folder"):
        write_code(tmp_path / "more", {"net.py": b"0", "net.py/x.py": b"1"}, {})


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"mine.py": ""}, "0 files"),
        ({DESCRIPTION: "Tag: py3-none-any", "b-1.dist-info/WHEEL": ""}, "2 files"),
        ({DESCRIPTION: "Wheel-Version: 1.0"}, "no usable line"),
        ({DESCRIPTION: "Tag: anything"}, "no usable line"),
        ({DESCRIPTION: "Tag: cp311-cp311-linux_x86_64"}, "compiled for cp311-cp311-linux_x86_64"),
        ({DESCRIPTION: "Tag: py3-none-win32"}, "compiled for py3-none-win32"),
        ({DESCRIPTION: "Tag: py3-none-any", "../evil.py": ""}, "no path inside"),
        ({DESCRIPTION: "Tag: py3-none-any", "/etc/evil.py": ""}, "no path inside"),
        ({DESCRIPTION: "Tag: py3-none-any", "n" * 243 + ".py": ""}, "too long"),
    ],
)
def test_what_is_no_wheel_or_not_pure_is_refused(
    tmp_path: Path, members: dict[str, str], message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        check_wheel(raw_wheel(tmp_path, members), "mine.whl")


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.whl").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(InvalidArgument, match=r"mine\.whl is no wheel"):
        check_wheel(tmp_path / "mine.whl", "mine.whl")


def test_links_are_refused(tmp_path: Path) -> None:
    path = make_wheel(tmp_path, {"mine.py": ""})
    with zipfile.ZipFile(path, "a") as archive:
        link = zipfile.ZipInfo("passwd.py")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(InvalidArgument, match="symbolic link"):
        check_wheel(path, "mine.whl")


def test_a_bomb_is_refused_before_it_unpacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_wheel(tmp_path, {f"m{number}.py": "0" * 1000 for number in range(20)})
    monkeypatch.setattr(wheels, "UNPACKED_LIMIT_BYTES", 10_000)
    with pytest.raises(InvalidArgument, match="unpacks to"):
        check_wheel(path, "mine.whl")
    monkeypatch.setattr(wheels, "FILES_LIMIT", 10)
    with pytest.raises(InvalidArgument, match="23 files"):
        check_wheel(path, "mine.whl")


@pytest.mark.parametrize(
    ("python", "taken"),
    [
        ("py3", True),
        ("py2.py3", True),
        ("py311", True),
        (f"cp3{sys.version_info.minor}", True),
        (f"py3{sys.version_info.minor + 1}", False),
        (f"cp3{sys.version_info.minor + 1}", False),
        ("py2", False),
    ],
)
def test_a_wheel_for_another_python_is_refused_where_it_would_run(
    tmp_path: Path, python: str, taken: bool
) -> None:
    wheel = make_wheel(tmp_path, {"mine.py": ""}, tag=f"{python}-none-any")
    check_wheel(wheel, "mine.whl")  # whoever adds it may have another Python
    if taken:
        write_code(tmp_path / "code", {}, {"mine": wheel})
        assert (tmp_path / "code/mine.py").exists()
    else:
        with pytest.raises(InvalidArgument, match="this worker has Python"):
            write_code(tmp_path / "code", {}, {"mine": wheel})


@pytest.mark.parametrize("more", [1, 100, 2**31])
def test_a_listing_that_points_out_of_the_archive_is_refused(tmp_path: Path, more: int) -> None:
    path = make_wheel(tmp_path, {"nets.py": "x = 1\n"})
    content = bytearray(path.read_bytes())
    # Where the listing begins is said in the last 22 bytes; entries are moved by what is wrong.
    begin = int.from_bytes(content[-6:-2], "little") + more
    content[-6:-2] = (begin % 2**32).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(InvalidArgument, match="is no wheel"):
        check_wheel(path, path.name)


def test_a_file_that_is_longer_than_its_wheel_costs_no_memory(tmp_path: Path) -> None:
    path = make_wheel(tmp_path, {"nets.py": "x = 1\n"})
    content = bytearray(path.read_bytes())
    listed = content.index(b"PK\1\2")
    content[listed + 20 : listed + 24] = (2**30).to_bytes(4, "little")  # its compressed size
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(InvalidArgument, match="reaches beyond the end"):
            write_code(tmp_path / "code", {}, {path.name: path})
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
