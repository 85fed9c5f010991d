"""Who follows events or a log sees each once, also across a cluster that goes away."""

from collections import deque

import pytest

from phalanx.errors import DeadlineExceeded, Unavailable
from phalanx.sdk import following
from phalanx.sdk.cluster import Cluster
from phalanx.sdk.job import Job
from phalanx.v1 import cluster_service_pb2, job_pb2, job_service_pb2

AWAY = Unavailable("going down", reason="SHUTTING_DOWN")
QUIET = DeadlineExceeded("nothing in all that time")


class ScriptedBackend:
    """Answers each stream with the next list of items, an error in it ends the stream."""

    def __init__(self, *streams):
        self.address = "nowhere"
        self.streams = deque(streams)
        self.asked = []
        self.alive = deque()

    def call(self, method, request):
        if self.alive and not self.alive.popleft():
            raise AWAY
        return cluster_service_pb2.GetClusterResponse()

    def stream(self, method, request, **_):
        copy = type(request)()
        copy.CopyFrom(request)
        self.asked.append(copy)
        for item in self.streams.popleft():
            if isinstance(item, Exception):
                raise item
            yield item


def event(sequence):
    return cluster_service_pb2.ListEventsResponse(event=job_pb2.Event(sequence=sequence))


def line(text):
    return job_service_pb2.ReadJobLogsResponse(text=text)


@pytest.fixture(autouse=True)
def no_sleep(monkeypatch):
    monkeypatch.setattr(following.time, "sleep", lambda seconds: None)


def test_events_go_on_behind_the_last_one_that_was_seen():
    backend = ScriptedBackend([event(4), event(5), AWAY], [AWAY], [QUIET], [event(9)])
    seen = [each.sequence for each in Cluster(backend).event_messages("j", follow=True)]
    assert seen == [4, 5, 9]
    assert [request.after_sequence for request in backend.asked] == [0, 5, 5, 5]
    assert all(request.follow for request in backend.asked)


def test_lines_of_a_log_are_not_repeated():
    first, rest = [line("a"), line("b")], [line("b"), line("c")]
    backend = ScriptedBackend([*first, AWAY], [*first, *rest])
    job = Job(backend, job_pb2.Job(id="digits-1"))
    assert [each.text for each in job.logs(follow=True)] == ["a", "b", "b", "c"]


def test_nobody_follows_a_cluster_that_is_not_there():
    backend = ScriptedBackend()
    backend.alive.append(False)
    with pytest.raises(Unavailable):
        list(Cluster(backend).event_messages(follow=True))


def test_a_cluster_that_stays_away_is_given_up(monkeypatch):
    now_s = iter(range(1, 1000))
    monkeypatch.setattr(following.time, "monotonic", lambda: next(now_s))
    backend = ScriptedBackend([event(1), AWAY], *[[AWAY]] * 100)
    with pytest.raises(Unavailable, match="going down"):
        list(Cluster(backend).event_messages(follow=True))
    assert len(backend.asked) == 1 + following.REATTACH_S


def test_what_is_not_followed_goes_on_behind_the_last_one_and_ends():
    backend = ScriptedBackend([event(1), AWAY], [event(2)])
    assert [each.sequence for each in Cluster(backend).event_messages()] == [1, 2]
    assert [request.after_sequence for request in backend.asked] == [0, 1]


def test_a_list_is_not_asked_of_a_cluster_that_is_not_there_any_more():
    backend = ScriptedBackend([event(1), AWAY])
    backend.alive.append(False)
    with pytest.raises(Unavailable):
        list(Cluster(backend).event_messages())
    assert len(backend.asked) == 1


def test_a_list_that_nobody_gives_is_given_up(monkeypatch):
    now_s = iter(range(1, 1000))
    monkeypatch.setattr(following.time, "monotonic", lambda: next(now_s))
    backend = ScriptedBackend(*[[AWAY]] * 100)
    with pytest.raises(Unavailable, match="going down"):
        list(Cluster(backend).event_messages())
    assert len(backend.asked) == following.TAKE_OVER_S
