"""A real OpenID provider, npm's oidc-provider, in a process of its own on loopback."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import httpx

from tests.support.ports import free_ports
from tests.support.wait import soon

CLIENT, SECRET = "gpustack", "loopback-test-client-secret"
SOURCE = Path(__file__).with_name("oidc_provider")
#: Where npm puts it, once. Git ignores it.
CACHE = Path(__file__).resolve().parents[2] / ".cache" / "oidc_provider"
FILES = ("package.json", "package-lock.json", "provider.mjs")


def installed() -> Path:
    """The folder with the program and all that it needs, as the lock file says."""
    lacking = [name for name in ("node", "npm") if shutil.which(name) is None]
    assert not lacking, f"this machine lacks {' and '.join(lacking)}: install Node.js 18 or newer"
    wanted = (SOURCE / "package-lock.json").read_bytes()
    mark = CACHE / "node_modules" / ".lock-that-is-installed"
    CACHE.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copy(SOURCE / name, CACHE / name)
    if not mark.exists() or mark.read_bytes() != wanted:
        command = ["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"]
        for attempt in (1, 2, 3):  # a registry may be busy
            done = subprocess.run(command, cwd=CACHE, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                break
            why = f"npm cannot install oidc-provider:\n{done.stderr[-2000:]}"
            assert attempt < 3, why
        mark.write_bytes(wanted)
    return CACHE


@contextmanager
def real_oidc(server: str, log: Path) -> Iterator[str]:
    """Run the provider for the gpustack at `server`; answers its issuer."""
    port = free_ports(1)
    issuer = f"http://127.0.0.1:{port}"
    environment = {"PORT": str(port), "SERVER": server, "CLIENT_SECRET": SECRET}
    with log.open("wb") as out:
        process = subprocess.Popen(
            ["node", "provider.mjs"],
            cwd=installed(),
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )

    def answers() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            place = f"{issuer}/.well-known/openid-configuration"
            return httpx.get(place, trust_env=False).is_success
        except httpx.TransportError:
            return False

    try:
        soon(answers, "the provider answers", within_s=60)
        yield issuer
    finally:
        process.kill()
        process.wait()


@dataclass
class Form:
    action: str
    fields: dict[str, str]


class _Forms(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[Form] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        said = {name: value or "" for name, value in attrs}
        if tag == "form":
            self.found.append(Form(said["action"], {}))
        elif tag in {"input", "button"} and "name" in said and self.found:
            self.found[-1].fields[said["name"]] = said.get("value", "")


def submit(browser: httpx.Client, page: httpx.Response, **values: str) -> httpx.Response:
    """Fill the first form of a page and send it, as its button does."""
    forms = _Forms()
    forms.feed(page.text)
    assert forms.found, f"no form at {page.url}: {page.text[:500]}"
    form = forms.found[0]
    return browser.post(page.url.join(form.action), data=form.fields | values)
