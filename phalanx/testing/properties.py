"""Settings of property tests that hold on a busy machine."""

from hypothesis import HealthCheck, settings


def examples(count: int) -> settings:
    """A decorator: so many examples, however long each takes.

    Deadlines and complaints about slow drawing measure the machine, not the code. The folder of a
    test may be shared by its examples, as long as each writes its own files anew.
    """
    return settings(
        max_examples=count,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
