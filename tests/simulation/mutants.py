"""Planted bugs: each takes one rule out of the code that ships, and the simulator must notice.

    python -m tests.simulation.hunt              # finds each anew, from seed 1000 on
    python -m tests.simulation.hunt NAME         # one of them

A mutant is a function and a change of its text. `rule` is the rule of the data plane that it takes
out: 1 whole versions, 2 terms and generations, 3 the root decides, 5 nodes, 6 non-finite leaves,
7 no producer waits, 8 budgets, 9 checkpoints, 11 roll-back, 12 leases, 14 the number of ranges does
not matter, and the noise of private jobs, 13 all-reduce, 15 verification, 16 fingerprint; 0 where
it is a rule of control, of storage, of copies or of leaves.
"""

from __future__ import annotations

from tests.simulation.mutants_of_work import MUTANTS_OF_WORK
from tests.simulation.planted import (
    ADD_AGAIN,
    ARRIVAL_ORDER,
    COUNT_DEATHS,
    EARLY,
    TRUNCATE_FIRST,
)
from tests.simulation.planting import Change, many, one

_AGGREGATION = "coordinator.aggregation"
_CONTROL = "coordinator.control"
_MACHINE = f"{_AGGREGATION}.core.machine:JobRanges"
_STATE = f"{_AGGREGATION}.core.state:RangeParameters"
_ONE_BY_ONE = f"{_AGGREGATION}.core.asynchronous:AsynchronousRanges"
_ROOT = f"{_AGGREGATION}.core.roots:OptimizerRoot"
_LEASES = "storage.core.leases"
_CHECKPOINTS = "storage.core.checkpoints"
_REDUCER = "phalanx.reduction:TreeReducer"
_VERSIONS = "worker.core.versions:VersionAssembly"
_OUTBOX = "worker.core.outbox:Outbox"
_REPLICA = "worker.core.all_reduce.replica"
_JOURNAL = f"{_CONTROL}.journal:JournalWriter"
_EVENTS = f"{_CONTROL}.event_log:EventLog"
_DECIDER = "phalanx.training.decisions:RootDecider"
_BEST = "phalanx.training.best:BestRule"
_SILENT = f"{_CONTROL}.core.ownership:_silent"
_SILENCE = f"{_CONTROL}.core.membership:check_silence"


_TRUST = Change(
    f"{_CONTROL}.core.membership:_wrong_hello", "if generation > core.generation:", "if False:"
)
"""A leader that hears of a higher generation stays: without this, members never meet an old one."""


MUTANTS = (
    # Storage
    one(
        "storage takes writes of any generation", 2, f"{_LEASES}:check_fence",
        "if fence.token != token:", "if False:",
    ),
    one(
        "a lost lease can be renewed", 12, f"{_LEASES}:_held",
        "if (row.holder, row.token) != (holder, token):", "if False:",
    ),
    one(
        "a lease is taken over although it was renewed", 12, f"{_LEASES}:acquire",
        "if (request.seen_token, request.seen_counter) == (current.token, current.counter):",
        "if request.seen_token:",
    ),
    one(
        "a lease is taken over before it has expired", 12,
        f"{_CONTROL}.leadership:acquire",
        "challenge = seen if waited_s >= lease_ttl_s else (0, 0)",
        "challenge = seen if waited_s >= lease_ttl_s / 8 else (0, 0)",
    ),
    many(
        "a lease runs out by the wall clock", 12,
            Change(
                f"{_CONTROL}.leadership:acquire", "since_s = (0, 0), time.monotonic()",
                "since_s = (0, 0), time.time()",
            ),
            Change(
                f"{_CONTROL}.leadership:acquire", "since_s = held, time.monotonic()",
                "since_s = held, time.time()",
            ),
            Change(
                f"{_CONTROL}.leadership:acquire", "waited_s = time.monotonic() - since_s",
                "waited_s = time.time() - since_s",
            ),
    ),
    one(
        "the generation does not rise", 12, f"{_LEASES}:acquire",
        "granted = LeaseRow(request.holder, current.token + 1, 1)",
        "granted = LeaseRow(request.holder, current.token, 1)",
    ),
    one(
        "records are appended wherever there is room", 0, "storage.core.journals:append",
        "if expected not in (-1, state.next_sequence):", "if False:",
    ),
    one(
        "a checkpoint takes parts of an old term", 2, f"{_CHECKPOINTS}:register_part",
        "if request.term != row.term:", "if False:",
    ),
    many(
        "a checkpoint is whole with its first part", 9,
            Change(
                f"{_CHECKPOINTS}:register_part",
                "if len(manifest.parts) < manifest.range_count:", "if not manifest.parts:",
            ),
            Change(f"{_CHECKPOINTS}:register_part", "_check_cover(manifest)", "pass"),
    ),
    one(
        "a late call raises a term again", 2, f"{_CHECKPOINTS}:raise_term",
        "if request.expected_term != current:", "if False:",
    ),
    one(
        "a finished job gets another term", 9, f"{_CHECKPOINTS}:raise_term",
        "if row is not None and row.final is not None:", "if False:",
    ),
    # Aggregators
    many(
        "ranges take frames of any term", 2,
            Change(f"{_MACHINE}._check_term", "if term != self.term:", "if False:"),
            Change(
                f"{_AGGREGATION}.exchange:ExchangeServicer._hosted",
                "if job.ranges.term > hello.term:", "if False:",
            ),
    ),
    many(
        "a filled node adds what comes again", 5,
            Change(f"{_REDUCER}.fill", "if above in filled:", "if False:"),
            Change(
                f"{_REDUCER}._put", "filled[index] = entry",
                "filled[index] = _sum(filled[index], entry, 0) if index in filled else entry",
            ),
    ),
    one(
        "nodes are added in the order in which they arrive", 5, f"{_REDUCER}.fill",
        "self._put(index, node, (value, mask, False))", ARRIVAL_ORDER,
    ),
    one(
        "a round takes frames of other steps", 5, f"{_MACHINE}.contribute",
        "if current is None or owned.key != (frame.step, frame.round):", "if current is None:",
    ),
    one(
        "a range drops a version once it has the next", 1, f"{_MACHINE}._close",
        "owned.round = owned.root = owned.work = None",
        "owned.round = owned.root = owned.work = None\n"
        "    owned.parameters.versions.drop_before(owned.version)",
    ),
    one(
        "a range keeps what nobody needs any more", 1, f"{_MACHINE}._drop_before",
        "if owned.parameters.versions.oldest < version:", "if False:",
    ),
    one(
        "a round opens before its version is whole", 1, f"{_MACHINE}._accept",
        "if owned.version < version:", "if owned.version < version - 1:",
    ),
    one(
        "the optimizer's state is not restored", 9, f"{_STATE}.load",
        "array[:] = state[name][first : first + count]", "pass",
    ),
    one(
        "a checkpoint shares state with the steps after it", 9, f"{_STATE}._keep_snapshots_whole",
        "if any(snapshot.state[index] is state for snapshot in self._snapshots):", "if False:",
    ),
    many(
        "the end is reported before its checkpoint is whole", 9,
            Change(
                f"{_AGGREGATION}.hosting:HostedJob._end", "if self._checkpoints:", "if False:"
            ),
            Change(
                f"{_AGGREGATION}.hosting:HostedJob._end",
                " or self._checkpoint_step < go.version", "",
            ),
    ),
    many(
        "an aggregator obeys an old generation", 2,
            Change(
                f"{_AGGREGATION}.process:Aggregator._on_message",
                "if message.generation < self._generation:", "if False:",
            ),
            _TRUST,
    ),
    one(
        "one stream waits for another", 7, f"{_AGGREGATION}.exchange:_send",
        "await context.write(message)",
        'async with job.ranges.__dict__.setdefault("turn", asyncio.Lock()): '
        "await context.write(message)",
    ),
    one(
        "a laggard waits for a version that is gone", 7,
        f"{_AGGREGATION}.core.cursor:_RangeCursor._current",
        "if version is None or self._sent == len(version.frames):",
        "if self._number < 0 or version is not None and self._sent == len(version.frames):",
    ),
    one(
        "late shards are not copied", 0, f"{_AGGREGATION}.copying:Copying.look",
        "for order in orders:", "for order in ():",
    ),
    one(
        "a copy is added to what came from home", 5, "phalanx.rounds:Round.contribute",
        "reducer.fill(node, values, mask >> node.first)", ADD_AGAIN.format("frame.copy"),
    ),
    one(
        "what came from home is added to its copy", 5,
        "phalanx.rounds:Round.contribute",
        "reducer.fill(node, values, mask >> node.first)", ADD_AGAIN.format("not frame.copy"),
    ),
    one(
        "examples are summed over all that came", 5,
        "phalanx.rounds:NodeScalars.totals",
        "return Totals(sums.count, sums.loss, present, sums.count)",
        "count = sum(each[0] for each in self._pinned.values())\n"
        "    return Totals(count, sums.loss, present, count)",
    ),
    one(
        "each range reduces what it has of the leaves", 4,
        f"{_CONTROL}.core.ownership:_range_count", "if needs_one_range(spec):", "if False:",
    ),
    one(
        "a reducer does not wait for the last leaf", 4,
        f"{_AGGREGATION}.core.whole:LeavesRound.contribute",
        "self.missing.bit_count() > self._spare", "self.missing.bit_count() > self._spare + 1",
    ),
    one(
        "one shard more than the job says may be left out", 4,
        f"{_AGGREGATION}.core.plan:Rounds.__init__",
        "self._spare = spec.train.synchronous.backup_shards",
        "self._spare = spec.train.synchronous.backup_shards\n"
        "    self._spare += self._spare > 0",
    ),
    one(
        "what was left out is forgotten with a checkpoint", 4, f"{_MACHINE}._state",
        'state["examples_lost"] = self.examples_lost', 'state["examples_lost"] = 0',
    ),
    one(
        "which shards were left out is forgotten with a checkpoint", 4,
        f"{_AGGREGATION}.core.backups:BackupRanges.begin_restored",
        "LeftOutLog.restored(kept, version) if COUNTS in kept else None", "LeftOutLog()",
    ),
    one(
        "what a step left out is noted as nothing", 4,
        f"{_AGGREGATION}.core.backups:BackupRanges._close",
        "self._log.add(current.left_out)", "self._log.add(())",
    ),
    many(
        "a contribution counts again where it comes again", 4,
            Change(
                f"{_ONE_BY_ONE}.contribute",
                "if frame.shard_step < self._clocks.step_of(shard):", "if False:",
            ),
            Change(
                f"{_ONE_BY_ONE}.work", "if start.step != self._clocks.step_of(start.shard):",
                "if False:",
            ),
            Change(
                f"{_ONE_BY_ONE}._commit", "self._clocks.commit(start.shard, start.step)",
                "self._clocks.commit(start.shard, self._clocks.step_of(start.shard))",
            ),
            Change(
                f"{_AGGREGATION}.core.starts:Starts.committed",
                "stream.starts.pop(shard, None)", "stream.starts.get(shard)",
            ),
    ),
    one(
        "the bound is forgotten with a checkpoint", 4, f"{_ONE_BY_ONE}._begin_at",
        "bound = stale_bound(self._train)",
        "bound = stale_bound(self._train) if completed is None else None",
    ),
    one(
        "after a roll-back every shard is at the step of the job", 4,
        f"{_ONE_BY_ONE}.begin_restored",
        "completed_steps(root_state, self.plan.shards, version)", "[version] * self.plan.shards",
    ),
    one(
        "a shard does not wait for an evaluation", 4, f"{_ONE_BY_ONE}._step_done",
        "self._clocks.limit = self._decider.limit", "self._clocks.limit = 1 << 62",
    ),
    one(
        "nobody tells of those who are not heard of where nothing moves", 7,
        f"{_AGGREGATION}.copying:Copying.waits_for_starts",
        "bool(ranges.late_workers(elapsed_s) or ranges.late_shards(elapsed_s))", "False",
    ),
    one(
        "local steps begin anew in every step", 0, "phalanx.training.leaf:LocalSteps.steps_of",
        "range(version * self.count, (version + 1) * self.count)", "range(self.count)",
    ),
    many(
        "any node is encoded", 10,
        Change("worker.core.rounds:Round._units", "if self._unit else", "if False else"),
        Change("worker.core.rounds:Round._add_parts", "max(1, self._unit)", "self.width"),
        Change("phalanx.rounds:payload_values", "if spec.unit and", "if False and"),
    ),
    one(
        "the first copy of a leaf is believed", 15, f"{_AGGREGATION}.core.ballots:Ballot._vote",
        "if len(agreed) < question.needed:", "if False:",
    ),
    one(
        "a node's state begins at zero wherever the node goes", 10,
        "worker.core.states:States.find",
        "if version == 0:", "if version == 0 or version not in self._held.get(node, {}):",
    ),
    one(
        "what a shard's optimizer remembers begins anew wherever the shard goes", 10,
        "worker.core.stateful:StatefulJobCore._with_states",
        "if state is None:", "if state is None and not self.plan.local_steps:",
    ),
    one(
        "what a shard's optimizer remembers is not restored", 10,
        f"{_AGGREGATION}.core.recalled:NodeStates.load",
        "list(self._cut(vectors, _state_name(base, node, index)))",
        "[each * 0 for each in self._cut(vectors, _state_name(base, node, index))]",
    ),
    one(
        "a checkpoint keeps no versions to make states again from", 10,
        f"{_AGGREGATION}.core.recalled:NodeStates.load",
        "for number in range(base, version):", "for number in ():",
    ),
    one(
        "each block is rounded as the first one", 14, "phalanx.compressors.base:compress_in_place",
        "codec.encode_block(piece, block, key)", "codec.encode_block(piece, 0, key)",
    ),
    one(
        "decay begins anew in every range", 14, f"{_STATE}.__init__",
        "decay_mask(layout, *part)", "decay_mask(layout, 0, part[1])",
    ),
    one(
        "each term has noise of its own", 14, f"{_CONTROL}.core.terms:assign_ranges",
        "secret=facts.kept.submitted.secret,",
        "secret=bytes(each ^ (facts.term - 1) for each in facts.kept.submitted.secret),",
    ),
    one(
        "noise begins anew in every range", 14, f"{_ROOT}._with_noise",
        "first += parameters.piece.first_element", "first += 0",
    ),
    one(
        "a noisy sum is divided by the rows that came", 14, f"{_ROOT}.frame_complete",
        "self._with_noise(self._noise, index, values), self._noise.divisor",
        "self._with_noise(self._noise, index, values), totals.divisor",
    ),
    one(
        "each step has the noise of the first", 14, f"{_ROOT}._with_noise",
        "self._version, parameters.dtype", "0, parameters.dtype",
    ),
    # Workers
    one(
        "leaves run on a part of a version", 1, f"{_VERSIONS}.stored",
        "if held.missing or place.version <= self._whole:",
        "if place.version <= self._whole:",
    ),
    one(
        "the newer version is overwritten", 1, f"{_VERSIONS}._take_buffer",
        "oldest = min(free)", "oldest = max(free)",
    ),
    one(
        "nothing is sent again on a new stream", 7, f"{_OUTBOX}.opened",
        "stream.sent.clear()", "pass",
    ),
    one(
        "workers do not carry go records", 3, f"{_OUTBOX}.carry",
        "if stream.open and not stream.has_root:", "if False:",
    ),
    one(
        "workers do not carry go records again", 3, f"{_OUTBOX}.opened",
        "stream.go_due = [] if stream.has_root else list(go_records)", "stream.go_due = []",
    ),
    many(
        "a worker obeys an old generation", 2,
            Change(
                "worker.core.session:WorkerCore.message",
                "if message.generation < self.generation:", "if False:",
            ),
            _TRUST,
    ),
    # Workers that reduce among themselves
    one(
        "a member applies a part of a gradient", 13, f"{_REPLICA}:Gradient.take",
        "self._left -= count", "self._left = 0",
    ),
    one(
        "those who are ahead do the step again", 13,
        "worker.core.all_reduce.job:AllReduceJob._settle", "best = max(", "best = min(",
    ),
    one(
        "the gradient of the last step is not kept", 13, f"{_REPLICA}:Replica.work",
        "self._kept, self._open, self._done = gradient, None, 0",
        "self._kept, self._open, self._done = None, None, 0",
    ),
    # Control
    one(
        "effects do not wait for their records", 0, f"{_CONTROL}.leader:Leader.dispatch",
        "elif effect.after <= self._durable_index:", "elif True:",
    ),
    one(
        "records count as durable before they are written", 0, f"{_JOURNAL}._write_batch",
        "started = self._began_s = time.monotonic()", EARLY,
    ),
    one(
        "the journal is cut before its snapshot is written", 0, f"{_JOURNAL}._snapshot",
        "first = self._next", TRUNCATE_FIRST,
    ),
    one(
        "request ids are forgotten", 0, f"{_CONTROL}.core.verbs:first_answer",
        "if first is None:", "if True:",
    ),
    one(
        "an aggregator that came back empty is adopted", 0,
        f"{_CONTROL}.core.membership:_check_owner",
        "if held is not None and held.term == facts.term and mine <= set(held.range_indexes):",
        "if True:",
    ),
    one(
        "a new leader does not look at the jobs' rows", 2, f"{_CONTROL}.core.machine:_led",
        "job.row_known = False", "pass",
    ),
    one(
        "a job ends without being fenced off", 2, f"{_CONTROL}.core.terms:_end",
        "if max(job.storage_term, core.facts_of(job).term) == 0:", "if True:",
    ),
    one(
        "a broken session keeps its shards", 0, f"{_CONTROL}.core.membership:session_broken",
        "member.session = 0\n        lose_worker(", "member.session = 0\n        (lambda *_: 0)(",
    ),
    one(
        "workers with other bits take part", 16, f"{_CONTROL}.core.eligibility:group_of",
        "if unlike := kinds.difference(kind, worker.hello):", "if unlike := None:",
    ),
    one(
        "workers with another version of a library take part", 16,
        f"{_CONTROL}.core.kinds:difference", "if own != version:", "if False:",
    ),
    one(
        "whoever describes a job with another version is taken for a liar", 15,
        f"{_CONTROL}.core.kinds:Kind.is_surely",
        "self.complete and other.complete and self == other",
        "self.fingerprint == other.fingerprint",
    ),
    one(
        "a leaf that is not finite is believed at once", 6, f"{_CONTROL}.core.budgets:_non_finite",
        "if len(bad) < CONFIRMATIONS:", "if False:",
    ),
    one(
        "the deaths of workers count against a job", 8, f"{_CONTROL}.core.membership:lose_worker",
        "del job.hosts[worker.id]", COUNT_DEATHS,
    ),
    one(
        "control takes ranges without a lease of silence", 11, _SILENT,
        "if now - max(heard_s, core.led_s) < patience:", "if False:",
    ),
    one(
        "control takes ranges although workers get further with their owner", 11, _SILENT,
        "return all(", "return True or all(",
    ),
    many(
        "control takes ranges soon after a take-over", 11,
            Change(_SILENT, "if aggregator is not None else core.led_s", "if aggregator else 0.0"),
            Change(_SILENT, "max(heard_s, core.led_s)", "heard_s"),
    ),
    one(
        "control takes ranges of those who are silent with all others", 11, _SILENT,
        "patience = core.patience_with(aggregator)", "patience = core.lease_ttl_s()",
    ),
    one(
        "who is silent with all others is taken for lost", 11, _SILENCE,
        "core.mass_silence = len(members) >= MASS and 2 * silent > len(members)",
        "core.mass_silence = False",
    ),
    one(
        "control blames its members for its own sleep", 11, _SILENCE,
        "_forgive_own_sleep(core)", "pass",
    ),
    one(
        "callers are not sent away while facts wait for storage", 12, f"{_JOURNAL}.full",
        "return self.stuck or len(self._queue) >= QUEUE_MAX", "return False",
    ),
    one(
        "what a leader lists looks whole whoever may lead", 12,
        f"{_CONTROL}.leader:Leader.incomplete", 'CUT_OFF if self._lapsed() else ""', '""',
    ),
    one(
        "events are dropped although there is room", 0, f"{_EVENTS}.append",
        "if len(self._held) >= HELD_MAX:", "if len(self._held) >= 2:",
    ),
    one(
        "the event log is cut too far", 0, f"{_EVENTS}._truncate",
        "before = self._next - KEPT_MAX", "before = self._next - KEPT_MAX // 2",
    ),
    one(
        "young blobs are garbage, too", 9, "storage.core.garbage:is_old_enough",
        "return age_s >= grace_s", "return True",
    ),
    one(
        "sums that are not finite are applied", 6, f"{_AGGREGATION}.core.roots:require_finite",
        "if not all_finite(values):", "if False:",
    ),
    one(
        "an evaluation waits for the next step", 3, f"{_DECIDER}._ends_interval",
        "steps = self._version - self._rounds.first", "steps = self._version - 1",
    ),
    one(
        "what a stop rule has seen is not restored", 3, f"{_DECIDER}.restore",
        'self._stop.restore(state["stop"])', "pass",
    ),
    one(
        "of equal evaluations the last one is kept", 3, f"{_BEST}._is_better",
        "(value - self.kept.value) * self._direction > 0",
        "(value - self.kept.value) * self._direction >= 0",
    ),
    one(
        "what was the best evaluation is not restored", 3, f"{_DECIDER}.restore",
        "self._best.restore(state)", "pass",
    ),
    one(
        "each version is kept as the best", 9, f"{_MACHINE}._accept",
        'go.best_version if go.HasField("best_version") else None',
        'go.version if go.HasField("best_version") else None',
    ),
    one(
        "the version of a checkpoint is restored as the best", 9, f"{_STATE}.load_best",
        "pieces = [vector[first : first + count].copy() for first, count in self.grid]",
        "pieces = self.versions.get(self.versions.newest_whole).values",
    ),
    one(
        "whoever joins takes what it is sent for the best", 13, f"{_REPLICA}:Replica.taken_over",
        "self._vectors(frame.version) | self._best_to_come(frame.record, frame.version)",
        'self._vectors(frame.version) | {"best": np.zeros(self._size, self.dtype)}',
    ),
    one(
        "no third copy is asked for where two differ", 15,
        f"{_AGGREGATION}.core.ballots:Question.shortfall",
        "max(self._counts().values(), default=0)", "len(self.votes)",
    ),
    one(
        "what a job is that is verified is one worker's word", 15,
        f"{_CONTROL}.core.describing:needed", "if is_verified(core, job) else 1", "* 0 + 1",
    ),
    one(
        "whoever's own leaf has other bits takes part", 16,
        "worker.core.job:JobCore._compare_leaves",
        'same = not self._wanted_leaf or self.leaf_sha256 in ("", self._wanted_leaf)',
        "same = True",
    ),
    *MUTANTS_OF_WORK,
)  # fmt: skip
