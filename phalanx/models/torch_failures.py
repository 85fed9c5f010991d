"""What PyTorch raises where a machine, not the job's code, is at its end, in words of this project.

PyTorch has a RuntimeError for nearly everything. Memory that is used up becomes a MemoryError, as
it is elsewhere. A GPU that failed takes the process with it: CUDA answers every later call of this
process with the same error, so the process must end and another one start.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from phalanx.models.base import DeviceLost
from phalanx.models.torch_exact import import_torch

_LOST = ("CUDA error", "CUDA driver error", "cuDNN error", "cuBLAS error")
_CPU_MEMORY = "DefaultCPUAllocator"
_SHOWN = 300


@contextmanager
def failures_told(device: str) -> Iterator[None]:
    """Raise MemoryError and DeviceLost for what PyTorch raises on a device in the body."""
    torch = import_torch()
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryError(
            "the GPU has not enough free memory for this leaf; use a smaller batch_size or more "
            "shards, a smaller module, or a GPU that no other slot and no other job uses. "
            f"PyTorch says: {_first_line(error)}"
        ) from error
    except RuntimeError as error:
        text = str(error)
        if _CPU_MEMORY in text:
            raise MemoryError(
                "PyTorch got no memory for this leaf; use a smaller batch_size or more shards, or "
                f"raise --slot-memory-bytes. PyTorch says: {_first_line(error)}"
            ) from error
        if device != "cpu" and (_is_sticky(error) or text.startswith(_LOST)):
            raise DeviceLost(
                "the GPU failed, and this process cannot use it any more; another one is started. "
                "After a class, an index or a shape out of range it is the job's own code: run the "
                "job without resources.gpus, which names the line. Else look at the GPU "
                f"(nvidia-smi, the kernel's log). PyTorch says: {_first_line(error)}"
            ) from error
        raise


def _is_sticky(error: RuntimeError) -> bool:
    # PyTorch has this class since 2.8.
    kind = getattr(import_torch(), "AcceleratorError", None)
    return kind is not None and isinstance(error, kind)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:_SHOWN]
