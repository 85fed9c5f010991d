"""User code: loading an entrypoint from a job's own folder.

One process may run the jobs of several people, each with its own ``net.py``. The modules of a
folder are therefore *active* only while that folder's code runs; switching takes the modules of the
one out of ``sys.modules`` and ``sys.path`` and puts those of the other in.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, ClassVar, NoReturn

from phalanx.errors import InvalidArgument


class OneProcess:
    """Surrounds a call of user code. Where the code forks and both processes come back from it, the
    copy ends here: what follows the call is done once, by the process that made it."""

    def __enter__(self) -> None:
        self._pid = os.getpid()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if os.getpid() != self._pid:
            _end_copy(error)


def _end_copy(error: BaseException | None) -> NoReturn:
    """End this process as a program ends that returns or raises, without what was to happen at the
    end of the process that it is a copy of."""
    code = 0
    try:
        if isinstance(error, SystemExit) and (error.code is None or isinstance(error.code, int)):
            code = error.code or 0
        elif error is not None:
            code = 1
            sys.excepthook(type(error), error, error.__traceback__)
    finally:
        os._exit(code & 0xFF)


class UserCode:
    """The modules of one folder."""

    active: ClassVar[UserCode | None] = None
    """The folder whose modules imports find now."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        self._modules: dict[str, ModuleType] = {}

    def activate(self) -> None:
        """Let imports find this folder's modules, and no other folder's."""
        if UserCode.active is self:
            return
        deactivate_user_code()
        sys.modules.update(self._modules)
        sys.path.insert(0, str(self._folder))
        importlib.invalidate_caches()
        UserCode.active = self

    def deactivate(self) -> None:
        """Take this folder's modules away; they stay alive for when they are needed again."""
        if UserCode.active is not self:
            return
        self._modules = {
            name: module for name, module in sys.modules.items() if self._holds(module)
        }
        for name in self._modules:
            del sys.modules[name]
        if str(self._folder) in sys.path:
            sys.path.remove(str(self._folder))
        UserCode.active = None

    def refuse_taken_names(self) -> None:
        """Raise InvalidArgument where a file would hide, or be hidden by, another module."""
        for entry in sorted(self._folder.iterdir()):
            name = entry.stem if entry.suffix == ".py" else entry.name
            loaded = sys.modules.get(name)
            taken = loaded is not None and not self._holds(loaded)
            if taken or (name in sys.stdlib_module_names and entry.suffix in {".py", ""}):
                raise InvalidArgument(
                    f"the job's code: {entry.name!r} has the name of a module that is in use "
                    "already; rename it",
                    reason="MODULE_NAME_TAKEN",
                )

    def _holds(self, module: ModuleType) -> bool:
        # Not by attribute: some modules answer to any name, or load something then. And not by
        # `Path`: with a thousand modules that took most of the time in which a leaf starts.
        own = getattr(module, "__dict__", {})
        places = own.get("__path__")
        paths = [own.get("__file__"), *(places if isinstance(places, Iterable) else ())]
        folder = str(self._folder)
        return any(
            isinstance(path, str) and (path == folder or path.startswith(folder + os.sep))
            for path in paths
        )


def deactivate_user_code() -> None:
    """Leave no job's modules importable in this process."""
    if UserCode.active is not None:
        UserCode.active.deactivate()


def load_entrypoint(entrypoint: str, code: UserCode | None) -> Callable[..., Any]:
    """Return the function that ``module:function`` names.

    Args:
        entrypoint: as the spec has it.
        code: the job's own folder; None: the module must be installed.

    Raises:
        InvalidArgument: it is not of that form, or is not there. What the module raises while it
            is imported passes through, with its traceback.
    """
    module_name, _, function_name = entrypoint.partition(":")
    if not module_name or not function_name:
        raise InvalidArgument(
            f"the entrypoint {entrypoint!r} is not of the form module:function, such as net:build"
        )
    if code is not None:
        deactivate_user_code()  # the modules of another job take no name away
        code.refuse_taken_names()
        code.activate()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if missing != module_name and not module_name.startswith(f"{missing}."):
            raise InvalidArgument(
                f"{module_name} imports {missing!r}, which is not there: add it to code.files or "
                "code.wheels, or install it on the workers",
                reason="MODULE_NOT_FOUND",
            ) from error
        raise InvalidArgument(
            f"there is no module {module_name!r}: add it to code.files or code.wheels, or "
            "install it on the workers",
            reason="MODULE_NOT_FOUND",
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        own = [
            name
            for name, value in vars(module).items()
            if callable(value) and getattr(value, "__module__", None) == module.__name__
        ]
        listed = ", ".join(own) or "none"
        raise InvalidArgument(
            f"module {module_name!r} has no function {function_name!r}; it has: {listed}",
            reason="ENTRYPOINT_NOT_FOUND",
        )
    result: Callable[..., Any] = function
    return result
