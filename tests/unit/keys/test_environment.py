"""Secrets that storage and people have in their environment stay with them."""

import pytest

from phalanx.keys.environment import SECRETS, without_secrets
from storage.links import maker
from worker.session import leaf_server

OTHERS = {"PATH": "/bin", "PGHOST": "db", "AWS_REGION": "eu-1", "PHALANX_TEST_GATE": "/tmp"}


def test_nothing_else_is_left_out():
    environ = {**dict.fromkeys(SECRETS, "canary"), **OTHERS}
    assert without_secrets(environ) == OTHERS
    assert {"PGPASSWORD", "AWS_SECRET_ACCESS_KEY"} <= SECRETS


@pytest.mark.parametrize("environment", [maker._environment, leaf_server._environment])
def test_neither_code_of_others_nor_their_files_are_near_them(environment):
    made = environment({**dict.fromkeys(SECRETS, "canary"), **OTHERS})
    assert "canary" not in made.values()
    assert OTHERS.items() <= made.items()
