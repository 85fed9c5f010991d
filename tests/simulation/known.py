"""Where each planted bug is known to show: a scenario that `make test` runs again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.simulation.cluster import Services
from tests.simulation.jobs import Shape
from tests.simulation.outcome import Outcome
from tests.simulation.rare import (
    AGAIN,
    ASLEEP,
    CUT_MESSAGES,
    CUT_OFF,
    DEAF,
    FULL,
    GARBAGE,
    LAGGARD,
    ORPHANED_TASKS,
    OVERFLOW,
    PLATEAU,
    TAKEN_OVER,
    UNHEARD,
    Rare,
    bad_jobs,
    program_struck,
)
from tests.simulation.runs import simulate


@dataclass(frozen=True)
class Known:
    """A scenario that shows a bug: a seed, with all its faults or with some kinds only."""

    seed: int
    only: tuple[str, ...] | None = None
    settings: tuple[tuple[str, Any], ...] = ()

    def run(self, given: Services, log: Callable[[str], None] | None = None) -> Outcome:
        """Simulate the scenario; in directed ones all machines give the same bits."""
        if self.only is None:
            return simulate(given, self.seed, log, **dict(self.settings))
        settings = {"mixed": False, **dict(self.settings)}
        return simulate(given, self.seed, log, frozenset(self.only), **settings)


_HEALED = (("lasting", False),)
_CONTROLS = (("controls", 3),)
_RANGES = (("aggregators", 2), ("range_min_bytes", 64))
_PRIVATE = (("workers", 3), ("parts", "private"))
_TWO_LEADERS = (("controls", 3), ("faults_s", 18.0), ("script", "two_leaders"))
_REDUCING = (("workers", 3), ("parts", "all-reduce"))
_TASKS = (("shapes", ()), ("tasks", 2), ("aggregators", 2), ("workers", 2))
_PROGRAMS = program_struck("aggregator")
_COLUMNS = ("parts", "columns")
_OF_TWO_VERSIONS = (("workers", 4), ("old", True), ("parts", "3 replicas"))
_BETWEEN_ROUNDS: Rare = (
    ("kill_control", "kill_storage"),
    (
        _COLUMNS,
        ("aggregators", 2),
        ("workers", 2),
        ("strike", "between_rounds aggregator kill"),
    ),
)
_STREAMS = ("broken_connections", "kill_worker", "pause_worker", "worker_joins", "worker_leaves")
_TASKS_LOST = (
    ("broken_connections", "kill_aggregator", "kill_worker"),
    (*_TASKS, ("strike", "tasks_journalled worker reset")),
)

_EVALUATED = Shape(evaluate_every=7, checkpoint_every=5)
_KEEPING = (("shapes", (Shape(best=True, evaluate_every=5, checkpoint_every=7),)),)
_REDUCING_AND_KEEPING = (*_KEEPING, *_REDUCING)

KNOWN = {
    "storage takes writes of any generation": Known(
        58,
        ("control_hands_over", "isolation", "kill_control", "pause_control"),
        (*_CONTROLS, ("faults_s", 18.0)),
    ),
    "a lost lease can be renewed": Known(2, ("isolation", "pause_control"), _CONTROLS),
    "a lease is taken over although it was renewed": Known(
        2, ("isolation", "one_way_partition", "pause_storage", "slow_link"), _CONTROLS
    ),
    "a lease is taken over before it has expired": Known(4, ("slow_link",), _CONTROLS),
    "a lease runs out by the wall clock": Known(20, ("clock_jump", "slow_link"), _CONTROLS),
    "the generation does not rise": Known(2),
    "records are appended wherever there is room": Known(
        11,
        ("broken_connections", "disk_failure", "kill_control", "kill_storage", "pause_storage"),
    ),
    "a checkpoint takes parts of an old term": Known(
        2,
        ("isolation", "pause_aggregator"),
        (*_RANGES, ("strike", "part_registered aggregator isolate")),
    ),
    "a checkpoint is whole with its first part": Known(1),
    "a finished job gets another term": Known(
        3, (), (("strike", "final_checkpoint aggregator kill"),)
    ),
    "ranges take frames of any term": Known(
        1031,
        (*_STREAMS, "isolation", "kill_aggregator", "kill_control", "pause_aggregator"),
        (("aggregators", 2),),
    ),
    "a filled node adds what comes again": Known(3, (*_STREAMS, "slow_worker"), (("workers", 4),)),
    "nodes are added in the order in which they arrive": Known(0),
    "a round takes frames of other steps": Known(3, settings=_HEALED),
    "a range drops a version once it has the next": Known(
        6, ("broken_connections", "kill_worker", "late_payloads"), (("workers", 1), *_RANGES)
    ),
    "a range keeps what nobody needs any more": Known(0),
    "a round opens before its version is whole": Known(3, settings=_HEALED),
    "the optimizer's state is not restored": Known(0, ("kill_aggregator",)),
    "a checkpoint shares state with the steps after it": Known(5, settings=_HEALED),
    "the end is reported before its checkpoint is whole": Known(0),
    "an aggregator obeys an old generation": Known(0, (), _TWO_LEADERS),
    "one stream waits for another": Known(2, (), (("workers", 2), ("script", "stopped_worker"))),
    "a laggard waits for a version that is gone": Known(10, *LAGGARD),
    "late shards are not copied": Known(
        0, (), (("aggregators", 2), ("workers", 2), ("script", "stuck_payloads"))
    ),
    "a copy is added to what came from home": Known(
        1, ("late_payloads", "pause_worker", "slow_worker"), (("workers", 4),)
    ),
    "what came from home is added to its copy": Known(3, settings=_HEALED),
    "examples are summed over all that came": Known(0),
    "each range reduces what it has of the leaves": Known(0, (), (*_RANGES, ("parts", "krum"))),
    "a reducer does not wait for the last leaf": Known(0, (), (("parts", "median"),)),
    "one shard more than the job says may be left out": Known(0, (), (("parts", "1 backup"),)),
    "what was left out is forgotten with a checkpoint": Known(0, (), (("parts", "1 backup"),)),
    "which shards were left out is forgotten with a checkpoint": Known(
        0, ("kill_aggregator",), (("aggregators", 2), ("parts", "1 backup"))
    ),
    "what a step left out is noted as nothing": Known(0, (), (("parts", "1 backup"),)),
    "a contribution counts again where it comes again": Known(
        0, _STREAMS, (("workers", 3), ("parts", "asynchronous"))
    ),
    "the bound is forgotten with a checkpoint": Known(
        1, ("kill_aggregator", "slow_worker"), (("workers", 3), ("parts", "stale 1"))
    ),
    "after a roll-back every shard is at the step of the job": Known(
        1, ("kill_aggregator", "slow_worker"), (("workers", 3), ("parts", "asynchronous"))
    ),
    "a shard does not wait for an evaluation": Known(0, (), (("parts", "asynchronous"),)),
    "nobody tells of those who are not heard of where nothing moves": Known(
        3,
        (),
        (("aggregators", 2), ("workers", 2), ("script", "stuck_payloads"), ("parts", "stale 1")),
    ),
    "local steps begin anew in every step": Known(0, (), (("parts", "local"),)),
    "any node is encoded": Known(0, _STREAMS, (("workers", 4), ("parts", "int8"))),
    "the first copy of a leaf is believed": Known(
        0, (), (("workers", 4), ("liars", 1), ("parts", "3 replicas"))
    ),
    "a node's state begins at zero wherever the node goes": Known(
        0, _STREAMS, (("workers", 3), ("parts", "top-k"))
    ),
    "what a shard's optimizer remembers begins anew wherever the shard goes": Known(
        0, ("kill_worker",), (("workers", 2), ("parts", "local, inner state"))
    ),
    "what a shard's optimizer remembers is not restored": Known(
        0, ("kill_aggregator",), (("parts", "local, inner state"),)
    ),
    "a checkpoint keeps no versions to make states again from": Known(
        0, ("kill_aggregator", "kill_worker"), (("parts", "sign"),)
    ),
    "a late call raises a term again": Known(4, *AGAIN),
    "each block is rounded as the first one": Known(0, (), (("workers", 2), ("parts", "int8"))),
    "what a leader lists looks whole whoever may lead": Known(2, *CUT_OFF),
    "events are dropped although there is room": Known(0, ("kill_storage",), (("workers", 3),)),
    "the event log is cut too far": Known(
        0,
        ("kill_worker",),
        (("workers", 3), ("limits", (("coordinator.control.event_log:KEPT_MAX", 20),))),
    ),
    "decay begins anew in every range": Known(1),
    "each term has noise of its own": Known(
        2, ("kill_aggregator", "kill_control", "kill_worker"), _PRIVATE
    ),
    "noise begins anew in every range": Known(2, ("kill_aggregator",), (*_PRIVATE, *_RANGES)),
    "a noisy sum is divided by the rows that came": Known(0, ("kill_worker",), _PRIVATE),
    "each step has the noise of the first": Known(0, (), (("parts", "private, 3 replicas"),)),
    "leaves run on a part of a version": Known(1),
    "the newer version is overwritten": Known(
        1, (), (("workers", 2), ("script", "dies_between_ranges"), *_RANGES)
    ),
    "nothing is sent again on a new stream": Known(
        1, ("broken_connections", "late_payloads"), (("workers", 1),)
    ),
    "workers do not carry go records": Known(3, settings=_HEALED),
    "workers do not carry go records again": Known(1, settings=_HEALED),
    "a worker obeys an old generation": Known(0, (), _TWO_LEADERS),
    "a member applies a part of a gradient": Known(0, (), _REDUCING),
    "those who are ahead do the step again": Known(
        0, (), (*_REDUCING, ("strike", "range_ahead worker vanish"))
    ),
    "the gradient of the last step is not kept": Known(0, (), _REDUCING),
    "what came of a task is settled before it is durable": Known(16, *_TASKS_LOST),
    "whoever comes back with a task that is done does it again": Known(1015, *_TASKS_LOST),
    "an owner that was replaced takes its results for stored": Known(
        11, ("isolation", "pause_aggregator"), _TASKS
    ),
    "attempts are numbered anew in every term": Known(16, *_TASKS_LOST),
    "tasks of a stream that broke stay with it": Known(16, *_TASKS_LOST),
    "the death of a worker is a try of its tasks": Known(16, *_TASKS_LOST),
    "an update does not wait for the last sums": Known(0, (), (("parts", "boosting"),)),
    "what a job keeps for itself becomes its model": Known(0, (), (("parts", "cocoa"),)),
    "each round of a step counts as one after a roll-back": Known(5, *_BETWEEN_ROUNDS),
    "a checkpoint that is owed is made between the rounds of a step": Known(
        2, ("pause_storage", "slow_link"), (("shapes", (Shape(checkpoint_every=1),)), _COLUMNS)
    ),
    "a task begins before what it reads is durable": Known(0, *_PROGRAMS),
    "what a task reads comes in the order in which it was done": Known(0, *_PROGRAMS),
    "whoever takes over does not know what was stored before": Known(0, *_PROGRAMS),
    "nothing is passed over": Known(2, *_PROGRAMS),
    "a task that runs again reads nothing": Known(0, *ORPHANED_TASKS),
    "what tasks read is numbered anew where a message is cut": Known(1, *CUT_MESSAGES),
    "a task goes on from what another has kept": Known(0, *_PROGRAMS),
    "what tasks keep for each other outlives their job": Known(0, *_PROGRAMS),
    "effects do not wait for their records": Known(0),
    "records count as durable before they are written": Known(0),
    "the journal is cut before its snapshot is written": Known(3, settings=_HEALED),
    "request ids are forgotten": Known(0),
    "an aggregator that came back empty is adopted": Known(0, ("kill_aggregator",)),
    "a new leader does not look at the jobs' rows": Known(
        3,
        ("isolation", "pause_aggregator"),
        (("controls", 1), ("aggregators", 2), ("strike", "term_raised control kill")),
    ),
    "a job ends without being fenced off": Known(17, settings=_HEALED),
    "a broken session keeps its shards": Known(0, _STREAMS),
    "workers with other bits take part": Known(0, (), (("mixed", True),)),
    "a leaf that is not finite is believed at once": Known(0, ("bad_leaf",)),
    "the deaths of workers count against a job": Known(0, ("kill_worker",)),
    "control takes ranges without a lease of silence": Known(
        0, ("kill_control",), (("controls", 2), ("terms_max", 1))
    ),
    "control takes ranges although workers get further with their owner": Known(0, *UNHEARD),
    "control takes ranges soon after a take-over": Known(0, *TAKEN_OVER),
    "control takes ranges of those who are silent with all others": Known(0, *DEAF),
    "who is silent with all others is taken for lost": Known(0, *DEAF),
    "control blames its members for its own sleep": Known(1, *ASLEEP),
    "callers are not sent away while facts wait for storage": Known(0, *FULL),
    "young blobs are garbage, too": Known(8, *GARBAGE),
    "sums that are not finite are applied": Known(10, *OVERFLOW),
    "an evaluation waits for the next step": Known(0, (), (("shapes", (_EVALUATED,)),)),
    "what a stop rule has seen is not restored": Known(0, *PLATEAU),
    "of equal evaluations the last one is kept": Known(0, (), _KEEPING),
    "what was the best evaluation is not restored": Known(0, ("kill_aggregator",), _KEEPING),
    "each version is kept as the best": Known(0, (), _KEEPING),
    "the version of a checkpoint is restored as the best": Known(1, ("kill_aggregator",), _KEEPING),
    "whoever joins takes what it is sent for the best": Known(
        0, ("worker_joins", "kill_worker"), _REDUCING_AND_KEEPING
    ),
    "no third copy is asked for where two differ": Known(
        0, (), (("workers", 4), ("liars", 1), ("parts", "3 replicas"))
    ),
    "what a job is that is verified is one worker's word": Known(
        2,
        (),
        (("workers", 3), ("liars", 1), ("from_the_first", True), ("parts", "3 replicas")),
    ),
    "workers with another version of a library take part": Known(0, (), _OF_TWO_VERSIONS),
    "whoever describes a job with another version is taken for a liar": Known(
        2, ("kill_control", "kill_worker", "worker_leaves"), _OF_TWO_VERSIONS
    ),
    "whoever's own leaf has other bits takes part": Known(2, (), (("workers", 3), ("odd", True))),
}
"""Where each bug is known to show; found by `hunt`."""

_STUCK = (("aggregators", 2), ("workers", 2), ("script", "stuck_payloads"))
_HANGS_AT_ONCE = (
    ("workers", 3),
    ("slots", 1),
    ("script", "hangs_at_once"),
    ("script_s", 0.0),
    ("leaf_timeout_s", 600.0),
    ("faults_s", 16.0),
    ("every_s", 1.5),
    bad_jobs("", "all-reduce", "all-reduce, local", steps=30),
)
FOUND_BUGS = (
    Known(2, (), _STUCK),  # a worker that never delivered anything held a new job up for ever
    Known(5, (), _STUCK),  # so did one that shards were moved to and that opened no stream
    Known(440),  # ranges that issue no go records saw no late shard in rounds that workers opened
    Known(507),  # a user saw that her job was cancelled before she was answered that it is
    # Where leaves are started one by one, nobody told of a worker whose wishes did not arrive.
    Known(1339),
    Known(3, (), (*_STUCK, ("parts", "stale 1"))),
    # What was left out was told by reports only, of which the last was lost with an aggregator.
    Known(3, (), (("parts", "1 backup"), ("last", "final_checkpoint aggregator kill"))),
    # Jobs that were all told to begin at once were more than may run.
    Known(3, (), (("running_jobs_max", 1),)),
    # A model that was to be built after one that hung was blamed for the end of the process.
    Known(2, settings=(("newcomer", True),)),
    # Of jobs whose workers own the parameters: the final checkpoint did not say why one ended;
    Known(0, (), (("parts", "all-reduce"),)),
    # a worker that was started again was taken for the member that it had been in the same term;
    Known(1000, settings=(("parts", "all-reduce"),)),
    # an evaluation of which nobody began a shard was never missed;
    Known(2, ("hung_leaf",), (("workers", 3), ("parts", "all-reduce"), ("leaf_timeout_s", 600.0))),
    # nobody told of a root that could not load one, as its only leaf process hung in another.
    Known(12, settings=_HANGS_AT_ONCE),
    # One never began that a worker with other bits had described than those that were there.
    Known(3046, settings=(("parts", "all-reduce, clipped gradient"),)),
    # Of a shard whose home was not known no copy was asked of the one worker that could, as it was
    # late for the sake of one that delivers nothing.
    Known(1690),
    # A leader that was cut off, and replaced, showed jobs as running that were known to have ended.
    Known(2075),
    # A job stayed in a term that storage had left for another one, of which it had lost the answer:
    # the member for which it was raised took part again by the time that it was refused.
    Known(1478),
    # Of a worker that was late with its own shards no copy was asked where nobody else could, and
    # control had moved one of them: nobody computed it, and that worker was set aside for ever.
    Known(5046),
    # Each of two workers was waited for what control had moved from it to one that is not heard of.
    Known(6004),
    # A worker was taken for late, again and again, for the sake of one that delivers nothing: the
    # part of its home that control had moved there came from it as copies.
    Known(20298),
    # What a cancelled leaf read was something else by the time that it added what was left out.
    Known(22836),
    # A leader that went on after a pause said of jobs that the next one had taken that there are
    # none, before it had asked storage who leads.
    Known(26022),
    # A leader that heard that ranges cannot begin did not know with which checkpoint: the leader
    # before it had told them.
    Known(24514),
    # A call that no process gets to run had one blamed that was in its batch.
    Known(4909),
    # A leader that was cut off, and replaced, listed jobs as if it knew them all.
    Known(4096),
    # A step was told to be as old as the one before, together with who had been outvoted in it.
    Known(52008),
    # The last member of a job whose workers own the parameters never left: it was drained while it
    # was adopted, and it was one only by its name.
    Known(201293),
    # A worker that joined again between two pages was listed on both.
    Known(90264),
)
"""Scenarios that once found bugs in what ships."""

MISJUDGED = (
    Known(200405),  # an impostor said that a job had failed of which it had just been given ranges
    Known(200770),  # a submission was answered so late that its job was over, and took no quota
    # Storage got stuck after a call was taken on, and before what followed from it was decided.
    Known(301284),
    Known(302515),  # a job of a broken errand was still there when its id was asked for again
)
"""Scenarios in which somebody once blamed what ships for what is right."""

NEWCOMERS = tuple(Known(seed, settings=(("newcomer", True),)) for seed in range(4))
"""Scenarios with a third user."""
CONTROL_DIES = tuple(
    Known(seed, ("kill_control",), (("controls", controls), ("terms_max", 1)))
    for controls in (2, 3)
    for seed in (0, 1)
)
"""Scenarios in which nothing but control processes is killed."""
