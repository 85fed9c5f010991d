"""scripts/bootstrap on made-up machines: no network, and a lock file without packages."""

import importlib.util
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
TOOLS = "cat chmod cp cut date dirname env ls mkdir mktemp mv rm sed sh sha256sum tail uname"

# Stands in for the interpreter of a new environment: answers for pip and hands on the rest.
STAND_IN = """#!/bin/sh
case " $* " in
  *" ensurepip "*) exit {ensurepip} ;;
  *pip\\ install*) {pip} ;;
esac
exec "$(dirname -- "$0")/python.real" "$@"
"""

# Makes environments as usual, and puts the stand-in into them.
QUICK_PYTHON = """case " $* " in
  *" venv "*)
    "{python}" "$@" || exit 1
    for environment; do :; done
    mv "$environment/bin/python" "$environment/bin/python.real"
    cp "{stand_in}" "$environment/bin/python"
    exit 0 ;;
esac
exec "{python}" "$@"
"""


class Machine:
    """A copy of the project's set-up in a folder with a space, and a PATH with chosen programs."""

    def __init__(self, folder: Path) -> None:
        self.project = folder / "my projects" / "phalanx"
        self.bin = folder / "bin"
        (self.project / "scripts").mkdir(parents=True)
        (self.project / "requirements").mkdir()
        self.bin.mkdir()
        # Wheels of this very system would be taken first.
        script = (ROOT / "scripts/bootstrap").read_text(encoding="utf-8")
        script = script.replace("wheel=$(last_file /usr/", f"wheel=$(last_file {folder}/usr/")
        script = script.replace("=/etc/ssl/", f"={folder}/etc/ssl/")
        (self.project / "scripts/bootstrap").write_text(script, encoding="utf-8")
        shutil.copy(ROOT / "pyproject.toml", self.project)
        for lock in ("runtime", "dev"):
            (self.project / f"requirements/{lock}.txt").write_text("# nothing\n")
        for tool in TOOLS.split():
            found = shutil.which(tool)
            assert found, tool
            (self.bin / tool).symlink_to(found)

    @property
    def environment(self) -> Path:
        return self.project / ".venv-demo"

    def program(self, name: str, text: str) -> None:
        path = self.bin / name
        path.write_text("#!/bin/sh\n" + text)
        path.chmod(0o755)

    def real_python(self) -> None:
        """Put this interpreter on the machine."""
        self.program("python3.11", f'exec "{sys.executable}" "$@"\n')

    def quick_python(self, *, ensurepip: int = 0, pip: str = "exit 0") -> None:
        """Put an interpreter on the machine whose environments only pretend to install.

        ``ensurepip`` is its exit code, ``pip`` what is run for ``pip install``.
        """
        self.program("stand-in", STAND_IN.format(ensurepip=ensurepip, pip=pip))
        stand_in = self.bin / "stand-in"
        self.program("python3.11", QUICK_PYTHON.format(python=sys.executable, stand_in=stand_in))

    def bootstrap(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", "scripts/bootstrap", *arguments],
            cwd=self.project,
            env={"PATH": str(self.bin), "HOME": str(self.project), **environ},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def _installations(result: subprocess.CompletedProcess[str]) -> list[str]:
    """Return what an ``echo "$*"`` in the place of pip has written."""
    return [line for line in result.stderr.splitlines() if "pip install" in line]


def test_without_python_it_says_what_to_install_and_stops(machine: Machine) -> None:
    result = machine.bootstrap("prepare", "demo")
    assert result.returncode == 1
    assert "apt-get install -y python3\n" in result.stderr
    assert not machine.environment.exists()


def test_newest_python_that_really_runs_is_taken(machine: Machine) -> None:
    machine.program("python3.14", "echo 'no such version is installed' >&2; exit 127\n")
    machine.quick_python()
    machine.program("python3", f'echo used-the-plain-one >&2; exec "{sys.executable}" "$@"\n')
    result = machine.bootstrap("prepare", "demo")
    assert result.returncode == 0, result.stderr
    assert "used-the-plain-one" not in result.stderr


def test_environment_is_made_once_with_sizes_said_first(machine: Machine) -> None:
    # Debian's Python has its pip in a package of its own.
    if importlib.util.find_spec("ensurepip") is not None:
        machine.real_python()
    else:
        machine.quick_python()
    first = machine.bootstrap("prepare", "demo", PIP_USER="1", PYTHONPATH="/nowhere")
    assert first.returncode == 0, first.stderr
    assert "MB to download" in first.stderr.splitlines()[1]
    mark = machine.environment / "mark"
    mark.touch()
    second = machine.bootstrap("prepare", "demo")
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert mark.exists()


def test_unfinished_or_outdated_environment_is_made_anew(machine: Machine) -> None:
    machine.quick_python()
    assert machine.bootstrap("prepare", "demo").returncode == 0
    mark = machine.environment / "mark"

    def interrupted() -> None:
        (machine.environment / "stamp").unlink()

    def new_lock() -> None:
        (machine.project / "requirements/runtime.txt").write_text("# changed\n")

    for spoil in (interrupted, new_lock):
        mark.touch()
        spoil()
        assert machine.bootstrap("prepare", "demo").returncode == 0
        assert not mark.exists()


def test_environment_of_a_project_that_was_moved_is_made_anew(machine: Machine) -> None:
    machine.quick_python()
    assert machine.bootstrap("prepare", "demo").returncode == 0
    moved = machine.project.with_name("elsewhere")
    machine.project.rename(moved)
    machine.project = moved
    assert machine.bootstrap("prepare", "demo").returncode == 0
    link = next(machine.environment.glob("lib/python*/site-packages/phalanx.pth"))
    assert link.read_text() == f"{moved}\n"


def test_failed_installation_leaves_nothing_to_believe_in(machine: Machine) -> None:
    machine.quick_python(pip="echo 'hashes do not match' >&2; exit 1")
    result = machine.bootstrap("prepare", "demo")
    assert result.returncode == 1
    assert "hashes do not match" in result.stderr
    assert "The installation failed" in result.stderr
    assert not (machine.environment / "stamp").exists()


@pytest.mark.parametrize(("kind", "lock"), [("demo", "runtime"), ("test", "dev")])
def test_packages_come_as_wheels_with_hashes_only(machine: Machine, kind: str, lock: str) -> None:
    machine.quick_python(pip='echo "$*" >&2; exit 0')
    (line,) = _installations(machine.bootstrap("prepare", kind))
    assert "--require-hashes" in line
    assert "--only-binary :all:" in line
    assert line.endswith(f"/my projects/phalanx/requirements/{lock}.txt")


def test_pip_and_certificates_come_from_debian_packages_where_there_are_none(
    machine: Machine, tmp_path: Path
) -> None:
    packages = tmp_path / "packages"
    wheel = packages / "python3-pip-whl/usr/share/python-wheels/pip-99.0-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("pip/__init__.py", "")
        path = f"{tmp_path}/etc/ssl/certs/ca-certificates.crt"
        archive.writestr("pip/_vendor/certifi/core.py", f"DEBIAN_CA_CERTS_PATH = {path!r}\n")
    roots = packages / "ca-certificates/usr/share/ca-certificates/mozilla"
    roots.mkdir(parents=True)
    for name in ("b", "a"):
        (roots / f"{name}.crt").write_text(f"certificate {name}\n")
    machine.quick_python(ensurepip=1, pip='echo "$*" >&2; exit 0')
    machine.program("apt-get", '[ "$1" = download ] && : >"$3_1.0_all.deb"\n')
    machine.program("dpkg-deb", f'cp -r "{packages}/${{2%%_*}}/." "$3"\n')
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    result = machine.bootstrap("prepare", "demo", TMPDIR=str(scratch))
    assert result.returncode == 0, result.stderr
    (installation,) = _installations(result)
    assert "--require-hashes" in installation
    bundle = machine.environment / "certificates.pem"
    assert bundle.read_text() == "certificate a\ncertificate b\n"
    core = next(machine.environment.glob("lib/python*/site-packages/pip/_vendor/certifi/core.py"))
    assert core.read_text() == f"DEBIAN_CA_CERTS_PATH = {str(bundle)!r}\n"
    assert list(scratch.iterdir()) == []


def test_without_any_pip_it_says_what_to_install(machine: Machine) -> None:
    machine.quick_python(ensurepip=1)
    machine.program("apt-get", "exit 100\n")
    machine.program("dpkg-deb", "exit 2\n")
    result = machine.bootstrap("prepare", "demo")
    assert result.returncode == 1
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert f"apt-get install -y python{version}-venv\n" in result.stderr
    assert not (machine.environment / "stamp").exists()


def test_version_is_that_of_the_project(machine: Machine) -> None:
    machine.quick_python()
    assert machine.bootstrap("prepare", "demo").returncode == 0
    program = "from importlib.metadata import version; print(version('phalanx'))"
    python = machine.environment / "bin/python"
    shown = subprocess.run(
        [python, "-P", "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert shown.stdout == f"{project['version']}\n"


def test_working_tree_is_importable_and_has_its_command(machine: Machine) -> None:
    machine.quick_python()
    package = machine.project / "phalanx/cli"
    package.mkdir(parents=True)
    (package / "entry.py").write_text(
        "import sys\ndef main():\n    print(sys.argv)\n    return 6\n", encoding="utf-8"
    )
    result = machine.bootstrap("phalanx", "submit", "a b")
    assert result.stdout == "['phalanx', 'submit', 'a b']\n"
    assert result.returncode == 6


def test_help_is_the_head_of_the_script(machine: Machine) -> None:
    result = machine.bootstrap()
    assert result.returncode == 2
    assert result.stderr.startswith("From a bare machine to a running command")
    assert "set -eu" not in result.stderr
