"""Losses of PyTorch modules: of each row, and what the outputs predict.

A job names one of ``torch.nn.functional`` or a function of its own. Losses come row by row, so
that a leaf can sum and weigh them; a mean over the rows of a leaf would count small leaves too
much.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from phalanx.errors import InvalidArgument
from phalanx.models.base import DataSchema
from phalanx.models.code import UserCode, load_entrypoint
from phalanx.models.torch_exact import Tensor, import_torch
from phalanx.specs import catalog
from phalanx.texts import number_of

ONE_OUTPUT = frozenset({"binary_cross_entropy_with_logits", *catalog.TORCH_REGRESSION_LOSSES})
"""Losses of one number for each row."""


@dataclass(frozen=True)
class Loss:
    """How far outputs are from targets, and what they predict.

    Attributes:
        name: as the job gives it.
        function: (outputs, targets) → the loss of each row.
        schema: what the data looks like.
    """

    name: str
    function: Callable[[Tensor, Tensor], Tensor]
    schema: DataSchema

    def of_rows(self, outputs: Any, targets: Tensor) -> Tensor:
        """Return (rows,) losses. Raises InvalidArgument where the shapes are others."""
        rows = len(targets)
        outputs = self._outputs(outputs, rows)
        losses = self.function(outputs, targets.to(outputs.dtype) if self._real else targets)
        shape = getattr(losses, "shape", None)
        if shape is None or tuple(shape) != (rows,):
            found = type(losses).__name__ if shape is None else f"the shape {tuple(shape)}"
            raise InvalidArgument(
                f"the loss {self.name} must return the loss of each row, ({rows},), and returned "
                f"{found}; leave the sum and the mean out (reduction='none')",
                reason="WRONG_OUTPUTS",
            )
        return losses

    def predictions(self, outputs: Any, rows: int) -> Tensor:
        """Return (rows, classes) probabilities, or (rows,) values for a regression."""
        return self.predicted(self._outputs(outputs, rows))

    def predicted(self, outputs: Tensor) -> Tensor:
        """Return the predictions of outputs whose shape is known to fit."""
        torch = import_torch()
        if not self.schema.classes:
            values: Tensor = outputs.reshape(-1)
            return values.exp() if self.name == "poisson_nll_loss" else values
        if outputs.ndim == 1 or outputs.shape[1] == 1:
            positive = torch.sigmoid(outputs.reshape(-1))
            both: Tensor = torch.stack([1 - positive, positive], dim=1)
            return both
        probabilities: Tensor = outputs.exp() if self.name == "nll_loss" else outputs.softmax(1)
        return probabilities

    @property
    def _real(self) -> bool:
        """Whether targets are compared with outputs as numbers."""
        return self.name in ONE_OUTPUT

    def _outputs(self, outputs: Any, rows: int) -> Tensor:
        """Check the outputs of a module; those of losses of one number get the shape (rows,)."""
        torch = import_torch()
        if not isinstance(outputs, torch.Tensor):
            raise InvalidArgument(
                f"the module must return a tensor, not {type(outputs).__name__}",
                reason="WRONG_OUTPUTS",
            )
        shape, classes = tuple(outputs.shape), self.schema.classes
        one, each = {(rows,), (rows, 1)}, (rows, classes)
        if self._real or not classes:
            fits, wanted = shape in one, f"({rows},) or ({rows}, 1)"
        elif ":" in self.name:
            fits = shape == each or (classes == 2 and shape in one)
            wanted = str(each) + (f", ({rows},) or ({rows}, 1)" if classes == 2 else "")
        else:
            fits, wanted = shape == each, str(each)
        if not fits:
            raise InvalidArgument(
                f"for {number_of(rows, 'row')} the module must return the shape {wanted} with the "
                f"loss {self.name}, and returned {shape}",
                reason="WRONG_OUTPUTS",
            )
        tensor: Tensor = outputs.reshape(rows) if self._real else outputs
        return tensor


def load_loss(name: str, schema: DataSchema, code: UserCode | None, device: str) -> Loss:
    """Return the loss that a job names. One that is a module computes on the device, too.

    Raises InvalidArgument for a name that is not known, and for a loss that does not fit the data.
    """
    if ":" in name:
        return Loss(name, _placed(load_entrypoint(name, code), schema.dtype, device), schema)
    task = catalog.CLASSIFICATION if schema.classes else catalog.REGRESSION
    if catalog.TORCH_LOSSES.get(name) != task:
        fitting = [each for each, of in catalog.TORCH_LOSSES.items() if of == task]
        raise InvalidArgument(
            f"train.model.torch.loss: {name[:60]!r} is no loss for {task}; use one of "
            f"{', '.join(fitting)}, or MODULE:FUNCTION for one of your own"
        )
    if name == "binary_cross_entropy_with_logits" and schema.classes != 2:
        raise InvalidArgument(
            f"train.model.torch.loss: {name} needs 2 classes, the data has {schema.classes}; use "
            "cross_entropy"
        )
    function = getattr(import_torch().nn.functional, name)

    def of_rows(outputs: Tensor, targets: Tensor) -> Tensor:
        losses: Tensor = function(outputs, targets, reduction="none")
        return losses

    return Loss(name, of_rows, schema)


def _placed(loss: Callable[..., Any], dtype: str, device: str) -> Callable[..., Any]:
    """A module may hold tensors, such as weights of classes."""
    torch = import_torch()
    if not isinstance(loss, torch.nn.Module):
        return loss
    placed: Callable[..., Any] = copy.deepcopy(loss).to(device, getattr(torch, dtype))
    return placed
