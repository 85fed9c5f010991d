"""Models that are PyTorch modules.

The entrypoint ``module:function`` of ``train.model.torch`` is called as
``function(schema, **arguments)`` and returns a ``torch.nn.Module``. It takes (rows, features), in
the job's dtype, and returns what the loss wants: a score for each class, or one number.

The flat vector holds the parameters in the order of ``named_parameters``, and after them the
buffers that are stored with the module and are real numbers, as the running statistics of batch
normalisation. A leaf hands in what these become on its own rows ("ghost" batch normalisation), and
the next version is the mean over all examples. Whole numbers, such as the count of batches, and
buffers that are not stored begin each leaf as they were built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.errors import InvalidArgument
from phalanx.models.base import (
    Array,
    Batch,
    DataSchema,
    LeafSums,
    Model,
    TensorViews,
    dense,
    make_layout,
)
from phalanx.models.code import OneProcess, UserCode, load_entrypoint
from phalanx.models.custom import CodeModel
from phalanx.models.torch_exact import Tensor, device_of, exact, import_torch, seed_of
from phalanx.models.torch_failures import failures_told
from phalanx.models.torch_losses import Loss, load_loss
from phalanx.specs.canonical import struct_to_python
from phalanx.training.metrics import CLASSIFICATION_SUMS, REGRESSION_SUMS
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import Layout

Module = Any
"""A `torch.nn.Module`."""
Build = Callable[[], Module]


def load_torch(spec: JobSpec, schema: DataSchema, code_dir: Path | None) -> Model:
    """Import the entrypoints of a job and build its module.

    Args:
        spec: resolved job.
        schema: what the data looks like.
        code_dir: folder with the job's ``code.files``; None where it has none.

    Raises:
        InvalidArgument: an entrypoint is not there, or gives no module that fits the job.
            Errors of the user's code pass through, with their traceback.
        FailedPrecondition: PyTorch is not installed, or sees no GPU where the job asks for one.
        DeviceLost, MemoryError: the GPU takes no module.
    """
    # First, since code of the job may use the GPU as soon as it is imported.
    device = device_of(spec.resources.gpus)
    torch_spec = spec.train.model.torch
    code = None if code_dir is None else UserCode(code_dir)
    with OneProcess():
        function = load_entrypoint(torch_spec.module, code)
        arguments = struct_to_python(torch_spec.arguments)
        with failures_told(device):
            loss = load_loss(torch_spec.loss, schema, code, device)
            model = TorchModel(
                lambda: function(schema, **arguments), torch_spec.module, loss, device
            )
        return CodeModel(model, code)


class TorchModel:
    """One module with its loss, on one device; see `device_of`."""

    def __init__(self, build: Build, name: str, loss: Loss, device: str) -> None:
        self._build = build
        self._name = name
        self._loss = loss
        self._device = device
        self._schema = loss.schema
        module = self._built(0)
        self.layout = _layout(module, self._schema.dtype)
        self.evaluation_sums = CLASSIFICATION_SUMS if self._schema.classes else REGRESSION_SUMS
        self._views = TensorViews(self.layout)
        self._module = module.to(self._device)
        held = {tensor.name for tensor in self.layout.tensors}
        #: Buffers that are no part of the vector, as they were built.
        self._fixed = {
            each: buffer.detach().clone()
            for each, buffer in self._module.named_buffers()
            if each not in held
        }
        torch = import_torch()
        #: The vector on its way to the module, which keeps tensors of its own: their place in
        #: memory, which kernels go by, is then the same everywhere.
        self._vector: Array = np.empty(self.layout.element_count, self.layout.dtype)
        self._incoming = {
            each: torch.from_numpy(view) for each, view in self._views(self._vector).items()
        }

    @cached_property
    def numeric_fingerprint(self) -> str:
        """What PyTorch computes here beyond the leaf of the job."""
        from phalanx.models.torch_golden import golden

        return golden(self._device)

    def initial_parameters(self, seed: int) -> Array:
        """See ``Model``; as if ``torch.manual_seed(seed)`` stood before the module is built."""
        vector: Array = np.empty(self.layout.element_count, self.layout.dtype)
        tensors = _tensors(self._built_again(seed))
        for name, view in self._views(vector).items():
            view[...] = tensors[name].detach().numpy()
        return vector

    def gradient(self, parameters: Array, batch: Batch, out: Array) -> LeafSums:
        """See ``Model``."""
        torch = import_torch()
        with self._computing(seed_of(batch.key or (0,))), torch.enable_grad():
            module = self._load(parameters).train()
            targets = self._targets(batch)
            losses = self._loss.of_rows(module(self._features(batch.features)), targets)
            if batch.weights is not None:
                losses = losses * self._on_device(batch.weights)
            total = losses.sum()
            if total.requires_grad:
                total.backward()
            self._hand_in(batch.rows, out)
            return LeafSums(batch.rows, float(losses.detach().double().sum()))

    def evaluate(self, parameters: Array, batch: Batch) -> NDArray[np.float64]:
        """See ``Model``."""
        torch = import_torch()
        with self._computing(), torch.no_grad():
            outputs = self._load(parameters).eval()(self._features(batch.features))
            targets = self._targets(batch)
            loss = float(self._loss.of_rows(outputs, targets).double().sum())
            predicted = self._loss.predictions(outputs, batch.rows)
            if self._schema.classes:
                correct = int((predicted.argmax(dim=1) == targets).sum())
                return np.array([loss, correct], np.float64)
            values = predicted.cpu().numpy().astype(np.float64)
        target = np.asarray(batch.targets, np.float64)
        error = values - target
        squared, absolute = float(error @ error), float(np.abs(error).sum())
        return np.array([loss, squared, absolute, target.sum(), target @ target], np.float64)

    def predict(self, parameters: Array, features: Any) -> Array:
        """See ``Model``."""
        torch = import_torch()
        with self._computing(), torch.no_grad():
            outputs = self._load(parameters).eval()(self._features(features))
            values: Array = self._loss.predictions(outputs, features.shape[0]).cpu().numpy()
            return values

    def predictor(self, parameters: Array) -> Module:
        """Return a module of its own, on the CPU and in evaluation mode, that predicts.

        It takes (rows, features) and returns what `predict` does; for writers of other formats.
        """
        torch = import_torch()
        module, predicted = self._built_again(0), self._loss.predicted
        self._fill(module, parameters)

        class Predictor(torch.nn.Module):  # type: ignore[name-defined,misc]
            def __init__(self) -> None:
                super().__init__()
                self.module = module

            def forward(self, features: Tensor) -> Tensor:
                return predicted(self.module(features))

        return Predictor().eval()

    def _built(self, seed: int) -> Module:
        """A new module on the CPU, in the job's dtype."""
        torch = import_torch()
        with exact(self._device, seed):
            module = self._build()
            if not isinstance(module, torch.nn.Module):
                raise InvalidArgument(
                    f"{self._name} returned a {type(module).__name__}; it must return a "
                    "torch.nn.Module",
                    reason="NOT_A_MODULE",
                )
            built: Module = module.cpu().to(getattr(torch, self._schema.dtype))
            return built

    def _built_again(self, seed: int) -> Module:
        """As `_built`. Raises InvalidArgument where it has not the tensors of the first one."""
        module = self._built(seed)
        if _layout(module, self._schema.dtype) != self.layout:
            raise InvalidArgument(
                f"{self._name} built two modules with different tensors; it must not depend on "
                "anything but its arguments",
                reason="NOT_A_MODULE",
            )
        return module

    @contextmanager
    def _computing(self, seed: int = 0) -> Iterator[None]:
        # What was set is put back inside: on a GPU that is lost, that fails as well.
        with failures_told(self._device), exact(self._device, seed):
            yield

    def _load(self, parameters: Array) -> Module:
        """Make the module what a version says, whatever was done with it before."""
        torch = import_torch()
        self._module.zero_grad(set_to_none=True)
        self._fill(self._module, parameters)
        tensors = _tensors(self._module)
        with torch.no_grad():
            for name, values in self._fixed.items():
                tensors[name].copy_(values)
        return self._module

    def _fill(self, module: Module, parameters: Array) -> None:
        """Copy a version into a module, wherever that is."""
        np.copyto(self._vector, parameters)
        tensors = _tensors(module)
        with import_torch().no_grad():
            for name, values in self._incoming.items():
                tensors[name].copy_(values)

    def _hand_in(self, rows: int, out: Array) -> None:
        """Write gradients, and what buffers have become times the examples."""
        tensors = _tensors(self._module)
        views = self._views(out)
        for spec in self.layout.tensors:
            view, tensor = views[spec.name], tensors[spec.name]
            if spec.buffer:
                np.multiply(tensor.detach().cpu().numpy(), view.dtype.type(rows), out=view)
            elif tensor.grad is None:
                view[...] = 0
            else:
                view[...] = tensor.grad.to_dense().cpu().numpy()  # embeddings may have sparse ones

    def _features(self, features: Any) -> Tensor:
        return self._on_device(dense(features))

    def _targets(self, batch: Batch) -> Tensor:
        return self._on_device(batch.targets)

    def _on_device(self, values: Any) -> Tensor:
        """A copy, at an address of PyTorch's own choice."""
        tensor: Tensor = import_torch().tensor(values, device=self._device)
        return tensor


def _tensors(module: Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, each once."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _layout(module: Module, dtype: str) -> Layout:
    """The layout of a module: L2 and weight decay act on what is trained and is no vector."""
    torch = import_torch()
    lazy = torch.nn.parameter.UninitializedTensorMixin
    tensors: list[tuple[str, tuple[int, ...], bool]] = []
    for name, each in module.named_parameters():
        if isinstance(each, lazy):
            raise InvalidArgument(
                f"the parameter {name!r} has no shape before the module has seen rows; give its "
                "layer all sizes, since lazy modules cannot be described",
                reason="NOT_A_MODULE",
            )
        if str(each.dtype) != f"torch.{dtype}":
            raise InvalidArgument(
                f"the parameter {name!r} is of {each.dtype}, and the job computes in {dtype}",
                reason="NOT_A_MODULE",
            )
        tensors.append((name, tuple(each.shape), each.requires_grad and each.ndim > 1))
    stored = module.state_dict()
    buffers = {
        name: tuple(each.shape)
        for name, each in module.named_buffers()
        if name in stored and str(each.dtype) == f"torch.{dtype}" and each.numel()
    }
    tensors += [(name, shape, False) for name, shape in buffers.items()]
    return make_layout(tensors, dtype, buffers=buffers)
