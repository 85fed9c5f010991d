"""Nothing of one test's user code is importable in the next."""

from collections.abc import Iterator

import pytest

from phalanx.models.code import deactivate_user_code


@pytest.fixture(autouse=True)
def no_user_code() -> Iterator[None]:
    deactivate_user_code()
    yield
    deactivate_user_code()
