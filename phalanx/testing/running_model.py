"""A model with a buffer, without any library: rows are centred by a running mean."""

RUNNING_MODEL = '''
"""A softmax regression on centred rows; the running mean is a buffer, as in batch normalisation."""

import numpy as np

from phalanx.models import LeafSums
from phalanx.models.base import make_layout, views
from phalanx.training.metrics import CLASSIFICATION_SUMS

MOMENTUM = 0.1


class Running:
    evaluation_sums = CLASSIFICATION_SUMS

    def __init__(self, schema, spare=0):
        """`spare` makes another buffer of so many elements, which becomes the mean of the means."""
        self.classes = schema.classes
        tensors = [
            ("w", (schema.features, schema.classes), True),
            ("mean", (schema.features,), False),
        ]
        tensors += [("spare", (spare,), False)] if spare else []
        self.layout = make_layout(tensors, schema.dtype, buffers={"mean", "spare"})

    def initial_parameters(self, seed):
        vector = np.zeros(self.layout.element_count, self.layout.dtype)
        weights = views(self.layout, vector)["w"]
        weights[...] = np.random.default_rng(seed).normal(size=weights.shape)
        return vector

    def gradient(self, parameters, batch, out):
        tensors, new = views(self.layout, parameters), views(self.layout, out)
        mean = batch.features.mean(axis=0)
        centred = batch.features - mean
        residual, loss = self._residual(centred @ tensors["w"], batch.targets)
        new["w"][...] = centred.T @ residual
        new["mean"][...] = ((1 - MOMENTUM) * tensors["mean"] + MOMENTUM * mean) * batch.rows
        if "spare" in new:
            value = (1 - MOMENTUM) * tensors["spare"] + MOMENTUM * mean.mean()
            new["spare"][...] = value * batch.rows
        return LeafSums(batch.rows, loss)

    def evaluate(self, parameters, batch):
        probabilities = self.predict(parameters, batch.features)
        chosen = probabilities[np.arange(batch.rows), batch.targets]
        correct = (probabilities.argmax(axis=1) == batch.targets).sum()
        return np.array([-np.log(chosen).sum(), correct], np.float64)

    def predict(self, parameters, features):
        tensors = views(self.layout, parameters)
        return self._probabilities((features - tensors["mean"]) @ tensors["w"])

    def _probabilities(self, scores):
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        return p / p.sum(axis=1, keepdims=True)

    def _residual(self, scores, targets):
        p = self._probabilities(scores)
        rows = np.arange(len(targets))
        loss = -np.log(p[rows, targets]).sum()
        p[rows, targets] -= 1
        return p, float(loss)
'''
