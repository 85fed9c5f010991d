"""Job files: text in, `JobSpec` out, every wrong field at once.

The YAML of a job is the JSON of `JobSpec`; names may be snake_case or camelCase.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from phalanx.errors import PhalanxError, Violation
from phalanx.specs.fields import fields_of
from phalanx.specs.json_text import parse_json
from phalanx.specs.overrides import apply_overrides
from phalanx.specs.tree import Node, Problems
from phalanx.specs.unimplemented import unimplemented
from phalanx.specs.validate import validate
from phalanx.specs.walker import Walker
from phalanx.specs.yaml_text import parse_yaml
from phalanx.v1 import job_spec_pb2


@dataclass(frozen=True)
class Document:
    """A loaded job file: the spec as written and the line of every field in it."""

    spec: job_spec_pb2.JobSpec
    source: str
    lines: Mapping[str, int] = field(default_factory=dict)

    def locate(self, violations: Iterable[Violation]) -> tuple[Violation, ...]:
        """Return the violations with the lines of this document filled in.

        A field that the document leaves out gets the line of the nearest field around it.
        """
        return tuple(
            each
            if each.line is not None
            else Violation(each.field, each.message, self._line(each.field))
            for each in violations
        )

    def locate_error(self, error: PhalanxError) -> PhalanxError:
        """Return the same error with the lines of this document in its violations."""
        error.violations = self.locate(error.violations)
        return error

    def _line(self, path: str) -> int | None:
        while path:
            if path in self.lines:
                return self.lines[path] or None
            cut = max(path.rfind("."), path.rfind("["))
            path = path[: max(cut, 0)]
        return None


def load_document(
    text: str, source: str, *, json: bool = False, overrides: Iterable[str] = ()
) -> Document:
    """Load YAML (or JSON) text; `overrides` are `path=value` settings that win over the text.

    Raises InvalidArgument (reason SPEC_INVALID) whose violations name every wrong field and line.
    """
    problems = Problems(source)
    parse: Callable[[str, Problems], Node | None] = parse_json if json else parse_yaml
    root = parse(text, problems)
    spec = job_spec_pb2.JobSpec()
    walker = Walker(problems)
    if root is not None:
        walker.fill(spec, apply_overrides(root, overrides, problems))
        if problems.violations:
            _add_wrong_values(Document(spec, source, walker.lines), walker.meant, problems)
    problems.raise_if_any()
    return Document(spec, source, walker.lines)


def _add_wrong_values(document: Document, meant: Iterable[str], problems: Problems) -> None:
    """Tell the wrong values too when the text is refused anyway, so that one answer has it all.

    Where a field could not be read, what lies around it or in it is not complained about: `meant`
    and the places of the problems are what the spec does not say only because of them.
    """
    unread = [*meant, *(each.field for each in problems.violations)]
    found = [*validate(document.spec), *unimplemented(document.spec)]
    fresh = [each for each in found if not any(_related(each.field, path) for path in unread)]
    problems.violations.extend(document.locate(fresh))


def _related(path: str, other: str) -> bool:
    """Whether two paths name the same field or one lies within the other."""
    short, long = sorted((path, other), key=len)
    return long.startswith(short) and long[len(short) : len(short) + 1] in ("", ".", "[")


def load_yaml(text: str, source: str = "<text>") -> job_spec_pb2.JobSpec:
    """Return the `JobSpec` of a YAML text. Raises InvalidArgument, see `load_document`."""
    return load_document(text, source).spec


def load_json(text: str, source: str = "<text>") -> job_spec_pb2.JobSpec:
    """Return the `JobSpec` of a JSON text. Raises InvalidArgument, see `load_document`."""
    return load_document(text, source, json=True).spec


def set_value(spec: job_spec_pb2.JobSpec, setting: str) -> None:
    """Set one field of `spec` from `path=value` (as `--set` does); the value is YAML.

    Lists and mappings are replaced whole. Raises InvalidArgument.
    """
    problems = Problems("--set")
    root = apply_overrides(Node(1, "mapping"), (setting,), problems)
    single = job_spec_pb2.JobSpec()
    Walker(problems).fill(single, root)
    problems.raise_if_any()
    path = setting.partition("=")[0].strip()
    _clear(spec, path)
    spec.MergeFrom(single)


def apply_sets(spec: job_spec_pb2.JobSpec, settings: Iterable[str]) -> job_spec_pb2.JobSpec:
    """Return a copy of `spec` with every `path=value` set, in order. Raises InvalidArgument."""
    result = job_spec_pb2.JobSpec()
    result.CopyFrom(spec)
    for setting in settings:
        set_value(result, setting)
    return result


def _clear(spec: job_spec_pb2.JobSpec, path: str) -> None:
    """Empty what `path` names, so that a merge replaces it instead of adding to it."""
    message: Message = spec
    names = path.split(".")
    for name in names[:-1]:
        field_ = _field(message, name)
        if field_ is None or field_.is_repeated or field_.message_type is None:
            break
        if not message.HasField(field_.name):
            return
        message = getattr(message, field_.name)
    else:
        field_ = _field(message, names[-1])
        if field_ is not None:
            message.ClearField(field_.name)


def _field(message: Message, name: str) -> FieldDescriptor | None:
    for field_ in fields_of(message):
        if name in (field_.name, field_.json_name):
            return field_
    return None
