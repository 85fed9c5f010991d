import subprocess
import sys

import pytest

COMMANDS = [
    *("up", "down", "status", "doctor", "submit", "train", "jobs", "show", "watch", "cancel"),
    *("pause", "resume", "retry", "delete", "verify", "logs", "metrics", "events", "workers"),
    *("drain", "predict", "gc", "health", "chaos", "backup", "scrub"),
]
GROUPS = {
    "data": ["add", "list", "show", "delete"],
    "models": ["list", "show", "get", "export", "delete"],
    "code": ["add", "list"],
    "certs": ["init", "issue", "renew", "list"],
    "token": ["create", "list", "revoke"],
}
PROGRAMS = ["coordinator", "aggregator", "worker", "storage", "restore"]
"""Commands that hand their options on to a program of their own."""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(offline, command):
    outcome = offline(command, "--help")
    assert outcome.code == 0
    assert f"phalanx {command}" in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= 80


@pytest.mark.parametrize(("group", "command"), [(g, c) for g, cs in GROUPS.items() for c in cs])
def test_every_command_of_a_group_explains_itself(offline, group, command):
    outcome = offline(group, command, "--help")
    assert outcome.code == 0
    assert f"phalanx {group} {command}" in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= 80


def test_help_lists_every_command_and_fits_80_columns(offline):
    outcome = offline("--help")
    assert outcome.code == 0
    words = outcome.out.split()
    for command in [*COMMANDS, *GROUPS, *PROGRAMS]:
        assert command in words
    assert max(map(len, outcome.out.splitlines())) <= 80


def test_paragraphs_fill_80_columns_and_flags_ask_for_no_value(offline):
    lines = [line.rstrip() for line in offline("up", "--help").out.splitlines()]
    assert max(map(len, lines)) <= 80
    first = next(line for line in lines if line.startswith(" Storage, control"))
    following = lines[lines.index(first) + 1].split()[0]
    assert len(first) + 1 + len(following) > 79, "the line could have held the next word"
    [detach] = [line for line in lines if "--detach" in line and line.startswith("│")]
    assert "bool" not in detach


def test_each_summary_fits_one_line(offline):
    lines = offline("--help").out.splitlines()
    for command in [*COMMANDS, *GROUPS, *PROGRAMS]:
        summary = next(line for line in lines if line.startswith(f"│ {command} "))
        assert summary.rstrip(" │").endswith(".")


@pytest.mark.parametrize("command", [(), ("data",)])
def test_no_command_shows_the_help_and_is_a_usage_error(offline, command):
    outcome = offline(*command)
    assert outcome.code == 2
    assert "Usage: phalanx" in outcome.out
    assert outcome.err.startswith("error: a command is missing; see phalanx")


@pytest.mark.parametrize(
    "command", [*((each,) for each in COMMANDS), *((g, c) for g, cs in GROUPS.items() for c in cs)]
)
def test_no_type_is_shown_where_no_value_is_wanted(offline, command):
    shown = offline(*command, "--help").out
    assert "<bool>" not in shown
    assert "{name}" not in shown


def test_version(offline):
    import phalanx

    outcome = offline("--version")
    assert (outcome.code, outcome.out) == (0, f"phalanx {phalanx.__version__}\n")


def test_help_loads_neither_numpy_nor_grpc():
    program = (
        "import sys\n"
        "from phalanx.cli.main import run\n"
        "run(['--help'])\n"
        "heavy = {'numpy', 'grpc', 'pyarrow', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_an_option_of_all_commands_after_one_is_told_its_place(offline):
    outcome = offline("results", "job-1", "--address", "127.0.0.1:1")
    assert outcome.code == 2
    said = "--address comes before the command, as in phalanx --address … results; see phalanx"
    assert outcome.err.startswith(f"error: {said}")


def test_a_folder_is_no_job_file(offline, tmp_path):
    outcome = offline("submit", str(tmp_path))
    assert outcome.code == 2
    assert outcome.err == f"error: {tmp_path} is a folder; give the path of a job file\n"


@pytest.mark.parametrize("option", ["--token-file", "--ca"])
def test_a_file_of_keys_that_is_not_there_is_named(offline, tmp_path, option):
    refused = offline("--json", option, str(tmp_path / "missing"), "jobs")
    assert refused.code == 2
    assert str(tmp_path / "missing") in refused.error()["message"]


@pytest.mark.parametrize(
    ("path", "error", "words"),
    [
        ("s3://bucket/a.parquet", "UNIMPLEMENTED", "s3://bucket/a.parquet: this version reads no"),
        (__file__, "INVALID_ARGUMENT", "does not tell its format"),
        ("a.csv", "INVALID_ARGUMENT", "only Parquet files can be linked, not csv"),
    ],
)
def test_what_cannot_be_linked_is_told_why(offline, tmp_path, monkeypatch, path, error, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text("a,b\n1,2\n2,1\n")
    refused = offline("--json", "data", "add", "name", path, "--link")
    assert refused.code == 2
    assert refused.error()["code"] == error
    assert words in refused.error()["message"]
