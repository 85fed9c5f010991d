"""Warm start: the parameters of an earlier model as version 0 of a new job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from phalanx.layouts import model_layout
from phalanx.models.base import views
from phalanx.specs.starting import check_shapes, shapes_in_file
from phalanx.v1.training_pb2 import Layout


def check_start_parameters(path: Path, layout: Layout) -> None:
    """Raise InvalidArgument unless a safetensors file has the tensors of a layout.

    Args:
        path: ``model.safetensors`` of the earlier model; only its head is read.
        layout: of the new job; names and shapes must be the same, the dtype may differ. Its
            workspace is in no file.
    """
    wanted = {tensor.name: tensor.shape for tensor in model_layout(layout).tensors}
    check_shapes(shapes_in_file(path), wanted)


def load_start_parameters(path: Path, layout: Layout, out: NDArray[Any]) -> None:
    """Write the tensors of a safetensors file into a flat vector, by name; the workspace is zero.

    Args:
        path: ``model.safetensors`` of the earlier model.
        layout: of the new job; see ``check_start_parameters``.
        out: (n,) of the layout's dtype.

    Raises:
        InvalidArgument: the file's tensors are not those of the layout.
    """
    from safetensors.numpy import load_file

    check_start_parameters(path, layout)
    stored = load_file(path)
    model = model_layout(layout)
    out[model.element_count :] = 0
    for name, target in views(model, out).items():
        target[...] = stored[name]
