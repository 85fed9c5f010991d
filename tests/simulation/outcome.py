"""What one run did, as numbers that are kept, added up and compared."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Outcome:
    """What one run did."""

    seed: int
    failure: str = ""
    transitions: int = 0
    steps: int = 0
    virtual_s: float = 0.0
    cpu_s: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    doubled: int = 0
    left_out: int = 0
    """Examples that finished jobs left out as they may: those of backup shards."""
    started: int = 0
    """Leaves that were started one by one."""
    repeated: int = 0
    """Contributions to steps that their shards had completed, which change nothing."""
    errands: int = 0
    """What a second user did."""
    bad_jobs: Counter[str] = field(default_factory=Counter)
    """Her jobs with a bad leaf that ended as they must, by what was bad."""
    worse_jobs: Counter[str] = field(default_factory=Counter)
    """The same of a third user's."""
    refused: int = 0
    """Jobs of hers that asked for too much."""
    orphaned: int = 0
    """Leaf processes that ended with the one that had started them."""
    strange: int = 0
    """What somebody tried who is none of the cluster's."""
    at_bound: int = 0
    """Leaves that were started as far ahead of the slowest shard as their job lets them."""
    stale_accepted: int = 0
    stale_refused: int = 0
    fenced_off: int = 0
    """Writes of leaders that another one had replaced, and that storage refused therefore."""
    outlived: int = 0
    """Leaders that acted on although storage had given the lead to another."""
    jobs: int = 0
    sha_equal: int = 0
    kept: int = 0
    """Jobs that ended with the parameters of an evaluation before the last one."""
    cancelled: int = 0
    terms: int = 0
    """Highest term of any job."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Why jobs were where they were, each time their user looked."""
    again: int = 0
    """Requests that arrived late or twice."""
    incomplete: int = 0
    """Lists that told a user that jobs may be missing."""
    deaf: int = 0
    """Times at which a leader came to hear none of its members."""
    silent: int = 0
    """Members that were taken for lost since they were silent."""
    rolled_back: int = 0
    """Terms of all jobs but the first ones."""
    sent_away: int = 0
    """Calls that were sent away since facts waited for storage, which could be reached."""
    torn: int = 0
    """Files of storage that were cut off where they had not been synced."""
    unsynced: int = 0
    """Names of storage's files that were gone since their folder had not been synced."""
    lies: int = 0
    """Leaves about which a worker lied."""
    quarantines: int = 0
    """Starts of workers that were quarantined."""
    of_one_version: int = 0
    """Terms whose workers are known to have one version of a library."""
    copies_asked: int = 0
    copies_raced: int = 0
    """Copies of late shards that were asked for; shards that came as a copy and from home."""
    reduced: int = 0
    """Steps that workers committed who reduce among themselves."""
    caught_up: int = 0
    """Members that were one step behind and were sent the gradient that others had kept."""
    brought_up: int = 0
    """Members that were sent everything."""
    begun_for: int = 0
    """Roots of those that took the initial parameters from a member that made them instead."""
    updated: int = 0
    """Steps that were no elementwise optimizer's."""
    cut_between: int = 0
    """Terms that ended between the two rounds of a step."""
    tasks: int = 0
    """Tasks that a user was told are done."""
    tasks_given_up: int = 0
    """Tasks that failed as often as they may."""
    calls: int = 0
    """Calls that began, those of tasks that were run again included."""
    went_on: int = 0
    """Calls that went on from what another had kept."""
    tasks_copied: int = 0
    """Tasks that were handed out although somebody else had them."""
    tasks_taken_over: int = 0
    """Terms of sets of tasks that began with results of a term before."""
    results_read: int = 0
    """Results that tasks of programs were told to read."""
    passed_over: int = 0
    """Tasks of programs that nobody had to run."""
    results_gone: int = 0
    """Results of tasks that were garbage before they stood in the journal, and were made again."""
    trace: str = ""
