"""Programs of tasks: jobs whose work is a graph of tasks, each a function of Phalanx.

A program is one module here, light enough for the services that check and plan jobs (control loads
no array library), and a function that runs a task, which leaf processes load. To add one:

1. Give its choice in `JobSpec.program` a subclass of `Program` in a module of its own, add an
   instance to `_ALL` below and its name to `phalanx.tasks.PROGRAMS`, and take it out of
   `phalanx.specs.unimplemented`. What every program refuses (code, `output.best`, balance of
   classes) and what data sets and shards mean is checked and resolved by `phalanx.specs.programs`.
2. `violations` and `violations_against` say what is wrong with a spec (and its data set);
   `resolve` writes out its defaults.
3. `graph` compiles a job into numbered tasks and says of each the smaller-numbered ones whose
   results it gets. It is a pure function of the plan (`plan.spec`, resolved, `plan.train_rows`,
   `plan.shards`): every process that asks gets the same graph, and only the dispatcher holds it.
   A loop that may end early has the tasks of its longest course; those after the end pass their
   input on. Tasks that may prove to be unnecessary are `passing`: the task that they hang on has an
   empty result then, and nobody runs them. `levels` say which of the tasks that are ready go first.
4. Add a case to `runner_of` in `phalanx.programs.work`. It imports the heavy part and returns the
   function `run(task, inputs) -> bytes`, once for a process and job, given the `JobData` of it: its
   spec and plan, readers of the data set, whole splits. `inputs` are `Result`s in the order of the
   graph; each is read from the disk when it is asked for. What `run` returns is stored as a blob,
   of `RESULT_BYTES_MAX` at most. It must depend on nothing but its arguments, the plan and the data
   set: two workers may run one task, and the first result counts.
   What only spares another task work goes beside the result (`JobData.beside`): it may get lost.
5. The last task's result is the `Outcome` as JSON: metrics, files (each the whole result of a
   task), and a model as a layout and the pieces of its flat vector. Pieces are parts of results of
   other tasks, so no process ever holds the model; storage puts it together. What is written into
   the outcome itself has to be short: control sends all of it to storage in one message. A case in
   `phalanx.programs.predicting` makes what predicts of it.

No result is ever unpickled: write JSON, or `arrays.pack` (safetensors) for arrays.

Leases, attempts, copies of late tasks, the journal, pauses and retries are those of every set of
tasks (`coordinator.aggregation.core.dispatch`). In one process (`workers=0`) the same functions run
in the order of their numbers, and the same bytes come out.
"""

from __future__ import annotations

from phalanx.programs.base import (
    OUTCOME_BYTES_MAX,
    RESULT_BYTES_MAX,
    Graph,
    ModelParts,
    Outcome,
    Piece,
    Program,
)
from phalanx.programs.cascade import Cascade
from phalanx.programs.evaluate import Evaluate
from phalanx.programs.forest import Forest
from phalanx.programs.predict import Predict
from phalanx.programs.sweep import Sweep
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import JobPlan

__all__ = [
    "OUTCOME_BYTES_MAX",
    "RESULT_BYTES_MAX",
    "Graph",
    "ModelParts",
    "Outcome",
    "Piece",
    "Program",
    "graph_of",
    "program_of",
]

_ALL: dict[str, Program] = {
    each.name: each for each in (Forest(), Evaluate(), Predict(), Cascade(), Sweep())
}


def program_of(spec: JobSpec) -> Program:
    """Return the program of a job for which `phalanx.tasks.is_program`."""
    return _ALL[spec.WhichOneof("program") or ""]


def graph_of(plan: JobPlan) -> Graph:
    """Return the tasks of a program."""
    return program_of(JobSpec.FromString(plan.spec)).graph(plan)
