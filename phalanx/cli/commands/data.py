"""``phalanx data``: put data sets into the cluster."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from phalanx.cli.context import settings_of
from phalanx.data.wording import Value, spelled
from phalanx.errors import InvalidArgument
from phalanx.texts import number_of

group = typer.Typer(no_args_is_help=True, help="Add and list data sets.")
PANEL = "Data, jobs and models"
_FILES_SHOWN = 10
_FLAG_OF = {"feature_count": "features"}


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.add_typer(group, name="data", rich_help_panel=PANEL)


NAME = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="Name of the data set, or NAME@VERSION; of another namespace: NAMESPACE/NAME.",
    ),
]

FORCE = Annotated[
    bool,
    typer.Option("--force", metavar="", help="Also what jobs refer to that have ended for good."),
]


@group.command()
def add(
    context: typer.Context,
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", help="Name to give it; an existing one gets a new version."),
    ],
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH",
            help="csv, parquet, npz, libsvm, safetensors or idx; several files are read one after "
            "another (idx: images, then labels).",
        ),
    ],
    target: Annotated[
        str | None,
        typer.Option(
            metavar="COL", help="Column to predict, by name or number. Default: the last."
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="classification or regression. Default: by the values."),
    ] = None,
    test: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FRACTION|PATH", help="Held out for evaluation: 0.2, or its own file(s)."
        ),
    ] = None,
    validation: Annotated[
        list[str] | None,
        typer.Option(metavar="FRACTION|PATH", help="Held out for early stopping."),
    ] = None,
    missing: Annotated[
        str,
        typer.Option(
            metavar="HOW",
            help="Missing values: error, category (of their own) or mean.",
        ),
    ] = "error",
    link: Annotated[
        bool,
        typer.Option(
            "--link",
            metavar="",
            help="Do not copy: read Parquet files in place, where storage may (--link-root of "
            "`phalanx up`).",
        ),
    ] = False,
    format: Annotated[
        str | None, typer.Option(metavar="F", help="Default: by the file's ending.")
    ] = None,
    header: Annotated[
        bool | None,
        typer.Option(metavar="", help="Whether the first line names the columns. Default: look."),
    ] = None,
    columns: Annotated[
        str | None, typer.Option(metavar="A,B,…", help="Column names of a file without header.")
    ] = None,
    categorical: Annotated[
        str | None, typer.Option(metavar="A,B,…", help="Columns to take as categories.")
    ] = None,
    numeric: Annotated[
        str | None, typer.Option(metavar="A,B,…", help="Columns to take as numbers.")
    ] = None,
    ignore: Annotated[
        str | None, typer.Option(metavar="A,B,…", help="Columns to leave out.")
    ] = None,
    delimiter: Annotated[
        str | None, typer.Option(metavar="C", help="Default: comma, semicolon, tab or bar.")
    ] = None,
    comment: Annotated[
        str | None, typer.Option(metavar="C", help="Lines that start with it are skipped.")
    ] = None,
    trim_labels: Annotated[
        str | None,
        typer.Option(metavar="C", help="Characters to cut off from the end of labels, such as '.'"),
    ] = None,
    max_categories: Annotated[
        int | None, typer.Option(metavar="N", help="Most categories of one column. Default: 1000.")
    ] = None,
    features: Annotated[
        int | None, typer.Option(metavar="N", help="Number of features of LIBSVM data.")
    ] = None,
    features_key: Annotated[
        str | None, typer.Option(metavar="NAME", help="Array of features (NPZ, safetensors).")
    ] = None,
    target_key: Annotated[
        str | None, typer.Option(metavar="NAME", help="Array of targets (NPZ, safetensors).")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="T", help="float32 or float64. Default: float32.")
    ] = None,
    layout: Annotated[
        str | None, typer.Option(metavar="L", help="auto, dense or csr. Default: auto.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Chooses the rows of a fraction.")] = 0,
) -> None:
    """Write a data set into the cluster's storage.

    [bold]Examples[/bold]

    phalanx data add adult adult.csv --target income --missing category --test 0.2

    phalanx data add fashion images.gz labels.gz --test images2.gz --test labels2.gz

    phalanx data add clicks /data/clicks/ --format parquet --link --test 0.1
    """
    options: dict[str, Any] = {
        "target": target,
        "task": task,
        "test": _held_out("--test", test),
        "validation": _held_out("--validation", validation),
        "missing": missing,
        "link": link,
        "format": format,
        "header": header,
        "columns": _names(columns),
        "categorical": _names(categorical),
        "numeric": _names(numeric),
        "ignore": _names(ignore),
        "delimiter": "\t" if delimiter == "\\t" else delimiter,
        "comment": comment,
        "trim_labels": trim_labels,
        "max_categories": max_categories,
        "feature_count": features,
        "features_key": features_key,
        "target_key": target_key,
        "dtype": dtype,
        "layout": layout,
        "seed": seed,
    }
    given = {key: value for key, value in options.items() if value is not None}
    add_with_progress(context, name, paths, given)


def add_with_progress(
    context: typer.Context, name: str, paths: list[Path], options: dict[str, Any]
) -> None:
    """Add a data set, showing on a terminal how much is stored."""
    from phalanx.cli.output import bytes_text, console, print_json

    settings = settings_of(context)
    stored_bytes = 0
    with settings.connect() as cluster:
        with console(stderr=True).status(f"reading {paths[0]}") as status:

            def on_stored(size_bytes: int) -> None:
                nonlocal stored_bytes
                stored_bytes += size_bytes
                if sys.stderr.isatty():
                    status.update(f"{name}: {bytes_text(stored_bytes)} stored")

            with spelled(flag):
                dataset = cluster.data.add(
                    name, *paths, on_stored=on_stored, on_silence=say_silent, **options
                )
        if settings.json:
            print_json(dataset)
            return
        manifest = cluster.data.manifest(f"{dataset.name}@{dataset.version}")
    print(f"{dataset.name}@{dataset.version}")
    _describe_short(dataset)
    say_notes(manifest.notes)


def say_notes(notes: tuple[str, ...]) -> None:
    """Say what was assumed of the data."""
    from phalanx.cli.output import say

    for note in notes:
        say(f"  note: {note}")


def flag(option: str, value: Value = "") -> str:
    """Return how an option of the data is given to `phalanx data add`."""
    name = _FLAG_OF.get(option, option).replace("_", "-")
    return f"--{name} {shlex.quote(value)}" if isinstance(value, str) and value else f"--{name}"


def say_silent() -> None:
    """Say what is waited for."""
    from phalanx.cli.output import say

    say(
        "storage has not answered for some seconds; waiting for it "
        "(`phalanx status` shows which services are up)"
    )


@group.command("list")
def list_datasets(context: typer.Context) -> None:
    """List the data sets."""
    from phalanx.cli.output import print_json_list, print_table
    from phalanx.sdk.values import local_time

    settings = settings_of(context)
    with settings.connect() as cluster:
        found = cluster.data.list()
    if settings.json:
        print_json_list("datasets", found)
        return
    print_table(
        ("NAME", "ROWS", "FEATURES", "TASK", "SIZE", "CREATED"),
        [
            (
                f"{item.name}@{item.version}",
                sum(item.rows.values()),
                item.features,
                item.task,
                _size(item),
                local_time(item.create_time),
            )
            for item in found
        ],
        empty="no data sets yet; add one with `phalanx data add NAME FILE`",
    )


@group.command()
def show(context: typer.Context, name: NAME) -> None:
    """Show columns, classes and splits of a data set."""
    from phalanx.cli.output import print_fields, print_json, print_table

    settings = settings_of(context)
    with settings.connect() as cluster:
        dataset = cluster.data.get(name)
        if settings.json:
            print_json(dataset)
            return
        manifest = cluster.data.manifest(name)
    print_fields(
        [
            ("name", f"{dataset.name}@{dataset.version}"),
            ("task", dataset.task),
            ("target", dataset.target),
            ("classes", ", ".join(dataset.classes[:20]) + (" …" if dataset.classes[20:] else "")),
            (
                "rows",
                ", ".join(f"{split} {rows:,}" for split, rows in sorted(dataset.rows.items())),
            ),
            ("features", dataset.features),
            ("columns", "" if manifest.columns else _names_by_place(dataset.features)),
            ("format", f"{dataset.format}, {manifest.dtype}"),
            ("size", _size(dataset)),
            *_linked_fields(manifest),
            ("manifest", dataset.manifest_digest),
        ]
    )
    if manifest.columns:
        print()
        print_table(
            ("COLUMN", "KIND", "CATEGORIES"),
            [
                (column.name, column.kind, len(column.vocabulary) or "")
                for column in manifest.columns
            ],
            empty="",
        )


@group.command()
def delete(context: typer.Context, name: NAME, force: FORCE = False) -> None:
    """Delete a data set: NAME@VERSION, or NAME with all its versions.

    Refused while a job refers to it. With --force only while one can still run; those that have
    ended can neither be verified nor be gone on from then.
    """
    from phalanx.cli.output import deleted_text, print_json, say

    settings = settings_of(context)
    with settings.connect() as cluster:
        cluster.data.delete(name, force=force)
    if settings.json:
        print_json({})
    else:
        say(deleted_text(name))


def _describe_short(dataset: Any) -> None:
    from phalanx.cli.output import say

    rows_text = ", ".join(f"{split} {count:,}" for split, count in sorted(dataset.rows.items()))
    kind = number_of(len(dataset.classes), "class", "classes") if dataset.classes else dataset.task
    features = number_of(dataset.features, "feature")
    say(f"  {rows_text} rows · {features} · {kind} · {_size(dataset)}")


def _size(dataset: Any) -> str:
    from phalanx.cli.output import bytes_text

    return bytes_text(dataset.size_bytes) + (", linked" if dataset.linked else "")


def _linked_fields(manifest: Any) -> list[tuple[str, str]]:
    """Where the rows of a linked data set lie."""
    from phalanx.cli.output import bytes_text

    files = manifest.links.all_files() if manifest.links else ()
    lines = [f"{file.path} ({bytes_text(file.size_bytes)})" for file in files[:_FILES_SHOWN]]
    if files[_FILES_SHOWN:]:
        lines.append(f"… and {number_of(len(files) - _FILES_SHOWN, 'more file')}")
    return [("linked" if number == 0 else " ", line) for number, line in enumerate(lines)]


def _names_by_place(count: int) -> str:
    names = "x1" if count == 1 else f"x1 … x{count}"
    return f"{names} (they have no names; these are their places)"


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def _held_out(option: str, values: list[str] | None) -> float | list[Path] | None:
    """Return a fraction, or the files of the split."""
    if not values:
        return None
    try:
        fraction = float(values[0])
    except ValueError:
        return [Path(value) for value in values]
    if len(values) > 1:
        raise InvalidArgument(f"{option} takes one fraction, or files; {values} is a mixture")
    return fraction
