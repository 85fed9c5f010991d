"""Who may call whom: evaluates network policies as a cluster does, for the few fields in use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Object = dict[str, Any]
Labels = dict[str, str]


def allowed(policies: Sequence[Object], caller: Labels, called: Labels, port: int | str) -> bool:
    """Whether a pod may call another one of the same namespace: both sides must let it."""
    return _one_way(policies, "egress", "to", caller, called, port) and _one_way(
        policies, "ingress", "from", called, caller, port
    )


def _one_way(
    policies: Sequence[Object], way: str, peers: str, pod: Labels, other: Labels, port: int | str
) -> bool:
    about = [
        each["spec"]
        for each in policies
        if way.capitalize() in each["spec"]["policyTypes"]
        and _matches(each["spec"]["podSelector"], pod)
    ]
    # Whom no policy is about is free.
    return not about or any(
        _lets(rule, peers, other, port) for spec in about for rule in spec.get(way, ())
    )


def _lets(rule: Object, peers: str, other: Labels, port: int | str) -> bool:
    named = [each["port"] for each in rule.get("ports", ())]
    if named and port not in named:
        return False
    if peers not in rule:
        return True
    # A selector of namespaces means other namespaces here.
    return any(
        "namespaceSelector" not in each and _matches(each["podSelector"], other)
        for each in rule[peers]
    )


def _matches(selector: Object, labels: Labels) -> bool:
    # The manifests select by labels alone; another kind would be taken for one that fits all.
    assert selector.keys() <= {"matchLabels"}, f"a selector with {sorted(selector)}"
    return selector.get("matchLabels", {}).items() <= labels.items()
