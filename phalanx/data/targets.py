"""The target column: its task, its classes, and how a label becomes an index."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.data.arrow_values import number_hint
from phalanx.data.doubts import Doubts
from phalanx.data.manifest import ClassKind, Task
from phalanx.data.preprocess import (
    MISSING,
    ColumnValues,
    NumericValues,
    TextValues,
    Whereabouts,
    row_count,
)
from phalanx.data.wording import option
from phalanx.errors import InvalidArgument

CLASS_LIMIT = 10_000
"""More classes than this are taken for a mistake."""

FEW_VALUES = 20
"""Numbers are taken for classes when they are whole and at most this many of them differ."""

_INEXACT = 2.0**53


@dataclass(frozen=True)
class Target:
    """What was learned of the target from the train split.

    ``classes`` are in the order of their indices: numbers by size, words by code point. ``note``
    says why the task is what it is, where it was guessed.
    """

    name: str
    task: Task
    classes: tuple[str, ...] = ()
    class_kind: ClassKind = "text"
    note: str = ""


@dataclass
class TargetScan:
    """Looks at the targets of the train split, batch by batch.

    ``task`` is what was asked for, if anything. ``boolean`` says that 0 and 1 are false and true.
    ``trim`` are characters that do not belong to the end of a word.
    """

    name: str
    task: Task | None = None
    boolean: bool = False
    trim: str = ""
    _rows: int = 0
    _numbers: set[float] = field(default_factory=set)
    _words: set[str] = field(default_factory=set)
    _whole: bool = True
    _text: bool = False
    _many: bool = False
    _doubts: Doubts = field(init=False)

    def __post_init__(self) -> None:
        self._doubts = Doubts(self.name)

    def add(self, values: ColumnValues, where: Whereabouts) -> None:
        """Targets of some train rows; a missing one is an error."""
        self._rows += row_count(values)
        check_complete(values, self.name, where)
        if not isinstance(values, NumericValues):
            self._text = True
            self._doubts.look(values, where)
            if self.task == "regression":
                raise _text_target(values, self.name, where)
            used = np.unique(values.codes)
            self._words.update(_trimmed(values.words[code], self.trim) for code in used)
            if len(self._words) > CLASS_LIMIT:
                self._refuse_numbers()
            self._check_limit(len(self._words))
            return
        if self._many or self.task == "regression":
            return
        distinct = np.unique(values.values)
        self._whole = self._whole and bool(np.all(distinct == np.floor(distinct)))
        self._numbers.update(distinct.tolist())
        if self.task == "classification":
            self._check_limit(len(self._numbers))
        elif not self._whole or len(self._numbers) > FEW_VALUES:
            self._many = True  # a regression; no need to remember more

    @property
    def settled(self) -> bool:
        """Whether more rows cannot change the result."""
        return self._many or (self.task == "regression" and not self._text)

    def result(self) -> Target:
        """Task and classes; InvalidArgument without rows, and with less than two classes."""
        if not self._rows and not self.settled:
            raise InvalidArgument("the train split has no rows")
        self._refuse_numbers()
        task, note = self._decide()
        if task == "regression":
            return Target(self.name, task, note=note)
        classes, kind = self._classes()
        if len(classes) < 2:
            raise InvalidArgument(
                f"every row of the train split has the same target {''.join(classes)!r} in "
                f"{self.name!r}; a classification needs at least two classes"
            )
        return Target(self.name, task, classes, kind, note)

    def _refuse_numbers(self) -> None:
        if self.task is None:
            self._doubts.refuse_numbers(self._words, option("task", "classification"))

    def _decide(self) -> tuple[Task, str]:
        if self.task is not None:
            return self.task, ""
        if self._text or self.boolean:
            return (
                "classification",
                f"classification, since the target {self.name!r} is not a number",
            )
        if self._many:
            why = "is not always a whole number" if not self._whole else "has many different values"
            note = f"regression, since the target {self.name!r} {why} (option `task` overrules)"
            return "regression", note
        return "classification", (
            f"classification, since the target {self.name!r} has {len(self._numbers)} different "
            "whole numbers (option `task` overrules)"
        )

    def _classes(self) -> tuple[tuple[str, ...], ClassKind]:
        if self._text:
            return tuple(sorted(self._words)), "text"
        numbers = sorted(self._numbers)
        if self.boolean:
            return tuple("true" if number else "false" for number in numbers), "boolean"
        if self._whole:
            self._check_exact(numbers)
            return tuple(str(int(number)) for number in numbers), "integer"
        return tuple(repr(number) for number in numbers), "number"

    def _check_exact(self, numbers: list[float]) -> None:
        """Whole numbers from 2^53 on have been rounded when they were read: two labels are one."""
        rounded = [number for number in numbers if abs(number) >= _INEXACT]
        if rounded:
            raise InvalidArgument(
                f"the target {self.name!r} has labels such as {int(rounded[0])}, and whole numbers "
                "of 2^53 and more cannot be told apart; make them text (in a table, with "
                f"{option('categorical', self.name)})",
                reason="BAD_TARGET",
            )

    def _check_limit(self, count: int) -> None:
        if count > CLASS_LIMIT:
            raise InvalidArgument(
                f"the target {self.name!r} has more than {CLASS_LIMIT} different values; if it is "
                f"a number to predict, say {option('task', 'regression')}, else choose another "
                f"with {option('target')}"
            )


class TargetEncoder:
    """Targets as class indices (int64), or as numbers (float64) for a regression."""

    def __init__(self, target: Target, trim: str = "") -> None:
        self.target = target
        self._trim = trim
        self._words = {word: index for index, word in enumerate(target.classes)}
        if target.class_kind == "boolean":
            self._numbers = np.array([float(word == "true") for word in target.classes])
        elif target.class_kind != "text":
            self._numbers = np.array([float(word) for word in target.classes])
        else:
            self._numbers = np.empty(0)

    @property
    def dtype(self) -> str:
        """The type of encoded targets."""
        return "int64" if self.target.task == "classification" else "float64"

    def encode(self, values: ColumnValues, where: Whereabouts) -> NDArray[Any]:
        """One target per row; InvalidArgument for a label that the train split does not have."""
        check_complete(values, self.target.name, where)
        if self.target.task == "regression":
            if not isinstance(values, NumericValues):
                raise _text_target(values, self.target.name, where)
            return values.values
        if isinstance(values, NumericValues):
            indices = np.searchsorted(self._numbers, values.values)
            indices[indices == len(self._numbers)] = 0
            known = self._numbers[indices] == values.values if len(self._numbers) else indices < 0
        else:
            words = [_trimmed(word, self._trim) for word in values.words]
            table = np.array([self._words.get(word, -1) for word in words] or [-1], np.int64)
            indices = table[values.codes]
            known = indices >= 0
        if not known.all():
            row = int((~known).argmax())
            raise self._unknown_label(_label(values, row), where(row, self.target.name))
        return indices.astype(np.int64, copy=False)

    def _unknown_label(self, label: str, where: str) -> InvalidArgument:
        shown = ", ".join(self.target.classes[:10])
        more = ", …" if len(self.target.classes) > 10 else ""
        hint = ""
        if label[:-1] in self._words:
            hint = (
                f" (if {label[-1]!r} is not a part of it, say {option('trim_labels', label[-1])})"
            )
        return InvalidArgument(
            f"{where}: the label {label!r} does not occur in the train split, whose classes are "
            f"{shown}{more}{hint}",
            reason="UNKNOWN_LABEL",
        )


def _text_target(values: TextValues, name: str, where: Whereabouts) -> InvalidArgument:
    word = values.words[values.codes[0]]
    return InvalidArgument(
        f"{where(0, name)}: the target {word!r} is text, a regression needs numbers"
        f"{number_hint(word)}"
    )


def _trimmed(word: str, characters: str) -> str:
    return word.rstrip(characters) if characters else word


def check_complete(values: ColumnValues, name: str, where: Whereabouts) -> None:
    """Raises InvalidArgument, with its place, for a missing or infinite target."""
    if isinstance(values, NumericValues):
        bad = ~np.isfinite(values.values)
    else:
        bad = values.codes == MISSING
    if bad.any():
        row = int(bad.argmax())
        label = _label(values, row) if isinstance(values, NumericValues) else "nan"
        problem = f"{label} is not finite" if "inf" in label else "the target is missing"
        raise InvalidArgument(
            f"{where(row, name)}: {problem}; every row needs a target", reason="BAD_TARGET"
        )


def _label(values: ColumnValues, row: int) -> str:
    if isinstance(values, NumericValues):
        value = float(values.values[row])
        return str(int(value)) if np.isfinite(value) and value == np.floor(value) else repr(value)
    return values.words[int(values.codes[row])]
