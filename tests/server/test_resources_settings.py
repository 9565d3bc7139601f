"""Settings: administrators see what is in effect; secrets are seen by nobody."""

import re
from itertools import count
from pathlib import Path
from typing import Any

from gpustack.config.options import defaults, options
from tests.server.conftest import PASSWORD, Plane, Start


async def settings(plane: Plane) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    admin = await plane.admin()
    for page in count(1):
        answer = await admin.get(f"/v2/settings?page={page}&perPage=30")
        assert answer.status_code == 200, answer.text
        body = answer.json()
        assert len(body["items"]) == min(30, body["pagination"]["total"] - len(found))
        found |= {one["key"]: one for one in body["items"]}
        if page == body["pagination"]["totalPage"]:
            break
    return found


async def test_every_start_option_is_there_as_it_is_in_effect(start: Start, tmp_path: Path) -> None:
    found = await settings(await start(tmp_path, port="18123"))
    assert set(found) == set(defaults()) - {"resources"}
    assert found["port"]["value"] == 18123
    assert found["data_dir"]["value"] == str(tmp_path)
    assert found["system_reserved"]["value"] == {"ram": 2, "vram": 1}
    assert (found["debug"]["hot"], found["port"]["hot"]) == (True, False)
    assert found["debug"]["meaning"].startswith("Debug logging.")


async def test_secrets_are_hidden_set_or_not(start: Start, tmp_path: Path) -> None:
    plane = await start(tmp_path, token="s3cret-token")
    found = await settings(plane)
    assert not re.search(f"s3cret|sqlite:|{PASSWORD}", repr(found))
    hidden = {key for key, one in found.items() if one["hidden"]}
    assert {found[key]["value"] for key in hidden} == {None}
    assert hidden >= {"token", "bootstrap_password", "database_url", "huggingface_token"}
    suspicious = {
        one.key for one in options() if re.search("secret|password|token|private", one.key)
    }
    assert suspicious <= hidden


async def test_only_administrators_see_settings(plane: Plane) -> None:
    assert (await (await plane.worker()).http.get("/v2/settings")).status_code == 403
    assert (await (await plane.client()).get("/v2/settings")).status_code == 401
