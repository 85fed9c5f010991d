"""Parts of a job that do not go together are refused with the reason; others are planned."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from phalanx import specs
from phalanx.errors import InvalidArgument
from phalanx.specs.parts import equal_copies, needs_one_range, unit_span
from phalanx.specs.plan import worker_bytes
from phalanx.v1.dataset_service_pb2 import Dataset
from phalanx.v1.job_pb2 import Plan
from phalanx.v1.job_spec_pb2 import JobSpec

MakeDataset = Callable[..., Dataset]
BASE = "name: job\ndata: {name: fashion}\ntrain: {model: {mlp: {hidden: [8]}}, batch_size: 4096}"


def edited(*settings: str) -> JobSpec:
    return specs.apply_sets(specs.load_yaml(BASE), settings)


def complaints(dataset: Dataset, *settings: str) -> dict[str, str]:
    with pytest.raises(InvalidArgument) as caught:
        specs.prepare(edited(*settings), dataset)
    return {each.field: each.message for each in caught.value.violations}


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_fraction_that_is_no_number_is_complained_of_once(
    make_dataset: MakeDataset, number: float
) -> None:
    spec = edited("train.verification={audit_fraction: 0.5}")
    spec.train.verification.audit_fraction = number
    with pytest.raises(InvalidArgument) as caught:
        specs.prepare(spec, make_dataset())
    found = [(each.field, each.message) for each in caught.value.violations]
    assert found == [
        ("train.verification.audit_fraction", f"must be a finite number, not {number}")
    ]


def planned(dataset: Dataset, *settings: str) -> Plan:
    resolved = specs.prepare(edited(*settings), dataset)
    return specs.plan(resolved, dataset)


@pytest.mark.parametrize(
    ("shards", "setting", "field", "says"),
    [
        (2, "reduction={median: {}}", "reduction.median", "at least 3 shards"),
        (4, "reduction={trimmed_mean: {}}", "reduction.trimmed_mean.trim", "at least 1"),
        (
            4,
            "reduction={trimmed_mean: {trim: 2}}",
            "reduction.trimmed_mean.trim",
            "all of them; raise data.shards to at least 5",
        ),
        (6, "reduction={krum: {faulty: 2}}", "reduction.krum.faulty", "at least 7"),
        (7, "reduction={krum: {faulty: 2, keep: 6}}", "reduction.krum.keep", "at most 5"),
        (7, "reduction={krum: {faulty: 2, keep: 0}}", "reduction.krum.keep", "at least 1"),
        (7, "reduction={krum: {faulty: -1}}", "reduction.krum.faulty", "at least 0"),
        (7, "reduction={clip_norm: 0}", "reduction.clip_norm", "above 0"),
        (7, "synchronous={backup_shards: -1}", "synchronous.backup_shards", "at least 0"),
        (
            7,
            "synchronous={backup_shards: 1}",
            "synchronous.backup_shards",
            "no bits can be promised",
        ),
        (7, "stale={bound: -1}", "stale.bound", "at least 0"),
        (
            7,
            "asynchronous={barrier_every_clocks: -1}",
            "asynchronous.barrier_every_clocks",
            "at least 0",
        ),
        (
            7,
            "asynchronous={delay_compensated: {strength: -1}}",
            "asynchronous.delay_compensated.strength",
            "a number from 0 on",
        ),
        (7, "optimizer={clip_norm: 0}", "optimizer.clip_norm", "above 0"),
        (7, "local={steps: 1, outer: {clip_norm: -1}}", "local.outer.clip_norm", "above 0"),
        (7, "local={}", "local.steps", "at least 1"),
        (7, "local={steps: 100000}", "local.steps", "at most 65536"),
        (
            7,
            "local={steps: 2, outer: {sgd: {nesterov: true}}}",
            "local.outer.sgd.nesterov",
            "needs a momentum",
        ),
        (
            7,
            "local={steps: 2, outer: {sgd: {learning_rate: -1}}}",
            "local.outer.sgd.learning_rate",
            "above 0",
        ),
        (7, "compression={cast_to: int4}", "compression.cast_to", "bfloat16 or float16"),
        (7, "compression={cast_to: ''}", "compression.cast_to", "bfloat16 or float16"),
        (7, "compression={down_cast_to: int8}", "compression.down_cast_to", "or float16"),
        (7, "compression={int8: {bucket: 8}}", "compression.int8.bucket", "at least 16"),
        (7, "compression={top_k: {}}", "compression.top_k.fraction", "above 0 and at most 1"),
        (7, "compression={top_k: {fraction: 1.5}}", "compression.top_k.fraction", "not 1.5"),
    ],
)
def test_parts_that_cannot_hold_are_refused(
    make_dataset: MakeDataset, shards: int, setting: str, field: str, says: str
) -> None:
    found = complaints(make_dataset(), f"data.shards={shards}", f"train.{setting}")
    assert says in found[f"train.{field}"]


def test_the_default_number_of_shards_counts(make_dataset: MakeDataset) -> None:
    setting = "train.reduction={krum: {faulty: 7}}"
    assert "the job has 16" in complaints(make_dataset(), setting)["train.reduction.krum.faulty"]
    specs.prepare(edited("train.reduction={krum: {faulty: 6}}"), make_dataset())


@pytest.mark.parametrize(
    ("settings", "field", "says"),
    [
        (["train.verification={replicas: 1}"], "train.verification.replicas", "at least 3"),
        (["train.verification={replicas: 99}"], "train.verification.replicas", "at most 63"),
        (["train.verification={replicas: 4}"], "train.verification.replicas", "use 3 or 5"),
        (
            ["train.verification={audit_fraction: 0}"],
            "train.verification.audit_fraction",
            "above 0",
        ),
        (
            ["train.verification={audit_fraction: 1.5}"],
            "train.verification.audit_fraction",
            "at most 1, not 1.5",
        ),
        (
            ["train.verification={replicas: 5}", "resources.max_workers=4"],
            "resources.max_workers",
            "use at least 5",
        ),
        (
            ["train.verification={audit_fraction: 0.1}", "resources.max_workers=2"],
            "resources.max_workers",
            "use at least 3",
        ),
        (
            ["train.verification={}", "train.asynchronous={}"],
            "train.verification",
            "no second copy to compare it with",
        ),
        (
            ["train.verification={}", "train.stale={bound: 2}"],
            "train.verification",
            "that stale makes in the order of arrival",
        ),
        (
            ["train.verification={}", "reproducibility={tolerant: {}}"],
            "reproducibility.tolerant",
            "say nothing about who is wrong",
        ),
        (
            ["train.verification={}", "reproducibility={bitwise: {fall_back_after: 30s}}"],
            "reproducibility.bitwise.fall_back_after",
            "would differ although nobody is wrong",
        ),
    ],
)
def test_copies_that_cannot_be_compared_are_refused(
    make_dataset: MakeDataset, settings: list[str], field: str, says: str
) -> None:
    found = complaints(make_dataset(), *settings)
    assert list(found) == [field]
    assert says in found[field]


@pytest.mark.parametrize(
    "setting",
    ["synchronous={}", "stale={bound: 0}", "local={steps: 2}", "reduction={median: {}}"],
)
def test_what_is_verified_travels_leaf_by_leaf_to_one_range(
    make_dataset: MakeDataset, setting: str
) -> None:
    dataset = make_dataset()
    resolved = specs.prepare(edited(f"train.{setting}", "train.verification={}"), dataset)
    assert resolved.train.verification.replicas == 3
    assert equal_copies(resolved.train) == 2
    assert unit_span(resolved) == 1
    assert needs_one_range(resolved)
    assert specs.job_plan(resolved, dataset, "job-1").verified
    plain = specs.prepare(edited(f"train.{setting}"), dataset)
    assert not specs.job_plan(plain, dataset, "job-1").verified
    assert worker_bytes(resolved, dataset) > worker_bytes(plain, dataset)


def test_what_is_encoded_is_verified_by_the_nodes_that_are_encoded(
    make_dataset: MakeDataset,
) -> None:
    settings = ("train.verification={replicas: 5}", "train.compression={int8: {}}")
    resolved = specs.prepare(edited(*settings), make_dataset())
    assert (unit_span(resolved), equal_copies(resolved.train)) == (2, 3)


def test_too_few_workers_to_agree_are_told_of_before_the_job_runs(
    make_dataset: MakeDataset,
) -> None:
    dataset = make_dataset()
    resolved = specs.prepare(edited("train.verification={replicas: 5}"), dataset)

    def told(eligible: int) -> bool:
        return any(
            "have to agree" in each for each in specs.plan(resolved, dataset, eligible).warnings
        )

    assert [told(eligible) for eligible in (0, 1, 2, 3)] == [False, True, True, False]


@pytest.mark.parametrize(
    ("setting", "span"),
    [
        ("reduction={median: {}}", 1),
        ("reduction={trimmed_mean: {trim: 1}}", 1),
        ("reduction={krum: {faulty: 1}}", 1),
        ("reduction={clip_norm: 1}", 1),
        ("reduction={weighted_mean: {}}", 0),
        ("local={steps: 2}", 0),
        ("compression={cast_to: float16}", 2),
        ("compression={int8: {}}", 2),
        ("compression={top_k: {fraction: 0.01}}", 2),
        ("compression={down_cast_to: float16}", 0),
    ],
)
def test_what_travels(make_dataset: MakeDataset, setting: str, span: int) -> None:
    dataset = make_dataset()
    resolved = specs.prepare(edited(f"train.{setting}"), dataset)
    assert unit_span(resolved) == specs.job_plan(resolved, dataset, "job-1").unit_span == span
    assert needs_one_range(resolved) == (span == 1)


@pytest.mark.parametrize(
    ("shards", "span"), [(1, 1), (8, 1), (9, 2), (16, 2), (17, 4), (64, 8), (65, 16)]
)
def test_lossy_contributions_travel_in_at_most_eight_nodes(
    make_dataset: MakeDataset, shards: int, span: int
) -> None:
    spec = edited(f"data.shards={shards}", "train.compression={cast_to: bfloat16}")
    assert unit_span(specs.prepare(spec, make_dataset())) == span
    assert -(-shards // span) <= 8


def test_compressors_have_defaults(make_dataset: MakeDataset) -> None:
    resolved = specs.prepare(edited("train.compression={int8: {}}"), make_dataset())
    assert resolved.train.compression.int8.bucket == 512


def test_payloads_that_travel_by_themselves_need_memory(make_dataset: MakeDataset) -> None:
    plain = planned(make_dataset()).worker_bytes
    leaves = planned(make_dataset(), "train.reduction={median: {}}").worker_bytes
    parameters = 4 * ((784 + 1) * 8 + (8 + 1) * 10)
    assert leaves - plain == 15 * parameters
    shared = planned(
        make_dataset(), "train.reduction={median: {}}", "resources.min_workers=4"
    ).worker_bytes
    assert shared - plain == 3 * parameters


def test_the_plan_warns_of_steps_that_change_nothing(make_dataset: MakeDataset) -> None:
    krum = "train.reduction={krum: {faulty: 2}}"
    # 10,000 rows on 9 shards: one shard has a row more than the others, 1112 instead of 1111.
    settings = ("data.shards=9", f"train.batch_size={101 * 9}", krum)
    (warning,) = [each for each in planned(make_dataset(), *settings).warnings if "epoch" in each]
    assert "rows of 1 shard only" in warning
    assert "needs 7" in warning
    (warning,) = planned(make_dataset(), *settings[:2], "train.reduction={median: {}}").warnings
    assert "outvotes nobody: the median needs 3" in warning, "but it does change something"
    other = planned(make_dataset(), "data.shards=9", f"train.batch_size={100 * 9}", krum)
    assert not [each for each in other.warnings if "epoch" in each]


def test_local_steps_count_in_commits(make_dataset: MakeDataset) -> None:
    """10,000 rows on 16 shards of 256 rows a step: 3 own steps in an epoch."""
    settings = (
        "train.local={steps: 5}",
        "train.stop={epochs: 10}",
        "train.evaluation={split: test}",
    )
    resolved = specs.prepare(edited(*settings), make_dataset())
    outer = resolved.train.local.outer
    assert (outer.sgd.learning_rate, outer.sgd.momentum) == (1.0, 0.0)
    assert resolved.train.evaluation.every_steps == 1
    plan = specs.job_plan(resolved, make_dataset(), "job-1")
    assert (plan.local_steps, plan.steps_per_epoch, plan.total_steps) == (5, 3, 6)
    assert planned(make_dataset(), *settings).steps == 6
    synchronous = specs.job_plan(specs.prepare(edited(), make_dataset()), make_dataset(), "job-1")
    assert (synchronous.local_steps, synchronous.total_steps) == (0, 30)


def test_steps_and_epochs_of_local_jobs_are_compared_in_commits(make_dataset: MakeDataset) -> None:
    settings = ("train.local={steps: 3}", "train.stop={epochs: 10, steps: 11}")
    warnings = planned(make_dataset(), *settings).warnings
    assert [each for each in warnings if "stop.steps never fires" in each]


@pytest.mark.parametrize("mode", ["", "bitwise", "tolerant"])
def test_backup_shards_and_verification_are_refused_in_one_sentence(
    make_dataset: MakeDataset, mode: str
) -> None:
    """Each complaint by itself would ask for what the other one forbids."""
    both = ["train.synchronous={backup_shards: 1}", "train.verification={replicas: 3}"]
    written = [f"reproducibility={{{mode}: {{}}}}"] if mode else []
    found = complaints(make_dataset(), *both, *written)
    assert list(found) == ["train.synchronous.backup_shards"]
    assert "use one of the two" in found["train.synchronous.backup_shards"]


@pytest.mark.parametrize(
    ("local", "stop", "used"),
    [
        (500, "epochs: 1", "166.7"),
        (4, "epochs: 3", "4"),
        (5, "epochs: 10", ""),
        (4, "epochs: 15.9", ""),
        (3, "epochs: 1", ""),
        (500, "epochs: 1, steps: 1", ""),
        (500, "steps: 1", ""),
    ],
)
def test_the_plan_warns_of_local_steps_that_end_far_behind_the_last_epoch(
    make_dataset: MakeDataset, local: int, stop: str, used: str
) -> None:
    """16 shards of 256 rows a step: 3 own steps in an epoch."""
    settings = (f"train.local={{steps: {local}}}", f"train.stop={{{stop}}}")
    found = [each for each in planned(make_dataset(), *settings).warnings if "job uses" in each]
    assert len(found) == bool(used)
    assert all(f"the job uses {used}:" in each for each in found)


@pytest.mark.parametrize(("bound", "told"), [(0, True), (2, False)])
def test_a_log_of_an_order_that_is_given_is_warned_of(
    make_dataset: MakeDataset, bound: int, told: bool
) -> None:
    settings = (f"train.stale={{bound: {bound}, replay_log: true}}", "train.stop={steps: 10}")
    warnings = planned(make_dataset(), *settings).warnings
    assert any("stale.replay_log changes nothing" in each for each in warnings) == told


@pytest.mark.parametrize(("bound", "told"), [(8, False), (9, True), (50, True)])
def test_a_stale_bound_that_no_shard_comes_to_is_warned_of(
    make_dataset: MakeDataset, bound: int, told: bool
) -> None:
    settings = (f"train.stale={{bound: {bound}}}", "train.stop={steps: 10}")
    warnings = planned(make_dataset(), *settings).warnings
    assert any("stale.bound never fires" in each for each in warnings) == told


@pytest.mark.parametrize(
    ("topology", "workers", "told"),
    [("all_reduce", 16, False), ("all_reduce", 17, True), ("parameter_server", 17, False)],
)
def test_an_all_reduce_job_that_waits_for_workers_without_work_is_warned_of(
    make_dataset: MakeDataset, topology: str, workers: int, told: bool
) -> None:
    settings = (f"train.{topology}={{}}", f"resources.min_workers={workers}")
    warnings = planned(make_dataset(), *settings).warnings
    assert any("the job waits for 17 workers" in each for each in warnings) == told


def test_backup_shards_must_leave_enough(make_dataset: MakeDataset) -> None:
    path, tolerant = "train.synchronous.backup_shards", "reproducibility={tolerant: {}}"
    all_of_them = (tolerant, "data.shards=7", "train.synchronous={backup_shards: 7}")
    assert "use at most 6" in complaints(make_dataset(), *all_of_them)[path]
    krum = (
        *all_of_them[:2],
        "train.synchronous={backup_shards: 1}",
        "train.reduction={krum: {faulty: 2}}",
    )
    assert "a step needs 7; use at most 0" in complaints(make_dataset(), *krum)[path]
    median = (tolerant, "data.shards=4", "train.reduction={median: {}}")
    found = complaints(make_dataset(), *median, "train.synchronous={backup_shards: 2}")
    assert "leaves 2 of 4 shards, and a step needs 3; use at most 1" in found[path]
    specs.prepare(edited(*median, "train.synchronous={backup_shards: 1}"), make_dataset())
    resolved = specs.prepare(
        edited(tolerant, "train.synchronous={backup_shards: 2}"), make_dataset()
    )
    assert unit_span(resolved) == 1
    assert needs_one_range(resolved)


@pytest.mark.parametrize(
    ("setting", "one"),
    [
        ("train.optimizer={clip_norm: 1}", True),
        ("train.local={steps: 2, outer: {clip_norm: 1}}", True),
        ("train.local={steps: 2}", False),
    ],
)
def test_a_norm_at_the_root_needs_one_range(
    make_dataset: MakeDataset, setting: str, one: bool
) -> None:
    assert needs_one_range(specs.prepare(edited(setting), make_dataset())) == one


def test_a_norm_in_the_leaves_does_not(make_dataset: MakeDataset) -> None:
    settings = ("train.local={steps: 2}", "train.optimizer={clip_norm: 1}")
    assert not needs_one_range(specs.prepare(edited(*settings), make_dataset()))


@pytest.mark.parametrize("mode", ["asynchronous={}", "stale={bound: 3}"])
def test_contributions_that_commit_one_by_one_promise_no_bits(
    make_dataset: MakeDataset, mode: str
) -> None:
    resolved = specs.prepare(edited(f"train.{mode}"), make_dataset())
    assert resolved.reproducibility.HasField("tolerant"), "one field switches"
    assert needs_one_range(resolved)
    assert unit_span(resolved) == 1
    found = complaints(make_dataset(), f"train.{mode}", "reproducibility={bitwise: {}}")
    assert "no bits can be promised" in found["reproducibility.bitwise"]


def test_a_bound_of_zero_is_synchronous(make_dataset: MakeDataset) -> None:
    resolved = specs.prepare(edited("train.stale={bound: 0}"), make_dataset())
    assert resolved.reproducibility.HasField("bitwise")
    assert not needs_one_range(resolved)
    assert not specs.job_plan(resolved, make_dataset(), "job").asynchronous


@pytest.mark.parametrize(
    ("reduction", "field"),
    [
        ("{median: {}}", "median"),
        ("{trimmed_mean: {trim: 1}}", "trimmed_mean"),
        ("{krum: {faulty: 1}}", "krum"),
        ("{clip_norm: 1}", "clip_norm"),
    ],
)
def test_rules_that_compare_shards_need_all_of_them(
    make_dataset: MakeDataset, reduction: str, field: str
) -> None:
    settings = ("data.shards=7", f"train.reduction={reduction}")
    for mode in ("asynchronous={}", "stale={bound: 1}"):
        found = complaints(make_dataset(), f"train.{mode}", *settings)
        assert "before the others are there" in found[f"train.reduction.{field}"]
    specs.prepare(edited("train.stale={bound: 0}", *settings), make_dataset())


def test_the_rule_for_staleness_has_a_default(make_dataset: MakeDataset) -> None:
    resolved = specs.prepare(edited("train.asynchronous={}"), make_dataset())
    assert resolved.train.asynchronous.HasField("scaled")
    settings = "train.asynchronous={delay_compensated: {}}"
    resolved = specs.prepare(edited(settings), make_dataset())
    assert resolved.train.asynchronous.delay_compensated.strength == 2.0


def test_a_barrier_beyond_the_end_is_warned_of(make_dataset: MakeDataset) -> None:
    settings = ("train.asynchronous={barrier_every_clocks: 50}", "train.stop={steps: 50}")
    resolved = specs.prepare(edited(*settings), make_dataset())
    warnings = specs.plan(resolved, make_dataset()).warnings
    assert [each for each in warnings if "barrier_every_clocks never fires" in each]


def test_a_worker_of_an_asynchronous_job_keeps_a_version_for_each_slot(
    make_dataset: MakeDataset,
) -> None:
    big = ("train.model={mlp: {hidden: [100000]}}", "data.shards=1", "train.batch_size=64")
    synchronous, one_by_one = (
        specs.prepare(edited(*big, *more), make_dataset())
        for more in ((), ("train.stale={bound: 1}",))
    )
    parameters = (784 * 100_000 + 100_000 + 100_000 * 10 + 10) * 4
    for slots in (1, 4):
        more = worker_bytes(one_by_one, make_dataset(), slots)
        less = worker_bytes(synchronous, make_dataset(), slots)
        assert (more - less) // parameters == 2 * slots


@pytest.mark.parametrize("up", ["top_k: {fraction: 0.01}", "sign: {}"])
@pytest.mark.parametrize(
    ("setting", "field", "says"),
    [
        ("asynchronous={}", "compression", "commits in its own time; use int8 or cast_to"),
        ("stale={bound: 2}", "compression", "commits in its own time"),
        ("synchronous={backup_shards: 1}", "compression", "would lose both"),
        ("reduction={median: {}}", "compression", "cannot be compared"),
        ("reduction={clip_norm: 1}", "compression", "use optimizer.clip_norm"),
        ("verification={replicas: 3}", "compression", "or no verification"),
        ("on_nonfinite={skip: {}}", "on_nonfinite.skip", "is not kept; use fail"),
    ],
)
def test_what_does_not_go_with_feedback_is_refused(
    make_dataset: MakeDataset, up: str, setting: str, field: str, says: str
) -> None:
    settings = (f"train.compression={{{up}}}", f"train.{setting}", "reproducibility={tolerant: {}}")
    found = complaints(make_dataset(), *settings)
    path = f"{field}.{up.partition(':')[0]}" if field == "compression" else field
    assert says in found[f"train.{path}"]
