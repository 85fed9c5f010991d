"""The longer texts that mutants put in place of what ships."""

ARRIVAL_ORDER = """\
filled[index] = (value, mask, False)
    starts = {i: (i * (self._top >> i.bit_length() - 1) - self._top) for i in filled}
    spans = {i: self._top >> i.bit_length() - 1 for i in filled}
    ends = {i: min(starts[i] + spans[i], self._width) for i in filled}
    if sum(ends[i] - starts[i] for i in filled) == self._width:
        total, present = None, 0
        for i, (part, part_mask, _) in filled.items():
            present |= part_mask << starts[i]
            if part is not None:
                total = part if total is None else total + part
        filled.clear()
        filled[1] = (total, present, False)"""

COUNT_DEATHS = """\
del job.hosts[worker.id]
        job.deaths = getattr(job, "deaths", 0) + 1
        if job.deaths > 1:
            from coordinator.control.core import ending
            ending.fail(core, job, "POISON_SHARD", "two of its workers died")"""

COUNT_LOST_TASKS = """\
for task in freed:
            lost = Failure(code="LOST", worker_ids=[peer.worker_id])
            self._failures.setdefault(task, []).append(lost)
        self._run_again("""

EARLY = """\
started = self._began_s = time.monotonic()
    for index, record, _ in batch:
        self._on_durable(index, record)"""

TRUNCATE_FIRST = """\
first = self._next
    await self._store.insist_call(
        self._store.storage.TruncateJournal,
        pb.TruncateJournalRequest(
            stream=STREAM, before_sequence=first, fence=self._store.fence
        ),
    )"""

ADD_AGAIN = """\
added = reducer.fill(node, values, mask >> node.first)
    if {} and not added and values is not None:
        above, filled = (reducer._top + node.first) // node.span, reducer._filled
        while above not in filled:
            above >>= 1
        filled[above] = (filled[above][0] + values, *filled[above][1:])"""
