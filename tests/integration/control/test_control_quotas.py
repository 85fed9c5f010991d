"""Quotas over real gRPC: who asks for too much hears which limit, and others are served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest

from phalanx.errors import ResourceExhausted
from phalanx.rpc.status import from_rpc_error


async def test_one_more_job_than_a_namespace_may_have_is_refused_with_its_limit(
    storage_only: Any,
) -> None:
    await storage_only.start_control(namespace_jobs_max=1)
    first = await storage_only.submit("r1")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await storage_only.submit("r2")
    refusal = from_rpc_error(caught.value)
    assert isinstance(refusal, ResourceExhausted)
    assert refusal.reason == "QUOTA_EXCEEDED"
    assert "the namespace 'default' may have 1 jobs" in refusal.message
    assert (await storage_only.submit("r1")).id == first.id, "the same request is no other job"


async def test_a_namespace_has_what_the_file_says_from_the_next_call_on(
    storage_only: Any, tmp_path: Path
) -> None:
    path = tmp_path / "quotas.json"
    path.write_text('{"namespaces": {"default": {"jobs": 1}}}')
    await storage_only.start_control(quotas=path)
    await storage_only.submit("r1")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await storage_only.submit("r2")
    refusal = from_rpc_error(caught.value)
    assert refusal.details == {"namespace": "default", "quota": "jobs", "limit": "1", "used": "1"}
    path.write_text('{"namespaces": {"default": {"jobs": 2}}}')
    await storage_only.submit("r2")
