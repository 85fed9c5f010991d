"""What a URL of PostgreSQL may hold, and that no error repeats a password in it."""

import pytest

from phalanx.errors import FailedPrecondition
from storage.backends.postgres.database import PostgresDatabase


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://ann:s3c%ret@127.0.0.1/phalanx",
        "postgresql://ann:s3c@ret@127.0.0.1/phalanx",
        "postgresql://ann:s3c/ret@127.0.0.1/phalanx",
        "postgresql://127.0.0.1/phalanx?password=s3c%ret",
        "postgresql://127.0.0.1/phalanx?pasword=s3cret",
    ],
)
def test_a_url_that_is_none_is_refused_without_a_word_of_it(url):
    with pytest.raises(FailedPrecondition, match="percent-encoded") as refused:
        PostgresDatabase(url)
    error: BaseException | None = refused.value
    while error is not None:
        assert "s3c" not in str(error)
        assert "ret@" not in str(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
