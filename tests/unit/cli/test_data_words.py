"""What is said of options of data: flags on the command line, arguments in Python."""

import re
from pathlib import Path

import pytest
import typer.main

import phalanx.data
from phalanx.cli.commands.data import flag, group
from phalanx.data.options import IngestOptions
from phalanx.data.wording import option, spelled
from phalanx.errors import InvalidArgument

GAP = "age,town,y\n1,ulm,0\n,bonn,1\n3,ulm,1\n"
IDS = "n,my id,y\n" + "".join(f"{n},id{n},{n % 2}\n" for n in range(1200))


def written(folder: Path, text: str, name: str = "data.csv") -> str:
    file = folder / name
    file.write_text(text)
    return str(file)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GAP, "is added: --missing category (a category of its own, the mean in numeric columns)"),
        (IDS, "leave it out with --ignore 'my id', or raise --max-categories"),
    ],
)
def test_the_command_line_hears_of_flags(phalanx, tmp_path, text, said):
    outcome = phalanx("data", "add", "a", written(tmp_path, text))
    assert (outcome.code, said in outcome.err) == (2, True), outcome.err


def test_train_names_flags_of_its_own_and_who_has_the_others(phalanx, tmp_path):
    job = written(tmp_path, "name: a\ndata: {name: a}\n", "job.yaml")
    refused = phalanx("train", job, "--data", written(tmp_path, GAP))
    assert "is added: --missing category (" in refused.err
    refused = phalanx("train", job, "--data", written(tmp_path, IDS))
    assert "with `phalanx data add … --ignore 'my id'`, or raise" in refused.err


def test_train_says_what_it_assumed_of_data(phalanx, cluster, tmp_path):
    cluster.fail("SubmitJob", InvalidArgument("not now"))
    job = written(tmp_path, "name: a\ndata: {name: a}\n", "job.yaml")
    outcome = phalanx("train", job, "--data", written(tmp_path, "x,y\n1,0\n2,1\n"))
    assert "note: the target is the last column, 'y' (option `target` overrules)" in outcome.err


def test_words_are_those_of_python_again_afterwards():
    with spelled(flag):
        assert option("missing", "mean") == "--missing mean"
        assert option("link", True) == "--link"
    assert option("missing", "mean") == "missing='mean'"
    assert option("ignore", "id") == "ignore=['id']"
    assert option("link", True) == "link=True"
    assert option("format") == "format="


def test_every_option_that_a_message_names_is_there():
    advised = set()
    for file in Path(phalanx.data.__path__[0]).rglob("*.py"):
        advised.update(re.findall(r"\boption\([\"'](\w+)[\"']", file.read_text()))
        advised.update(re.findall(r"option `(\w+)`", file.read_text()))
    assert len(advised) > 10
    assert advised <= set(IngestOptions.__dataclass_fields__)
    flags = {name for each in _parameters() for name in (*each.opts, *each.secondary_opts)}
    assert {flag(name) for name in advised} <= flags


def _parameters():
    return typer.main.get_command(group).commands["add"].params
