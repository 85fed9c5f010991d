"""scikit-learn, which grows trees and solves small problems; an extra of the installation."""

from __future__ import annotations

from phalanx.errors import FailedPrecondition


def need_scikit_learn(what: str, where: str = " on every worker") -> None:
    """Raise FailedPrecondition (SCIKIT_LEARN_MISSING), which says what to install, where `what`
    cannot be done on this machine."""
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise FailedPrecondition(
            f"{what} needs scikit-learn, which is not installed here; run "
            f"`pip install 'phalanx[learn]'`{where}",
            reason="SCIKIT_LEARN_MISSING",
        ) from error
