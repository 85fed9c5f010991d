"""A small convolutional network for pictures of 28 by 28 grey dots.

Two convolutions with batch normalisation, which each shard does on its own rows; the running means
that predictions need are reduced like gradients. What is dropped out is drawn from the job's seed,
the shard and the step.
"""

from torch import nn

from phalanx.models import DataSchema

SIDE = 28


def build(
    schema: DataSchema, width: int = 16, hidden: int = 128, dropout: float = 0.25
) -> nn.Module:
    """Called once per process with what the data look like and the `arguments` of the job file."""
    return nn.Sequential(
        nn.Unflatten(1, (1, SIDE, SIDE)),
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(2 * width * (SIDE // 4) ** 2, hidden),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(hidden, schema.classes),
    )
