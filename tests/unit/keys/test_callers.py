"""Who a certificate is that of."""

import pytest

from phalanx.errors import NotFound, PermissionDenied
from phalanx.keys.caller import NOBODY, Caller, Role, Service, current_caller, node_of, set_caller


def _node(*names: str) -> Caller:
    return node_of(frozenset(names), "a name")


def test_services_are_told_by_names_below_one_domain():
    assert _node("worker.phalanx.internal").services == {Service.WORKER}
    both = _node("worker.phalanx.internal", "control.phalanx.internal", "10.0.0.1", "a.example")
    assert both.services == {Service.WORKER, Service.CONTROL}
    assert both.name == "a name"


@pytest.mark.parametrize(
    "name",
    [
        "worker",
        "worker.phalanx.internal.example.com",
        "phalanx.internal",
        ".phalanx.internal",
        "admin.phalanx.internal",
        "worker.phalanx.internal.",
        "WORKER.phalanx.internal",
        "*.phalanx.internal",
        "worker.notphalanx.internal",
    ],
)
def test_any_other_name_is_that_of_nobody(name):
    assert _node(name) is NOBODY
    assert not _node(name).may_act_in("default")


def test_a_certificate_of_one_member_speaks_for_it_alone():
    named = _node("worker.phalanx.internal", "w-7.worker.phalanx.internal")
    named.check_member("w-7", "worker_id")
    with pytest.raises(PermissionDenied, match="w-7 cannot speak for 'w-8'"):
        named.check_member("w-8", "worker_id")
    _node("worker.phalanx.internal").check_member("w-8", "worker_id")


def test_jobs_of_other_namespaces_are_not_there():
    ann = Caller("ann", role=Role.ADMIN, namespaces=frozenset({"vision"}))
    ann.check_job("job-1", "vision")
    with pytest.raises(NotFound, match="there is no job 'job-1'"):
        ann.check_job("job-1", "speech")


def test_without_keys_anybody_may_do_anything():
    anybody = current_caller()
    assert anybody.acts_everywhere
    anybody.check_namespace("any")
    anybody.check_code()
    anybody.check_member("any", "worker_id")


async def test_a_call_has_a_caller_of_its_own():
    import asyncio

    async def served(caller: Caller) -> Caller:
        set_caller(caller)
        await asyncio.sleep(0)
        return current_caller()

    ann, bob = Caller("ann", role=Role.VIEWER), Caller("bob", role=Role.VIEWER)
    assert await asyncio.gather(served(ann), served(bob)) == [ann, bob]
    assert current_caller().open_cluster
