"""An OpenID provider on loopback that says whatever a test wants, with keys of its own."""

import base64
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote_plus, urlencode, urlsplit

from joserfc import jws
from joserfc.jwk import ECKey, Key, RSAKey

CLIENT, SECRET = "gpustack", "loopback+client%20secret:0"
ACCESS = "access-token-of-the-fake-provider"


@cache
def rsa_key(name: str) -> RSAKey:
    return RSAKey.generate_key(2048, {"kid": name, "use": "sig"})


@cache
def ec_key(name: str) -> ECKey:
    return ECKey.generate_key("P-256", {"kid": name, "use": "sig"})


def signed(claims: dict[str, Any] | str, key: Key, algorithm: str = "RS256", **header: Any) -> str:
    """A token as the provider makes it. A header that is None is left out."""
    said = {"alg": algorithm, "kid": key.kid} | header
    said = {name: value for name, value in said.items() if value is not None}
    registry = jws.JWSRegistry(algorithms=[algorithm])
    content = claims if isinstance(claims, str) else json.dumps(claims)
    return jws.serialize_compact(said, content, key, registry=registry)


def at_hash(token: str = ACCESS) -> str:
    half = hashlib.sha256(token.encode()).digest()[:16]
    return base64.urlsafe_b64encode(half).rstrip(b"=").decode()


Make = Callable[[dict[str, Any]], str]


@dataclass
class FakeOidc:
    """What it says, and what it was asked.

    Attributes:
        document: beside its discovery document; None removes a name.
        make: an ID token of its claims.
        claims: beside those that are right; None removes a name.
        userinfo: what UserInfo says.
        answers: path -> status and bytes instead of what is right.
        hangs: paths that are not answered before `release` is set.
        asked: method and path of every request.
        authorization: header of the last request for a token.
    """

    url: str = ""
    keys: list[Key] = field(default_factory=lambda: [rsa_key("one"), ec_key("two")])
    document: dict[str, Any] = field(default_factory=dict)
    make: Make = lambda claims: signed(claims, rsa_key("one"))
    claims: dict[str, Any] = field(default_factory=dict)
    userinfo: dict[str, Any] = field(default_factory=dict)
    answers: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    hangs: set[str] = field(default_factory=set)
    release: threading.Event = field(default_factory=threading.Event)
    asked: list[str] = field(default_factory=list)
    authorization: str | None = None
    form: dict[str, str] = field(default_factory=dict)
    codes: dict[str, dict[str, str]] = field(default_factory=dict)

    def send_back(self, location: str, **more: str) -> str:
        """Where a browser comes back to that was sent to `location` and has logged in there."""
        asked = {name: values[0] for name, values in parse_qs(urlsplit(location).query).items()}
        code = f"code{len(self.codes)}"
        self.codes[code] = asked
        return (
            f"{asked['redirect_uri']}?{urlencode({'code': code, 'state': asked['state']} | more)}"
        )

    def discovery(self) -> dict[str, Any]:
        said = {
            "issuer": self.url,
            "authorization_endpoint": f"{self.url}/authorize",
            "token_endpoint": f"{self.url}/token",
            "jwks_uri": f"{self.url}/jwks",
            "userinfo_endpoint": f"{self.url}/userinfo",
            "end_session_endpoint": f"{self.url}/logout",
            "id_token_signing_alg_values_supported": ["RS256", "ES256", "HS256", "none"],
        }
        return _without_none(said | self.document)

    def token(self, form: dict[str, str], authorization: str | None) -> tuple[int, dict[str, Any]]:
        self.form, self.authorization = form, authorization
        if "client_secret" in form:
            client = (form["client_id"], form["client_secret"])
        else:
            shown = base64.b64decode((authorization or "").removeprefix("Basic ")).decode()
            name, _, secret = shown.partition(":")
            client = (unquote_plus(name), unquote_plus(secret))
        if client != (CLIENT, SECRET):
            return 401, {"error": "invalid_client"}
        asked = self.codes.pop(form["code"], None)
        verified = hashlib.sha256(form["code_verifier"].encode()).digest()
        challenge = base64.urlsafe_b64encode(verified).rstrip(b"=").decode()
        if asked is None or (challenge, "S256", form["redirect_uri"]) != (
            asked["code_challenge"], asked["code_challenge_method"], asked["redirect_uri"],
        ):  # fmt: skip
            return 400, {"error": "invalid_grant"}
        now = int(time.time())
        right = {
            "iss": self.url, "sub": "s1", "aud": CLIENT, "exp": now + 300, "iat": now,
            "nonce": asked["nonce"], "at_hash": at_hash(), "preferred_username": "alice",
        }  # fmt: skip
        token = self.make(_without_none(right | self.claims))
        return 200, {"token_type": "Bearer", "access_token": ACCESS, "id_token": token}


def _without_none(said: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in said.items() if value is not None}


class _Handler(BaseHTTPRequestHandler):
    fake: FakeOidc
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        fake, path = self.fake, urlsplit(self.path).path
        if self._is_other(path):
            return
        if path == "/.well-known/openid-configuration":
            self._json(200, fake.discovery())
        elif path == "/jwks":
            self._json(200, {"keys": [key.as_dict(private=False) for key in fake.keys]})
        elif self.headers["Authorization"] == f"Bearer {ACCESS}":
            self._json(200, fake.userinfo)
        else:
            self._json(401, {"error": "invalid_token"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if not self._is_other(urlsplit(self.path).path):
            form = {name: values[0] for name, values in parse_qs(body).items()}
            self._json(*self.fake.token(form, self.headers["Authorization"]))

    def _is_other(self, path: str) -> bool:
        fake = self.fake
        fake.asked.append(f"{self.command} {path}")
        if path in fake.hangs:
            fake.release.wait()
        if path not in fake.answers:
            return False
        self._send(*fake.answers[path])
        return True

    def _json(self, status: int, said: dict[str, Any]) -> None:
        self._send(status, json.dumps(said).encode())

    def _send(self, status: int, raw: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        try:
            self.wfile.write(raw)
        except OSError:
            self.close_connection = True  # the client has heard enough

    def log_message(self, format: str, *args: Any) -> None:
        """Not to the tests' output."""


@contextmanager
def fake_oidc() -> Iterator[FakeOidc]:
    fake = FakeOidc()
    handler = type("Handler", (_Handler,), {"fake": fake})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        fake.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield fake
        finally:
            fake.release.set()
            server.shutdown()
            thread.join()
