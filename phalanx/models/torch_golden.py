"""What PyTorch computes on a machine, as one hash: equal hashes, equal bits.

Part of what workers of one job must have in common; the leaf of the job, which is compared as well,
may take other kernels on other rows. It covers a convolution, a matrix product, a normalisation and
a loss, forwards and backwards in both dtypes, and names the version and the device.
"""

from __future__ import annotations

import hashlib
from functools import cache

import numpy as np

from phalanx.models.torch_exact import Tensor, exact, import_torch

_ROWS, _SIDE, _CHANNELS, _CLASSES = 32, 12, 8, 10


@cache
def golden(device: str) -> str:
    """Return the fingerprint of PyTorch on a device, as hex SHA-256; computed once."""
    torch = import_torch()
    digest = hashlib.sha256(f"torch {torch.__version__} {_device_name(device)}\n".encode())
    with exact(device):
        for dtype in ("float32", "float64"):
            for values in _results(dtype, device):
                digest.update(values.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def _device_name(device: str) -> str:
    torch = import_torch()
    if device == "cpu":
        return device
    found = torch.get_device_module(device).get_device_properties(device)
    built_for = torch.version.cuda or torch.version.hip
    return (
        f"{found.name} {found.major}.{found.minor} with {found.multi_processor_count} units, "
        f"cuda {built_for}, cudnn {torch.backends.cudnn.version()}"
    )


def _results(dtype: str, device: str) -> list[Tensor]:
    torch = import_torch()
    functional = torch.nn.functional
    images = _numbers((_ROWS, 3, _SIDE, _SIDE), dtype, device, 0)
    kernels = _numbers((_CHANNELS, 3, 3, 3), dtype, device, 1).requires_grad_()
    width = _CHANNELS * (_SIDE // 2) ** 2
    weights = _numbers((_CLASSES, width), dtype, device, 2).requires_grad_()
    hidden = functional.conv2d(images, kernels, stride=2, padding=1)
    hidden = functional.relu(functional.batch_norm(hidden, None, None, training=True))
    scores = functional.linear(hidden.flatten(1), weights)
    targets = torch.arange(_ROWS, device=device) % _CLASSES
    functional.cross_entropy(scores, targets, reduction="sum").backward()
    assert kernels.grad is not None
    assert weights.grad is not None
    return [scores, kernels.grad, weights.grad, torch.tanh(scores), torch.sigmoid(scores)]


def _numbers(shape: tuple[int, ...], dtype: str, device: str, stream: int) -> Tensor:
    """Numbers in [-1, 1) made of integers alone, so that making them cannot differ."""
    count = int(np.prod(shape))
    raw = np.random.Philox(key=np.array([7, stream], np.uint64)).random_raw(count)
    values = ((raw >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0).astype(dtype)
    tensor: Tensor = import_torch().tensor(values.reshape(shape), device=device)
    return tensor
