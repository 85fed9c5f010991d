"""What predicts with the models that programs leave."""

from __future__ import annotations

from phalanx.errors import Unimplemented
from phalanx.models.base import Predictor
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import Layout


def predictor_of(spec: JobSpec, layout: Layout, classes: int) -> Predictor:
    """Return what predicts with the model of a job. Raises DataLoss for tensors that do not fit."""
    match spec.WhichOneof("program"):
        case "forest":
            from phalanx.forests.model import ForestModel

            return ForestModel(layout, classes)
        case "cascade":
            from phalanx.cascades.model import KernelMachine

            return KernelMachine(layout, classes, spec.cascade.gamma)
        case other:
            raise Unimplemented(f"nothing predicts with a model of the program {other}")
