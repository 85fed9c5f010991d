"""From a call to its caller: the certificate of the connection, or the token that the call brings.

A token says who a person is, and comes first: where it is not good the call fails, whatever the
certificate. So a control process that hands a call on sends the token of the person along and needs
no word of its own; the one that leads looks at it as if the person had called.
"""

from __future__ import annotations

import functools
from typing import Any

from phalanx.errors import PhalanxError, Unauthenticated
from phalanx.keys import policy
from phalanx.keys.caller import NOBODY, Caller, node_of
from phalanx.keys.policy import Rule
from phalanx.keys.tokens import TokenFile
from phalanx.rpc.credentials import AUTHORIZATION, check_bearer
from phalanx.rpc.types import ServicerContext
from phalanx.telemetry.logs import get_logger

_log = get_logger(__name__)


class Gate:
    """Lets callers through to what is theirs. Tokens are taken only with a file of them."""

    def __init__(self, tokens: TokenFile | None) -> None:
        self._tokens = tokens

    def admit(self, method: str, rule: Rule, context: ServicerContext) -> Caller:
        """Return who makes a call. Raises Unauthenticated and PermissionDenied."""
        caller = NOBODY
        try:
            if rule.public:
                return NOBODY
            caller = self._caller(context)
            if not rule.allows(caller):
                raise policy.denied(method, caller)
        except PhalanxError as error:
            _log.info(
                "call_refused",
                method=method,
                caller=caller.name,
                peer=context.peer(),
                reason=error.reason,
            )
            raise
        return caller

    def check_again(self, method: str, caller: Caller, context: ServicerContext) -> None:
        """Raise Unauthenticated where a person who was let through would not be now."""
        try:
            now = self._caller(context)
            if now != caller:
                raise Unauthenticated(
                    f"what the token of {now.name} allows is not what it was when the call began; "
                    "call again",
                    reason="TOKEN_CHANGED",
                )
        except PhalanxError as error:
            _log.info("stream_ended", method=method, caller=caller.name, reason=error.reason)
            raise

    def _caller(self, context: ServicerContext) -> Caller:
        for key, value in context.invocation_metadata() or ():
            if key.lower() == AUTHORIZATION:
                return self._person(value if isinstance(value, str) else "")
        caller = _node(_certificate(context))
        if caller is NOBODY:
            raise Unauthenticated(
                "who calls? People bring a token (`--token-file`, or the header `authorization: "
                "Bearer TOKEN`), nodes a certificate that names their service",
                reason="NO_IDENTITY",
            )
        return caller

    def _person(self, header: str) -> Caller:
        token = check_bearer(header)
        if not token or self._tokens is None:
            what = "this server takes no tokens" if token else "the header is not `Bearer TOKEN`"
            raise Unauthenticated(f"authorization: {what}", reason="BAD_AUTHORIZATION")
        return self._tokens.caller(token)


def _certificate(context: ServicerContext) -> tuple[str, frozenset[str]]:
    """Return the common name and the alternative names of a certificate that was verified."""
    proven: Any = context.auth_context() or {}
    common = [_text(each) for each in proven.get("x509_common_name", ())]
    names = frozenset(_text(each) for each in proven.get("x509_subject_alternative_name", ()))
    return common[0] if common else "", names


@functools.lru_cache(maxsize=1024)
def _node(certificate: tuple[str, frozenset[str]]) -> Caller:
    common_name, names = certificate
    return node_of(names, common_name)


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
