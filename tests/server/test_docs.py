"""The API's description of itself."""

import re
from pathlib import Path
from typing import Any

from tests.server.conftest import Plane, Start

PAGES = ("/docs", "/redoc", "/openapi.json")
#: Their 401 is of no credential.
WAYS_IN = {"POST /auth/login", "GET /auth/oidc/callback"}


async def test_the_pages_load_nothing_from_elsewhere(plane: Plane) -> None:
    admin = await plane.admin()
    for page in ("/docs", "/redoc"):
        answer = await admin.get(page)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/html")
        assert answer.headers["content-security-policy"].startswith("default-src 'self';")
        assert "://" not in answer.text
        named = re.findall(r'(?:src|href|spec-url|url)(?:=|: )["\'](/[^"\']+)', answer.text)
        assert len(named) >= 3
        for path in named:
            part = await admin.get(path)
            assert (part.status_code, len(part.content) > 1000) == (200, True), path
    script = await admin.get("/docs/assets/swagger-ui-bundle.js")
    assert "javascript" in script.headers["content-type"]


async def test_the_description_names_every_route_of_the_management_api(plane: Plane) -> None:
    described = (await (await plane.admin()).get("/openapi.json")).json()
    assert {"/v2/models", "/v2/workers/{worker_id}", "/auth/login"} < described["paths"].keys()


def operations(plane: Plane) -> dict[str, dict[str, Any]]:
    """Method and path -> what is said of it."""
    return {
        f"{method.upper()} {path}": said
        for path, methods in plane.app.openapi()["paths"].items()
        for method, said in methods.items()
    }


def errors(plane: Plane, operation: str) -> dict[str, list[str]]:
    """Status -> the codes that the answer's body may have."""
    responses = plane.app.openapi()["components"]["responses"]
    found = {}
    for status, said in operations(plane)[operation]["responses"].items():
        if status >= "400":
            whole = responses[said["$ref"].rpartition("/")[2]]
            shape, narrowed = whole["content"]["application/json"]["schema"]["allOf"]
            assert shape == {"$ref": "#/components/schemas/Error"}
            found[status] = narrowed["properties"]["code"]["enum"]
    return found


async def test_every_route_says_which_errors_it_answers_with(plane: Plane) -> None:
    assert errors(plane, "PUT /v2/models/{model_id}") == {
        "400": ["bad_request"],
        "401": ["unauthorized"],
        "403": ["forbidden", "password_change_required"],
        "404": ["not_found"],
        "409": ["conflict"],
        "413": ["too_large"],
        "422": ["invalid"],
        "500": ["internal_error"],
        "503": ["contended", "database_unavailable"],
    }
    assert errors(plane, "GET /healthz") == {"500": ["internal_error"]}
    assert "403" not in errors(plane, "POST /v2/workers/register")
    for operation, said in operations(plane).items():
        codes = errors(plane, operation)
        assert ("401" in codes) == ("security" in said) or operation in WAYS_IN
        assert {"404", "422"} <= codes.keys() or "{" not in operation
    assert (
        not {"HTTPValidationError", "ValidationError"}
        & plane.app.openapi()["components"]["schemas"].keys()
    )


async def test_each_operation_has_a_name_that_stays(plane: Plane) -> None:
    names = [said["operationId"] for said in operations(plane).values()]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch("[a-z]+(_[a-z]+)*", name) for name in names)
    assert {"list_models", "get_model", "create_api_key", "reset_password"} < set(names)


async def test_streams_say_their_kinds_of_bytes(plane: Plane) -> None:
    said = {
        name: set(said["responses"]["200"]["content"])
        for name, said in operations(plane).items()
        if "content" in said["responses"].get("200", {})
    }
    watch = {"application/x-ndjson", "text/event-stream"}
    assert said["GET /v2/watch"] == watch
    assert said["GET /v2/model-instances/{instance_id}/logs"] == {"text/plain"}
    watched = {name for name, kinds in said.items() if kinds == {"application/json"} | watch}
    assert watched == {
        "GET /v2/models", "GET /v2/model-instances", "GET /v2/workers", "GET /v2/api-keys",
        "GET /v2/model-files",
    }  # fmt: skip


async def test_no_start_waits_for_the_description(start: Start, tmp_path: Path) -> None:
    plane = await start(tmp_path)
    assert plane.app.openapi_schema is None
    await (await plane.admin()).get("/openapi.json")
    assert plane.app.openapi_schema is not None


async def test_it_is_for_those_who_are_signed_in(plane: Plane) -> None:
    stranger, agent = await plane.client(), await plane.worker()
    for page in (*PAGES, "/docs/assets/swagger-ui.css"):
        assert (await stranger.get(page)).status_code == 401
        assert (await agent.http.get(page)).status_code == 403


async def test_only_the_files_of_the_pages_are_answered(plane: Plane) -> None:
    admin = await plane.admin()
    for name in ("other.js", "..%2fcore.py", "__init__.py"):
        assert (await admin.get(f"/docs/assets/{name}")).status_code == 404


async def test_an_operator_may_leave_it_out(start: Start, tmp_path: Path) -> None:
    admin = await (await start(tmp_path, disable_openapi_docs="true")).admin()
    for page in (*PAGES, "/docs/assets/swagger-ui.css"):
        assert (await admin.get(page)).status_code == 404
    assert (await admin.get("/v2/models")).status_code == 200
