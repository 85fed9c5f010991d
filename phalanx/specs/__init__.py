"""Job specs: loading, defaults, validation, plan. Needs no numeric library.

document = load_document(text, "job.yaml")        # all violations at once, with lines
spec = prepare(document.spec, dataset)            # every default written, checked
print(plan(spec, dataset, eligible_workers=4), spec_sha256(spec))
"""

from phalanx.programs.stored_model import Taken, model_field, model_name, stored_model, take_model
from phalanx.specs.canonical import canonical_json, spec_sha256, struct_to_python, to_json
from phalanx.specs.continuing import Reached, check_rest, check_same, parse_reference
from phalanx.specs.documents import (
    Document,
    apply_sets,
    load_document,
    load_json,
    load_yaml,
    set_value,
)
from phalanx.specs.features import as_chosen
from phalanx.specs.plan import job_plan, plan
from phalanx.specs.prepare import (
    check_spec,
    chooses_columns,
    names_dataset,
    prepare,
    reads_dataset,
)
from phalanx.specs.resolve import resolve, resolve_start_model
from phalanx.specs.unimplemented import refuse_unimplemented, unimplemented
from phalanx.specs.validate import validate, validate_against

__all__ = [
    "Document",
    "Reached",
    "Taken",
    "apply_sets",
    "as_chosen",
    "canonical_json",
    "check_rest",
    "check_same",
    "check_spec",
    "chooses_columns",
    "job_plan",
    "load_document",
    "load_json",
    "load_yaml",
    "model_field",
    "model_name",
    "names_dataset",
    "parse_reference",
    "plan",
    "prepare",
    "reads_dataset",
    "refuse_unimplemented",
    "resolve",
    "resolve_start_model",
    "set_value",
    "spec_sha256",
    "stored_model",
    "struct_to_python",
    "take_model",
    "to_json",
    "unimplemented",
    "validate",
    "validate_against",
]
