"""The table of docs/RELIABILITY.md: what it says of a figure, and that prose around it stays."""

import json
from dataclasses import replace

import pytest

from bench.reliability.chaos_bits import MARK, verdicts
from bench.reliability.mutants import row_of
from bench.reliability.peers import ROOT, TESTS, all_ran
from bench.reliability.rows import BEGIN, END, Row, Rows, read_rows, with_table
from bench.results import write_json

ROW = Row("gap_s", "longest gap", 0.25, "s", "<= 0.3", True, 50, "python -m bench.reliability gap")


def test_only_the_table_is_replaced():
    document = f"# Title\n\n{BEGIN}\nold\n{END}\n\nMore.\n"
    shown = with_table(document, [ROW, replace(ROW, name="other_s", reached=False, quick=True)])
    assert shown.startswith("# Title\n\n")
    assert shown.endswith("\n\nMore.\n")
    assert "old" not in shown
    first, second = shown.splitlines()[5:7]
    assert "| 0.25 s | ≤ 0.3 | yes | 50 |" in first
    assert "| **no** | 50 (short run) |" in second
    assert with_table(shown, [ROW]) == with_table(document, [ROW])


def test_a_document_without_a_place_for_the_table_is_refused():
    with pytest.raises(ValueError, match="figures"):
        with_table("# Title\n", [ROW])


def test_figures_that_were_not_measured_again_keep_their_value(tmp_path):
    path = tmp_path / "figures.json"
    assert read_rows(path) == []
    write_json([ROW, replace(ROW, name="other_s")], path)
    write_json([replace(ROW, value=0.5, reached=False)], path)
    assert read_rows(path) == [
        replace(ROW, value=0.5, reached=False),
        replace(ROW, name="other_s"),
    ]


def test_a_figure_names_the_commit_that_it_was_measured_at(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.reliability.rows.measured_at", lambda: "abc1234")
    path = tmp_path / "figures.json"
    write_json([Rows("command", quick=False).none("a", "what", 0, trials=3)], path)
    (row,) = json.loads(path.read_text())
    assert row["commit"] == "abc1234"
    del row["commit"]
    path.write_text(json.dumps([row]))
    assert read_rows(path)[0].commit == "unknown", "of before rows named one"


def test_a_figure_is_judged_by_its_bound_and_a_count_by_its_trials():
    made = Rows("command", quick=False)
    worst = made.largest("a", "what", [0.1, 0.31, 0.2], "s", 0.3)
    assert (worst.value, worst.reached, worst.trials, worst.reach) == (0.31, False, 3, "<= 0.3")
    assert made.largest("a", "what", [0.1, 0.3], "s", 0.3).reached
    assert made.at_least("a", "what", 89.9, "%", 90, trials=1, note="").reached is False
    assert made.none("a", "what", 0, trials=3).reached
    assert made.none("a", "what", 0, trials=0).reached is False, "nothing was shown"
    assert made.none("a", "what", 1, trials=3).reached is False
    assert made.all_of("a", "what", 2, "", trials=3).reached is False
    assert made.all_of("a", "what", 3, "", trials=3).reached


def test_a_test_that_did_not_run_shows_nothing():
    suite = '<testsuites><testsuite tests="{}" skipped="{}" /></testsuites>'
    assert all_ran(suite.format(2, 0))
    assert not all_ran(suite.format(2, 1))
    assert not all_ran(suite.format(0, 0))
    assert not all_ran("<testsuites />")


def test_the_tests_of_what_others_get_wrong_are_there():
    for test in TESTS:
        path, _, name = test.partition("::")
        assert f"def {name}" in (ROOT / path).read_text()


def test_a_run_of_chaos_that_did_not_pass_is_no_run_with_the_same_bits():
    cases = '<testcase name="a" />' + "".join(
        f'<testcase name="{kind}"><{kind} /></testcase>' for kind in ("failure", "error", "skipped")
    )
    suites = f"<testsuites><testsuite>{cases}</testsuite></testsuites>"
    assert verdicts(suites) == (["a"], ["failure", "error", "skipped"])
    assert verdicts("<testsuites />") == ([], [])


def test_tests_of_chaos_that_compare_bits_are_marked():
    """What is compared is told in so many words; a test without the mark would not be counted."""
    assert MARK.startswith("same_bits")
    for path in sorted((ROOT / "tests/chaos").glob("test_*.py")):
        text = path.read_text()
        if "parameters_sha256 == " in text and "soak" not in path.name:
            assert "pytest.mark.same_bits" in text, path.name


def hunted(number, by):
    return {"name": f"bug {number}", "seeds": number, "found": bool(by), "by": by}


def test_a_planted_bug_that_was_not_found_is_named():
    found = [hunted(n, "swarm" if n < 20 else "scenario") for n in range(1, 26)]
    row = row_of(found, "command", quick=False)
    assert (row.value, row.trials, row.reached) == (25, 25, True)
    assert row.note == (
        "19 by one of 60 seeds of the swarm, 1 of them by the first; "
        "6 by seeds of a scenario that brings them about, the last after 25"
    )
    row = row_of([*found, hunted(2000, "")], "c", quick=False)
    assert row.reached is False
    assert "not found: bug 2000" in row.note
    assert row_of(found[:5], "c", quick=False).reached is False, "too few were planted"
