from datetime import UTC, datetime, timedelta

import pytest

from phalanx import plotting
from phalanx.errors import FailedPrecondition
from phalanx.plotting import DEATH, RECOVERY, Incident, incidents_of, plot_curves
from phalanx.sdk.values import Event, MetricPoint

START = datetime(2030, 1, 1, tzinfo=UTC)


def point(step, name="train/loss", value=1.0):
    return MetricPoint(step, START + timedelta(seconds=step), name, value)


def event(kind, step=None, at_s=0.0, worker_id=""):
    time = START + timedelta(seconds=at_s)
    return Event(1, time, kind, "told", "job", worker_id, "", None, step, {})


def test_deaths_and_recoveries_are_marked_at_their_steps():
    events = [
        event("WORKER_LOST", step=7, worker_id="worker-2"),
        event("SHARDS_MOVED", step=7),
        event("RECOVERED", at_s=8.5),
    ]
    marks = incidents_of(events, [point(8), point(9)])
    assert [(mark.kind, mark.step) for mark in marks] == [(DEATH, 7), (RECOVERY, 8.5)]
    assert "worker-2" in marks[0].text


@pytest.mark.parametrize(("at_s", "step"), [(-5.0, 1), (99.0, 4), (2.5, 2.5)])
def test_an_event_without_a_step_is_placed_by_its_time(at_s, step):
    points = [point(1), point(2), point(3), point(4)]
    assert incidents_of([event("WORKER_LOST", at_s=at_s)], points)[0].step == step


def test_an_event_without_any_measurement_is_placed_at_the_start():
    assert incidents_of([event("WORKER_LOST")], [])[0].step == 0


def test_writes_a_picture(tmp_path):
    file = tmp_path / "curves.png"
    points = [point(step, value=1 / step) for step in range(1, 50)]
    points += [point(step, "test/accuracy", step / 50) for step in range(10, 50, 10)]
    marks = [Incident(DEATH, 20, f"death {n}") for n in range(20)]
    plot_curves(file, "a job", points, marks)
    assert file.read_bytes().startswith(b"\x89PNG")


def test_a_job_without_measurements_gives_an_empty_picture(tmp_path):
    file = tmp_path / "curves.png"
    plot_curves(file, "a job", [], [])
    assert file.stat().st_size > 0


def test_numbers_of_marks_never_lie_on_each_other(tmp_path):
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    axes.set_xlim(0, 100)
    marks = [Incident(DEATH, step, "") for step in (10, 10.5, 11, 50)]
    plotting._draw_marks(axes, marks, with_numbers=True)
    places = [(text.xy[0], text.xyann[1]) for text in axes.texts]
    rows = [row for _, row in places]
    assert rows[:3] == sorted(set(rows[:3]))
    assert rows[3] == rows[0]


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(plotting, "import_module", missing)
    with pytest.raises(FailedPrecondition, match="phalanx\\[plot\\]"):
        plotting.require_matplotlib()
