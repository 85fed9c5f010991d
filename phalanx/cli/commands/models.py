"""``phalanx models`` and ``phalanx predict``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phalanx.cli.commands.data import FORCE, PANEL, flag
from phalanx.cli.context import settings_of
from phalanx.data.wording import spelled
from phalanx.texts import number_of

if TYPE_CHECKING:
    from phalanx.data.predict import LoadedModel

group = typer.Typer(no_args_is_help=True, help="List, download and delete models.")
NAME = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="NAME (the newest) or NAME@VERSION; of another namespace: NAMESPACE/NAME.",
    ),
]

ALLOW_CODE = Annotated[
    bool,
    typer.Option(
        "--allow-code", metavar="", help="Run the code that the model brings; trust it first."
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.add_typer(group, name="models", rich_help_panel=PANEL)
    app.command(rich_help_panel=PANEL)(predict)


@group.command("list")
def list_models(context: typer.Context) -> None:
    """List the models."""
    from phalanx.cli.output import print_json_list, print_table
    from phalanx.sdk.values import local_time

    settings = settings_of(context)
    with settings.connect() as cluster:
        found = cluster.models.list()
    if settings.json:
        print_json_list("models", found)
        return
    print_table(
        ("MODEL", "JOB", "METRICS", "CREATED"),
        [
            (
                f"{model.name}@{model.version}",
                model.job_id,
                _metrics_text(dict(model.metrics)),
                local_time(model.create_time),
            )
            for model in found
        ],
        empty="no models yet; a job that succeeds leaves one",
    )


@group.command()
def show(context: typer.Context, name: NAME) -> None:
    """Show where a model comes from and how good it is."""
    from phalanx.cli.output import bytes_text, print_fields, print_json
    from phalanx.sdk.values import local_time

    settings = settings_of(context)
    with settings.connect() as cluster:
        model = cluster.models.describe(name)
    if settings.json:
        print_json(model)
        return
    print_fields(
        [
            ("model", f"{model.name}@{model.version}"),
            ("job", model.job_id),
            ("created", local_time(model.create_time)),
            *((key, f"{value:.5g}") for key, value in sorted(model.metrics.items())),
            ("sha256", model.parameters_sha256),
            ("bit-identical", model.bit_identical),
            *((f"tag {key}", value) for key, value in sorted(model.tags.items())),
            *((file.path, bytes_text(file.size_bytes)) for file in model.files),
        ]
    )


@group.command()
def get(
    context: typer.Context,
    name: NAME,
    folder: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="New folder. Default: NAME-VERSION.")
    ] = None,
) -> None:
    """Download a model's files: model.safetensors, model.json, README.md."""
    from phalanx.cli.output import print_json

    settings = settings_of(context)
    with settings.connect() as cluster:
        model = cluster.models.describe(name)
        target = folder or Path(f"{model.name}-{model.version}")
        written = cluster.models.download(f"{model.name}@{model.version}", target)
    if settings.json:
        print_json({"model": f"{model.name}@{model.version}", "path": str(written)})
    else:
        print(written)


@group.command()
def export(
    context: typer.Context,
    name: NAME,
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help=(
                "FILE.zip: everything; FILE.safetensors, FILE.npz: the parameters only; "
                "FILE.onnx: what predicts."
            ),
        ),
    ],
    allow_code: ALLOW_CODE = False,
) -> None:
    """Write a model to one file, in a format that other programs read.

    An ONNX file takes prepared rows: numbers, and a column for each category. It needs the extra
    `onnx`, and a model that scikit-learn has a class for, or a PyTorch module.
    """
    from phalanx.cli.output import print_json

    settings = settings_of(context)
    with settings.connect() as cluster:
        cluster.models.export(name, file, allow_code=allow_code)
    if settings.json:
        print_json({"path": str(file)})
    else:
        print(file)


@group.command()
def delete(context: typer.Context, name: NAME, force: FORCE = False) -> None:
    """Delete a model: NAME@VERSION, or NAME with all its versions.

    Refused while a job refers to it that starts from it. With --force only while one can still
    run; those that have ended cannot be verified then.
    """
    from phalanx.cli.output import deleted_text, print_json, say

    settings = settings_of(context)
    with settings.connect() as cluster:
        cluster.models.delete(name, force=force)
    if settings.json:
        print_json({})
    else:
        say(deleted_text(name))


def predict(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="NAME, NAME@VERSION, or a downloaded model's folder."),
    ],
    input: Annotated[
        Path,
        typer.Argument(metavar="INPUT", help="Raw rows, in any format that `data add` reads."),
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Write .csv or .parquet here."),
    ] = None,
    allow_code: ALLOW_CODE = False,
) -> None:
    """Predict labels for raw rows of a CSV or Parquet file.

    Columns are found by name, as in the training data; others are ignored. Writes the column
    `prediction` and the probability of each class, or the decision value of a model that has none;
    without -o as CSV to standard output. With a folder for MODEL it needs no cluster.

    [bold]Example[/bold]

    phalanx predict adult new-people.csv -o predictions.csv
    """
    from phalanx.data.model_files import load_model_directory

    settings = settings_of(context)
    if Path(model).is_dir():
        folder = Path(model)
    else:
        with settings.connect() as cluster:
            folder = cluster.models.cached(model)
    loaded = load_model_directory(folder, allow_code=allow_code)
    with spelled(flag):
        _write_predictions(loaded, input, output, as_json=settings.json)


def _write_predictions(
    model: LoadedModel, input: Path, output: Path | None, *, as_json: bool
) -> None:
    from phalanx.cli.output import print_json, say
    from phalanx.sdk.prediction import predict_file, predicted_rows

    written = None
    if output is None and as_json:
        for row in predicted_rows(model, input):
            print_json(row)
    else:
        written = predict_file(model, input, output or sys.stdout.buffer)
    for remark in model.remarks.sentences:
        say(f"note: {remark}")
    if output is None or written is None:
        sys.stdout.flush()
    elif as_json:
        print_json({"path": str(output), "rows": written.rows})
    else:
        say(f"{number_of(written.rows, 'prediction')} written to {output}")


def _metrics_text(metrics: dict[str, float]) -> str:
    shown = [name for name in sorted(metrics) if name.startswith("test/")] or sorted(metrics)
    return " ".join(f"{name}={metrics[name]:.4g}" for name in shown[:3])
