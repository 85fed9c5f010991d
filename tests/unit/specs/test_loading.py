"""Job files: what is accepted, and what is said about everything else."""

from __future__ import annotations

import json

import numpy as np
import pytest
from ruamel.yaml import YAML

from phalanx import specs
from phalanx.errors import InvalidArgument, Violation
from phalanx.sdk.job_files import as_document
from phalanx.v1.job_spec_pb2 import JobSpec

DESIGN_JOB = """
name: fashion-mlp
data: {name: fashion, shards: 16}
train:
  model: {mlp: {hidden: [128]}}
  optimizer: {adam: {learning_rate: 0.003}}
  synchronous: {}   # asynchronous: {}, stale: {bound: 4}, local: {steps: 20}
  batch_size: 2048
  stop: {epochs: 20, thresholds: [{metric: test/accuracy, at_least: 0.86}]}
  evaluation: {every_steps: 20}
  checkpoints: {every_steps: 20}
"""


def wrong(text: str, *, as_json: bool = False) -> tuple[Violation, ...]:
    with pytest.raises(InvalidArgument) as caught:
        specs.load_document(text, "job.yaml", json=as_json)
    assert caught.value.reason == "SPEC_INVALID"
    assert caught.value.violations
    return caught.value.violations


def mistakes(text: str, *, as_json: bool = False) -> list[Violation]:
    """What is wrong with a piece of a job, which of course has no name, no data and no model."""
    violations = wrong(text, as_json=as_json)
    return [each for each in violations if not each.message.startswith("is missing")]


def only(text: str, *, as_json: bool = False) -> Violation:
    violations = mistakes(text, as_json=as_json)
    assert len(violations) == 1, violations
    return violations[0]


def test_the_job_of_the_design_loads_as_written() -> None:
    spec = specs.load_yaml(DESIGN_JOB)
    assert spec.name == "fashion-mlp"
    assert list(spec.train.model.mlp.hidden) == [128]
    assert spec.train.optimizer.adam.learning_rate == 0.003
    assert spec.train.WhichOneof("consistency") == "synchronous"
    assert spec.train.stop.thresholds[0].at_least == 0.86
    assert spec.train.stop.epochs == 20.0


def test_json_is_the_same_shape() -> None:
    document = json.dumps(
        {
            "name": "x",
            "data": {"name": "d"},
            "train": {"batchSize": "12", "model": {"logisticRegression": {"bias": False}}},
            "retain": "1.5s",
        }
    )
    spec = specs.load_json(document)
    assert spec.train.batch_size == 12
    assert spec.train.model.logistic_regression.HasField("bias")
    assert (spec.retain.seconds, spec.retain.nanos) == (1, 500_000_000)


def test_yaml_that_is_json_gives_the_same_spec() -> None:
    document = json.dumps(specs.to_json(specs.load_yaml(DESIGN_JOB)))
    assert specs.load_yaml(document) == specs.load_json(document) == specs.load_yaml(DESIGN_JOB)


@pytest.mark.parametrize(
    ("text", "seconds", "nanos"),
    [
        ("30m", 1800, 0),
        ("1.5s", 1, 500_000_000),
        ("2h", 7200, 0),
        ("1h30m", 5400, 0),
        ("250ms", 0, 250_000_000),
        ("1d", 86400, 0),
        (".5s", 0, 500_000_000),
        ("-1.5s", -1, -500_000_000),
    ],
)
def test_durations_are_normalised(text: str, seconds: int, nanos: int) -> None:
    retain = specs.load_yaml(f"retain: {text}").retain
    assert (retain.seconds, retain.nanos) == (seconds, nanos)


@pytest.mark.parametrize("text", ["30", "soon", "5 minutes", "1m30", "h", "''"])
def test_a_duration_needs_its_unit(text: str) -> None:
    violation = only(f"retain: {text}")
    assert violation.field == "retain"
    assert "30s" in violation.message


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("1.", 1.0), (".5", 0.5), ("7", 7.0), ("0x10", 16.0), ("0o17", 15.0)],
)
def test_numbers_are_those_of_yaml_1_2(text: str, value: float) -> None:
    assert specs.load_yaml(f"train: {{l2: {text}}}").train.l2 == value


@pytest.mark.parametrize("text", ["no", "yes", "on", "off", "1_000", "12:30", "2024-01-01"])
def test_what_yaml_1_1_would_convert_is_text(text: str) -> None:
    assert specs.load_yaml(f"labels: {{key: {text}}}").labels["key"] == text


@pytest.mark.parametrize(
    ("text", "field", "says", "line"),
    [
        ("nam: x", "nam", "did you mean name?", 1),
        ("train: {}\ncustom: {}", "custom", "unknown field; known are", 2),
        ("train: {custom: {}}", "train.custom", "it belongs in train.model", 1),
        (
            "train:\n  batch_size: many",
            "train.batch_size",
            "whole number, found the text 'many'",
            2,
        ),
        ("train: {batch_size: 1.5}", "train.batch_size", "whole number, found the number 1.5", 1),
        ("train: {batch_size: 3000000000}", "train.batch_size", "out of range", 1),
        ("train: {l2: lots}", "train.l2", "expected a number", 1),
        ("train: {l2: true}", "train.l2", "found the truth value true", 1),
        ("name: 5", "name", "put it in quotes", 1),
        ("name: [a]", "name", "expected one value, found a list", 1),
        ("name: {a: b}", "name", "found a mapping", 1),
        ("data: fashion", "data", "expected a mapping of fields, found the text 'fashion'", 1),
        ("train: [1]", "train", "found a list", 1),
        ("train: {stop: {thresholds: {}}}", "train.stop.thresholds", "expected a list", 1),
        ("labels: [a]", "labels", "expected a mapping", 1),
        ("labels: {a: 1}", "labels.a", "expected text", 1),
        ("name:\n", "name", "nothing is given here", 1),
        ("train: {synchronous: }", "train.synchronous", "write `synchronous: {}`", 1),
        ("train: {synchronous: null}", "train.synchronous", "null is given here", 1),
        ("train: ~", "train", "null is given here", 1),
        ("name: a\nname: b", "name", "duplicate key; the first is on line 1", 2),
        (
            "data:\n  shards: 1\n  shards: 2",
            "data.shards",
            "duplicate key; the first is on line 2",
            3,
        ),
        (
            "train:\n  synchronous: {}\n  stale: {bound: 1}",
            "train.stale",
            "choose one consistency: synchronous is already given on line 2",
            3,
        ),
        ("train: {batch_size: 1, batchSize: 2}", "train.batch_size", "given twice", 1),
        ("name: !!python/object x", "name", "tag", 1),
        ("train: {}\nforest: {}", "forest", "choose one program", 2),
        ("- a\n- b", "", "expected a mapping of fields, found a list", 1),
        ("just text", "", "expected a mapping of fields", 1),
        ("a: [1", "", "not valid YAML", 1),
        ("a: b: c", "", "not valid YAML", 1),
        ("\ta: 1", "", "indent with spaces", 1),
        ("---\na: 1\n---\nb: 1", "", "another document", 3),
        ("a: *nowhere", "", "undefined alias", 1),
        ("a:\n  " + "[" * 65 + "]" * 65, "", "nested deeper than 64 levels", 2),
        ("a:\n  " + "[" * 3000, "", "nested deeper than 64 levels", 2),
        ("- " * 3000, "", "nested deeper than 64 levels", 1),
        ("", "", "the file is empty", None),
        ("# nothing\n", "", "the file is empty", None),
    ],
)
def test_each_mistake_has_its_message(text: str, field: str, says: str, line: int | None) -> None:
    violation = only(text)
    assert (violation.field, violation.line) == (field, line)
    assert says in violation.message


def test_as_many_levels_as_are_allowed_are_read() -> None:
    assert only("a: " + "[" * 64 + "]" * 64).field == "a", "it is no field, but its value was read"


@pytest.mark.parametrize(
    ("text", "says", "line"),
    [
        ('{"name": "a",}', "double quotes", 1),
        ('{"name": "a"', "expected ','", 1),
        ('{"name": \n 01}', "expected ','", 2),
        ('{"name": nul}', "expected a value", 1),
        ("{'name': 1}", "double quotes", 1),
        ('{"name": "a"} x', "after the end", 1),
        ('{"name": "a\nb"}', "control character", 1),
        ('{"name": NaN}', "expected a value", 1),
        ("", "expected a value", 1),
        ('{"name": "\\ud800"}', "surrogate", 1),
        ('{"a": ' + "[" * 100 + "]" * 100 + "}", "nested deeper", 1),
    ],
)
def test_json_mistakes_have_lines(text: str, says: str, line: int) -> None:
    violation = wrong(text, as_json=True)[0]
    assert says.lower() in violation.message.lower()
    assert violation.line == line


def test_json_duplicates_and_nulls_are_refused() -> None:
    text = '{"name": "a",\n"name": "b",\n"train": {"synchronous": null}}'
    found = [(each.field, each.line) for each in mistakes(text, as_json=True)]
    assert found == [("name", 2), ("train.synchronous", 3)]


def test_all_mistakes_are_named_at_once_in_order() -> None:
    text = "nam: x\ntrain:\n  batch_size: x\n  l2: []\n  model: {mlp: {hidden: [a, 3]}}\n"
    found = [(each.field, each.line) for each in mistakes(text)]
    assert found == [
        ("nam", 1),
        ("train.batch_size", 3),
        ("train.l2", 4),
        ("train.model.mlp.hidden[0]", 5),
    ]


WRONG_ALL_OVER = """\
name: Not A Name
data: {name: d, shardz: 4}
retain: soon
train:
  model: {mlp: {hidden: [0]}}
  optimiser: {adam: {learning_rate: -1}}
  batch_size: -5
  stop: {epochs: many, steps: 0}
  verification: {replicas: 4}
"""


@pytest.mark.parametrize("as_json", [False, True])
def test_wrong_fields_types_and_values_come_in_one_answer(as_json: bool) -> None:
    text = WRONG_ALL_OVER
    if as_json:
        text = json.dumps(YAML(typ="safe", pure=True).load(WRONG_ALL_OVER), indent=1)
    found = {each.field: each.line for each in wrong(text, as_json=as_json)}
    assert set(found) == {
        "name",
        "data.shardz",
        "retain",
        "train.model.mlp.hidden[0]",
        "train.optimiser",
        "train.batch_size",
        "train.stop.epochs",
        "train.stop.steps",
        "train.verification.replicas",
    }
    assert all(found.values())
    if not as_json:
        assert found["train.stop.epochs"] == 8
        assert found["name"] == 1


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("name: a\ndata: {name: d}\ntrane: {}\n", ["trane"]),
        ("name: a\ndata: {name: d}\ntrain: {model: {mpl: {}}}\n", ["train.model.mpl"]),
        ("name: a\ndata: {name: d}\ntrain: yes please\n", ["train"]),
        ("name: a\ndata: {nam: d}\ntrain: {model: {mlp: {hidden: [4]}}}\n", ["data.nam"]),
        ("name: a\ndata: {name: 4}\nmlp: {}\n", ["data.name", "mlp", "train"]),
    ],
)
def test_what_is_missing_only_for_a_mistake_is_not_told_twice(text: str, fields: list[str]) -> None:
    assert sorted(each.field for each in wrong(text)) == fields


def test_the_error_counts_what_it_does_not_show() -> None:
    with pytest.raises(InvalidArgument, match=r"job\.yaml:1: nam: .*\(and 1 more\)"):
        specs.load_document(
            "nam: x\nnom: y\ndata: {name: d}\ntrain: {model: {mlp: {hidden: [1]}}}", "job.yaml"
        )


def test_arguments_keep_whole_numbers_whole() -> None:
    text = (
        "train: {model: {custom: {entrypoint: 'a:b', arguments: "
        "{width: 128, rate: 0.5, deep: {sizes: [1, 2.5, true, text, null]}}}}}"
    )
    arguments = specs.struct_to_python(specs.load_yaml(text).train.model.custom.arguments)
    assert arguments == {
        "width": 128,
        "rate": 0.5,
        "deep": {"sizes": [1, 2.5, True, "text", None]},
    }
    assert isinstance(arguments["width"], int)


@pytest.mark.parametrize(
    ("value", "says"), [("9007199254740993", "2^53"), (".nan", "finite"), ("", "nothing is given")]
)
def test_arguments_that_would_be_changed_are_refused(value: str, says: str) -> None:
    text = f"train: {{model: {{custom: {{arguments: {{width: {value}}}}}}}}}"
    violation = only(text)
    assert violation.field == "train.model.custom.arguments.width"
    assert says in violation.message


def test_aliases_may_be_used_but_not_to_explode() -> None:
    spec = specs.load_yaml("name: &n job\noutput: {model: *n}")
    assert spec.output.model == "job"
    bomb = "a: &a [x]\n" + "".join(
        f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
        for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    )
    assert any("too large" in each.message for each in wrong(bomb))


def test_a_text_without_end_is_refused() -> None:
    assert "longer than" in only("name: " + "x" * 2_000_000).message
    assert "longer than" in only('{"a": "' + "x" * 2_000_000, as_json=True).message


def test_set_wins_over_the_file() -> None:
    document = specs.load_document(
        DESIGN_JOB,
        "job.yaml",
        overrides=["train.batchSize=99", "train.stop.epochs=3", "labels.team=blue", "seed=7"],
    )
    assert document.spec.train.batch_size == 99
    assert document.spec.train.stop.epochs == 3.0
    assert document.spec.train.stop.thresholds[0].at_least == 0.86
    assert document.spec.labels["team"] == "blue"
    assert document.spec.seed == 7


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("train.batch_size", "write path=value"),
        ("=5", "write path=value"),
        ("train.batch_size=many", "whole number"),
        ("train.nothing=1", "unknown field"),
        ("train.stop.thresholds.metric=1", "inside a list"),
        ("name.x=1", "inside the text"),
        ("seed=[", "not valid YAML"),
    ],
)
def test_wrong_settings_are_told(setting: str, says: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        specs.load_document(DESIGN_JOB, "job.yaml", overrides=[setting])
    assert says in caught.value.message
    assert caught.value.message.startswith("job.yaml: "), "it stands on no line of the file"


def test_settings_on_a_message_replace_lists_and_choices() -> None:
    spec = specs.load_yaml(DESIGN_JOB)
    changed = specs.apply_sets(
        spec, ["train.stop.thresholds=[]", "train.model={softmax_regression: {}}", "seed=3"]
    )
    assert not changed.train.stop.thresholds
    assert changed.train.model.WhichOneof("kind") == "softmax_regression"
    assert changed.seed == 3
    assert spec == specs.load_yaml(DESIGN_JOB), "the original stays"
    with pytest.raises(InvalidArgument, match="whole number"):
        specs.apply_sets(spec, ["seed=x"])


def test_lines_are_added_to_violations_of_the_server() -> None:
    document = specs.load_document(DESIGN_JOB, "job.yaml")
    named = document.locate(
        [
            Violation("train.optimizer.adam.learning_rate", "bad"),
            Violation("train.stop.thresholds[0].metric", "bad"),
            Violation("train.checkpoints.keep", "bad"),
            Violation("retain", "bad"),
        ]
    )
    assert [each.line for each in named] == [6, 9, 11, None]


def test_an_empty_mapping_sets_the_message() -> None:
    spec = specs.load_yaml("train: {}")
    assert spec.WhichOneof("program") == "train"
    assert specs.load_yaml("{}") == JobSpec()


@pytest.mark.parametrize(
    ("text", "as_json", "field"),
    [
        ('{"tasks": {"arguments": [{"n": "\\ud800"}]}}', True, ""),
        ('{"name": "a", "\\udc00": 1}', True, ""),
        ('tasks: {arguments: [{n: "\\ud800"}]}', False, "tasks.arguments[0].n"),
        ('code: {files: {"\\ud800.py": x}}', False, "code.files"),
    ],
)
def test_half_a_character_is_refused(text: str, as_json: bool, field: str) -> None:
    found = [each for each in mistakes(text, as_json=as_json) if "surrogate" in each.message]
    assert [(each.field, each.line) for each in found] == [(field, 1)]


def test_numbers_and_arrays_of_numpy_are_those_of_json() -> None:
    """Whoever computes settings hands them over as they come."""
    plain = {"name": "x", "seed": 3, "train": {"l2": 0.5, "model": {"mlp": {"hidden": [4, 3]}}}}
    drawn = {
        "name": "x",
        "seed": np.int64(3),
        "train": {"l2": np.float32(0.5), "model": {"mlp": {"hidden": np.array([4, 3])}}},
    }
    assert as_document(drawn).spec == as_document(plain).spec
    for value, message in ((np.nan, "not JSON compliant"), ({3}, "set is not JSON")):
        with pytest.raises(InvalidArgument, match=f"the job is no JSON: .*{message}"):
            as_document({"name": "x", "train": {"l2": value}})
