"""A second device for PyTorch, in memory: what is left on the wrong one fails, as with a GPU.

Its tensors hold one of the CPU, and its kernels are those of the CPU. An operation that gets
tensors of both devices fails, single numbers and copies apart; it draws from a generator of its
own; and nothing of it is a NumPy array before it is copied. There are two such devices, and
somebody has chosen the one that is not used here. `install` changes PyTorch for the whole process,
so only processes that do nothing else call it (see `second_device_report`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, Self

import torch
from torch.utils import _pytree as trees
from torch.utils import backend_registration

NAME = "second"
PLACE = f"{NAME}:0"

_COPIES = ("aten::copy_", "aten::_to_copy")
_RESHAPES = ("aten::view", "aten::_unsafe_view", "aten::_reshape_alias")


class Mixed(RuntimeError):
    """An operation got tensors of both devices."""


class Held(torch.Tensor):
    """A tensor of the device; `raw` is the one of the CPU that it holds."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> Self:
        made: Self = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=PLACE,
        )
        made.raw = raw
        return made

    def __init__(self, raw: torch.Tensor) -> None:
        """All of it is done in `__new__`."""

    @classmethod
    def __torch_function__(cls, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, op: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return DEVICE.run(op, *args, **(kwargs or {}))


class Device:
    """The device, with what `torch.cuda` has of functions that are called by the name of a device.

    `ran` has the names of the operations that it has run; `failure` is raised by the next one.
    """

    def __init__(self) -> None:
        self.generators = [torch.Generator(), torch.Generator()]
        self.current = 1
        self.ran: set[str] = set()
        self.failure: Exception | None = None

    def run(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        """Run an operation with the kernel of the CPU."""
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        name = op.name()
        given = [each for each in trees.tree_leaves((args, kwargs)) if _is_tensor(each)]
        strange = [each for each in given if not isinstance(each, Held) and each.ndim]
        if strange and not name.startswith(_COPIES):
            raise Mixed(f"{name} got a tensor of {strange[0].device} beside those of {PLACE}")
        self.ran.add(name)
        target = kwargs.get("device")
        inside, named = trees.tree_map(_raw, (args, kwargs))
        if name in _RESHAPES:
            inside = (inside[0].contiguous(), *inside[1:])
        with torch.no_grad(), self._drawing(op):
            found = op(*inside, **named)
        if target is not None and torch.device(target).type == "cpu":
            return found
        known = {id(each.raw): each for each in given if isinstance(each, Held)}
        if name.startswith("aten::copy_") and id(found) not in known:
            return args[0]  # one of the CPU

        def wrapped(each: Any) -> Any:
            if not _is_tensor(each):
                return each
            return known[id(each)] if id(each) in known else Held(each)

        return trees.tree_map(wrapped, found)

    def _drawing(self, op: Any) -> Any:
        seeded = torch.Tag.nondeterministic_seeded in op.tags
        return _drawing_from(self.generators[0]) if seeded else nullcontext()

    # As of torch.cuda

    @contextmanager
    def device(self, index: int) -> Iterator[None]:
        before, self.current = self.current, index
        try:
            yield
        finally:
            self.current = before

    def manual_seed(self, seed: int) -> None:
        self.generators[self.current].manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        for each in self.generators:
            each.manual_seed(seed)

    def get_rng_state(self, index: int) -> torch.Tensor:
        return self.generators[index].get_state()

    def set_rng_state(self, state: torch.Tensor, index: int) -> None:
        self.generators[index].set_state(state)

    def get_device_properties(self, _device: Any) -> Any:
        return SimpleNamespace(name="in memory", major=1, minor=0, multi_processor_count=1)

    def device_count(self) -> int:
        return len(self.generators)

    def current_device(self) -> int:
        return self.current

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def _is_in_bad_fork(self) -> bool:
        return False

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16]


@contextmanager
def _drawing_from(generator: torch.Generator) -> Iterator[None]:
    """What the CPU draws by chance comes from another generator meanwhile."""
    before = torch.get_rng_state()
    torch.set_rng_state(generator.get_state())
    try:
        yield
    finally:
        generator.set_state(torch.get_rng_state())
        torch.set_rng_state(before)


def install() -> None:
    """Let PyTorch know the device, for as long as this process lives."""
    # Parameters then become those of the device as a whole, not by a change of their memory.
    torch.__future__.set_swap_module_params_on_conversion(True)
    backend_registration._setup_privateuseone_for_python_backend(rename=NAME, backend_module=DEVICE)
    LIBRARY.fallback(DEVICE.run, "PrivateUse1")
    make = torch.tensor

    def tensor(values: Any, *, device: Any = None, **more: Any) -> torch.Tensor:
        made = make(values, **more)
        return made if device is None else made.to(device)

    # PyTorch's own makes tensors below the place where those of Python are known.
    torch.tensor = tensor


def _is_tensor(each: Any) -> bool:
    return isinstance(each, torch.Tensor)


def _raw(each: Any) -> Any:
    if isinstance(each, Held):
        return each.raw
    return torch.device("cpu") if isinstance(each, torch.device) else each


DEVICE = Device()
LIBRARY = torch.library.Library("_", "IMPL")
