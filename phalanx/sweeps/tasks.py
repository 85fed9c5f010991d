"""The tasks of a sweep: trials, their order, the table, the winner."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from typing import Any

from google.protobuf.json_format import MessageToDict, ParseDict

from phalanx.errors import FailedPrecondition
from phalanx.learn import need_scikit_learn
from phalanx.programs import arrays
from phalanx.programs.base import ModelParts, Outcome, Piece
from phalanx.programs.data import JobData, Result
from phalanx.programs.sweep import CSV_FILE, LESS_IS_BETTER, PLOT_FILE, TABLE_FILE
from phalanx.sweeps.configurations import configurations, job_of
from phalanx.sweeps.fitting import fit, metrics_text, score
from phalanx.sweeps.going_on import KEPT_BYTES_MAX
from phalanx.sweeps.picture import picture_of
from phalanx.sweeps.promotion import Rung, places_of
from phalanx.sweeps.ranking import Scored, Trial, best_first, ranks, scored
from phalanx.sweeps.rows import fold_of
from phalanx.sweeps.steps import (
    CSV,
    ORDER,
    PLOT,
    PROMOTED,
    RUNG,
    TABLE,
    TRIAL,
    WINNER,
    Step,
    rounds_of,
    steps_of,
)
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.task_service_pb2 import StoredValue
from phalanx.v1.training_pb2 import Layout

DIVERGED = ("NON_FINITE", "PARAMETERS_NON_FINITE")
"""Why a training fails for its settings: that is a result, and no failure of the sweep."""


class SweepTasks:
    """Runs the tasks of one job. Raises FailedPrecondition without scikit-learn."""

    def __init__(self, job: JobData) -> None:
        need_scikit_learn("cutting folds")
        self._job = job
        self._sweep = job.spec.sweep
        self._metric = self._sweep.objective.metric
        self._more_is_better = self._metric not in LESS_IS_BETTER
        self._steps = steps_of(job.spec)
        self._rounds = rounds_of(job.spec)
        self._configurations = configurations(job.spec)
        self._places: Sequence[int] = range(len(self._configurations))
        self._asha = self._sweep.HasField("asha")
        if self._asha:
            self._places = places_of(job.spec.seed, len(self._configurations))

    def run(self, task: int, inputs: Sequence[Result]) -> bytes:
        """Run one task of the graph."""
        step = self._steps[task]
        match step.kind:
            case kind if kind == TRIAL:
                return _json(asdict(self._try(step, inputs)))
            case kind if kind == RUNG:
                return self._rung(step, inputs)
            case kind if kind == PROMOTED:
                return self._promoted(step, inputs[0])
            case kind if kind == ORDER:
                return self._order(step, inputs)
            case kind if kind == TABLE:
                return self._table(inputs)
            case kind if kind == CSV:
                return self._csv(_document(inputs[0]))
            case kind if kind == PLOT:
                return picture_of(self._job.spec.name, _document(inputs[0]))
            case kind if kind == WINNER:
                return self._winner(_document(inputs[0])["best"])
        return self._end(*inputs)

    # Trials

    def _try(self, step: Step, inputs: Sequence[Result]) -> Trial:
        number = self._places[step.place]
        if step.round:
            number = _document(inputs[0])["order"][0 if self._asha else step.place]
        train, held_out = fold_of(self._job, self._sweep.folds, step.fold)
        spec = job_of(self._job.spec, self._configurations[number])
        try:
            # What the trial of the round before has kept comes after the inputs of the graph.
            earlier = inputs[1].read if step.round and len(inputs) > 1 else None
            fitted = fit(self._job, spec, train, self._rounds[step.round].steps, earlier)
        except FailedPrecondition as error:
            if error.reason == "ONE_CLASS":
                # So it is for each configuration: none would have a mean, and none could be best.
                raise FailedPrecondition(
                    f"without fold {step.fold + 1} of {self._sweep.folds} all rows are of one "
                    "class, so there is nothing to tell apart; a class needs at least two rows: "
                    "add some, or leave out the class that has one",
                    reason=error.reason,
                ) from error
            if error.reason not in DIVERGED:
                raise
            return Trial(number, step.fold, None, error.message)
        # If each that keeps something has its part of the room, all of them together fit.
        trials = sum(each.count for each in self._rounds[:-1]) * self._sweep.folds
        if len(fitted.kept) * trials <= KEPT_BYTES_MAX:
            self._job.beside.kept = fitted.kept
        value = score(self._job, fitted, held_out, self._metric)
        note = "" if value is not None else f"{self._metric} is not defined for a fold"
        return Trial(number, step.fold, value, note)

    def _rung(self, step: Step, inputs: Sequence[Result]) -> bytes:
        """Take in the trials of a place; in the first such task, of all places up to it."""
        rung = self._empty_rung()
        begun = self._steps[step.needs[0]].kind == RUNG
        if begun:
            rung.take(_document(inputs[0]))
        folds = self._sweep.folds
        trials = inputs[begun:]
        first = step.place - len(trials) // folds + 1
        for place in range(first, step.place + 1):
            # A place that the round before gave to nobody has no trials.
            results = [
                each for each in trials[(place - first) * folds :][:folds] if each.size_bytes
            ]
            for entry in scored(_trial(each) for each in results):
                rung.add(place, entry.configuration, entry.mean)
        if step.place == self._rounds[step.round].count - 1:
            rung.close(step.place)
        return _json(rung.to_json())

    def _promoted(self, step: Step, rung: Result) -> bytes:
        """Name the configuration that goes on by a place; nothing where none does."""
        known = self._empty_rung()
        known.take(_document(rung))
        number = known.promoted_by(step.place)
        place = None if number is None else known.place_of(number)
        if place is not None:
            first = self._first_trial(step.round) + place * self._sweep.folds
            self._job.beside.earlier = tuple(range(first, first + self._sweep.folds))
        return b"" if number is None else _json({"order": [number]})

    def _first_trial(self, number: int) -> int:
        """Return the first task of a round."""
        return next(
            task
            for task, each in enumerate(self._steps)
            if (each.kind, each.round) == (TRIAL, number)
        )

    def _empty_rung(self) -> Rung:
        return Rung(self._sweep.asha.reduction, self._more_is_better)

    def _order(self, step: Step, inputs: Sequence[Result]) -> bytes:
        entries = scored(_trial(each) for each in inputs if each.size_bytes)
        ordered = best_first(entries, more_is_better=self._more_is_better)
        if not self._asha and step.round + 1 < len(self._rounds):
            trials: dict[int, list[int]] = {}
            for task, result in zip(step.needs, inputs, strict=True):
                trials.setdefault(_trial(result).configuration, []).append(task)
            going_on = ordered[: self._rounds[step.round + 1].count]
            self._job.beside.earlier = tuple(
                task for each in going_on for task in trials[each.configuration]
            )
        return _json(
            {
                "steps": self._rounds[step.round].steps,
                "order": [each.configuration for each in ordered],
                "scores": [[each.configuration, each.scores, each.note] for each in entries],
            }
        )

    # What is told

    def _table(self, inputs: Sequence[Result]) -> bytes:
        """Write each configuration with the scores of the last round that it was in. Those of a
        later round are ranked before those that were left behind, and those without a score last:
        the best may be one that was left behind, where all that went on diverged."""
        latest: dict[int, tuple[int, Scored]] = {}
        steps = []
        for number, result in enumerate(inputs):
            document = _document(result)
            steps.append(document["steps"])
            for configuration, scores, note in document["scores"]:
                latest[configuration] = number, Scored(configuration, tuple(scores), note)
        rows: dict[int, dict[str, Any]] = {}
        for has_score, number in product((True, False), reversed(range(len(inputs)))):
            entries = [
                entry
                for last, entry in latest.values()
                if last == number and (entry.mean is not None) == has_score
            ]
            behind = len(rows)
            placed = ranks(entries, more_is_better=self._more_is_better)
            for entry in best_first(entries, more_is_better=self._more_is_better):
                rank = behind + placed[entry.configuration]
                rows[entry.configuration] = self._row(entry, rank, number, steps[number])
        best = next(iter(rows))
        if rows[best]["mean"] is None:
            raise FailedPrecondition(
                f"no configuration has a score: {rows[best]['note']}", reason="NO_SCORE"
            )
        document = {
            "metric": self._metric,
            "more_is_better": self._more_is_better,
            "folds": self._sweep.folds,
            "rounds": len(inputs),
            "finalists": len(_document(inputs[-1])["scores"]),
            "best": best,
            "configurations": [rows[number] for number in sorted(rows)],
        }
        return f"{json.dumps(document, indent=1, ensure_ascii=False)}\n".encode()

    def _row(self, entry: Scored, rank: int, number: int, steps: int) -> dict[str, Any]:
        configuration = self._configurations[entry.configuration]
        row: dict[str, Any] = {
            "configuration": entry.configuration,
            "values": dict(configuration.values),
            "rank": rank,
            "mean": entry.mean,
            "std": entry.std,
            "scores": list(entry.scores),
        }
        if len(self._rounds) > 1:
            row |= {"round": number + 1, "steps": steps or self._sweep.base.train.stop.steps}
        return row | ({"note": entry.note} if entry.note else {})

    def _csv(self, document: dict[str, Any]) -> bytes:
        rows = document["configurations"]
        paths = list(rows[0]["values"])
        more = [name for name in ("round", "steps") if name in rows[0]]
        folds = [f"fold {number + 1}" for number in range(document["folds"])]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["configuration", *paths, "rank", "mean", "std", *folds, *more])
        for row in rows:
            values = [_cell(row["values"][path]) for path in paths]
            writer.writerow(
                [row["configuration"], *values, row["rank"], row["mean"], row["std"]]
                + row["scores"]
                + [row[name] for name in more]
            )
        return text.getvalue().encode()

    # The winner

    def _winner(self, number: int) -> bytes:
        spec = job_of(self._job.spec, self._configurations[number])
        fitted = fit(self._job, spec, None)
        described = JobSpec()
        described.CopyFrom(fitted.spec)
        described.data.features[:] = self._job.spec.data.features
        notes = {
            "spec": _text(described),
            "layout": _text(fitted.layout),
            "metrics": metrics_text(fitted),
        }
        return arrays.pack({"parameters": fitted.parameters}, notes)

    def _end(self, table: Result, sheet: Result, picture: Result, winner: Result) -> bytes:
        document, packed = _document(table), winner.read()
        notes, place = arrays.notes_of(packed), arrays.places(packed)["parameters"]
        files = {TABLE_FILE: table, CSV_FILE: sheet}
        if picture.size_bytes:
            files[PLOT_FILE] = picture
        model = ModelParts(
            ParseDict(json.loads(notes["layout"]), Layout()),
            (Piece(winner.digest, place.offset, place.length),),
            ParseDict(json.loads(notes["spec"]), JobSpec()),
        )
        row = document["configurations"][document["best"]]
        metrics = {
            **json.loads(notes["metrics"]),
            "sweep/best": float(document["best"]),
            f"sweep/{self._metric}": row["mean"],
            f"sweep/{self._metric}_std": row["std"],
            "sweep/configurations": float(len(document["configurations"])),
            "sweep/plot": float(PLOT_FILE in files),
        }
        stored = {
            name: StoredValue(digest=each.digest, size_bytes=each.size_bytes)
            for name, each in files.items()
        }
        return Outcome(metrics, model, stored).to_json()


def _document(result: Result) -> Any:
    return json.loads(result.read())


def _trial(result: Result) -> Trial:
    return Trial(**_document(result))


def _json(document: Any) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _text(message: Any) -> str:
    return json.dumps(MessageToDict(message, preserving_proto_field_name=True), sort_keys=True)


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict | bool) or value is None else value
