"""Warm start: the parameters of an earlier model as version 0 of a new job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from phalanx.errors import InvalidArgument
from phalanx.models.base import views
from phalanx.v1.training_pb2 import Layout


def load_start_parameters(path: Path, layout: Layout, out: NDArray[Any]) -> None:
    """Write the tensors of a safetensors file into a flat vector, by name.

    Args:
        path: ``model.safetensors`` of the earlier model.
        layout: of the new job; names and shapes must be the same, the dtype may differ.
        out: (n,) of the layout's dtype.

    Raises:
        InvalidArgument: the file's tensors are not those of the layout.
    """
    from safetensors.numpy import load_file

    stored = load_file(path)
    tensors = views(layout, out)
    extra = sorted(stored.keys() - tensors.keys())
    if extra:
        raise InvalidArgument(
            f"train.start.model does not fit: it has a tensor {extra[0]!r}, which this job's model "
            "has not; start from a model of the same kind and size"
        )
    for name, target in tensors.items():
        tensor = stored.get(name)
        if tensor is None or tensor.shape != target.shape:
            found = "no such tensor" if tensor is None else f"shape {list(tensor.shape)}"
            raise InvalidArgument(
                f"train.start.model does not fit: {name!r} needs shape {list(target.shape)} and "
                f"the model has {found}; start from a model of the same kind and size"
            )
        target[...] = tensor
