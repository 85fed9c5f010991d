"""Predictions as Parquet: the same predictions give the same bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from phalanx.data.predict import LoadedModel
from phalanx.programs.arrays import Array
from phalanx.sdk.prediction import headings

ROW_GROUP = 65_536


def parquet_bytes(model: LoadedModel, parts: Sequence[dict[str, Array]]) -> bytes:
    """Return one file of the predictions of parts, one after another.

    A part has `probabilities` (rows, classes), `decision_values` (rows,), or the `values` that were
    predicted. Columns are those of `phalanx predict`.
    """
    columns: list[Array]
    if "probabilities" in parts[0]:
        outputs = np.concatenate([part["probabilities"] for part in parts])
        labels = model.classes[outputs.argmax(axis=1)]
        columns = [labels, *outputs.astype(np.float64).T]
    elif "decision_values" in parts[0]:
        decisions = np.concatenate([part["decision_values"] for part in parts])
        columns = [model.classes[(decisions > 0).astype(int)], decisions.astype(np.float64)]
    else:
        values = np.concatenate([part["values"] for part in parts])
        columns = list(values.T) if values.ndim > 1 else [values]
    table = pa.table(
        {
            name: pa.array(column.tolist() if column.dtype.kind == "U" else column.copy())
            for name, column in zip(headings(model), columns, strict=True)
        }
    )
    stream = io.BytesIO()
    parquet.write_table(table, stream, row_group_size=ROW_GROUP)
    return stream.getvalue()
