"""A long batch that was broken off goes on where it was, with outcomes of the same code only."""

import json
from collections import Counter

from tests.simulation.kept import Kept
from tests.simulation.outcome import Outcome

FIRST = Outcome(7, transitions=5, cpu_s=0.5, faults=Counter(kill_worker=2), trace="ab")
SECOND = Outcome(8, failure="lost", bad_jobs=Counter(nan=1))


def test_what_was_kept_comes_back_and_a_line_that_is_cut_off_does_not(tmp_path):
    path = tmp_path / "new" / "seeds.jsonl"
    kept = Kept(path)
    assert kept.outcomes == {}
    kept.add(FIRST)
    kept.add(SECOND)
    kept.close()
    again = Kept(path)
    again.close()
    assert again.outcomes == {7: FIRST, 8: SECOND}
    assert isinstance(again.outcomes[7].faults, Counter)
    path.write_text(path.read_text()[:-20])
    cut = Kept(path)
    assert cut.outcomes == {7: FIRST}
    cut.add(SECOND)
    cut.close()
    whole = Kept(path)
    whole.close()
    assert whole.outcomes == {7: FIRST, 8: SECOND}


def test_outcomes_of_other_code_do_not_count(tmp_path):
    path = tmp_path / "seeds.jsonl"
    kept = Kept(path)
    kept.add(FIRST)
    kept.close()
    lines = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps({"sources_sha256": "0" * 64}), *lines[1:]]) + "\n")
    other = Kept(path)
    other.close()
    assert other.outcomes == {}
