"""The audit log as administrators read it."""

from typing import Any

from tests.server.conftest import Plane

Entry = dict[str, Any]


async def entries(plane: Plane, **query: Any) -> list[Entry]:
    """Oldest first."""
    answer = await (await plane.admin()).get("/v2/audit", params=query)
    assert answer.status_code == 200, answer.text
    return list(reversed(answer.json()["items"]))


async def verified(plane: Plane) -> Any:
    answer = await (await plane.admin()).get("/v2/audit/verify")
    assert answer.status_code == 200, answer.text
    return answer.json()
