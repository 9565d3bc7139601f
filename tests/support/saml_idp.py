"""A real SAML identity provider, pysaml2, over HTTP on loopback: a program of its own.

    python -m tests.support.saml_idp '{"port": …, "key": …, "certificate": …, "sp": …}'

It knows the service provider from the metadata at the URL `sp`, which it reads when it is first
asked. Whoever says who he is at its form is believed, and remembered by a cookie.
"""

import html
import json
import secrets
import sys
from functools import cached_property, partial
from http.cookies import SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import httpx
from saml2 import BINDING_HTTP_POST, BINDING_HTTP_REDIRECT, entity
from saml2.config import IdPConfig
from saml2.saml import NAMEID_FORMAT_PERSISTENT, NameID
from saml2.server import Server
from saml2.sigver import pre_encryption_part
from saml2.xmldsig import DIGEST_SHA256, SIG_RSA_SHA256

PASSWORD_CONTEXT = "urn:oasis:names:tc:SAML:2.0:ac:classes:PasswordProtectedTransport"
AES256_GCM = "http://www.w3.org/2009/xmlenc11#aes256-gcm"
PEOPLE = {
    "alice": {"mail": ["alice@example.org"], "givenName": ["Alice"], "sn": ["Liddell"]},
    "bob": {"mail": ["bob@example.org"], "givenName": ["Bob"], "sn": ["Builder"]},
}


class Provider:
    """The identity provider.

    Attributes:
        sessions: cookie -> who is logged in, the NameID and the session index that were sent.
    """

    def __init__(self, port: int, key: str, certificate: str, sp: str, *, encrypt: bool) -> None:
        self.base = f"http://localhost:{port}"
        self._key, self._certificate, self._sp = key, certificate, sp
        self._encrypt = encrypt
        self.sessions: dict[str, tuple[str, NameID, str]] = {}

    @cached_property
    def server(self) -> Any:
        metadata = httpx.get(self._sp, trust_env=False).text
        server = Server(config=IdPConfig().load(
            {
                "entityid": f"{self.base}/metadata",
                "key_file": self._key,
                "cert_file": self._certificate,
                "encryption_keypairs": [
                    {"key_file": self._key, "cert_file": self._certificate}
                ],
                "metadata": {"inline": [metadata]},
                "service": {
                    "idp": {
                        "name": "the tests' identity provider",
                        "endpoints": {
                            "single_sign_on_service": [(f"{self.base}/sso", BINDING_HTTP_REDIRECT)],
                            "single_logout_service": [(f"{self.base}/slo", BINDING_HTTP_REDIRECT)],
                        },
                        "policy": {
                            "default": {"lifetime": {"minutes": 5}, "name_form":
                                "urn:oasis:names:tc:SAML:2.0:attrname-format:basic"}
                        },
                        "want_authn_requests_signed": True,
                        "name_id_format": [NAMEID_FORMAT_PERSISTENT],
                    }
                },
            }
        ))  # fmt: skip
        # By itself it encrypts with triple DES, and has no option for that.
        entity.pre_encryption_part = partial(pre_encryption_part, msg_enc=AES256_GCM)
        server.sec.encrypt_assertion = partial(server.sec.encrypt_assertion, key_type="aes-256")
        return server

    def form(self, query: dict[str, str]) -> str:
        """The page that asks who is there."""
        hidden = "".join(
            f'<input type="hidden" name="{name}" value="{html.escape(value)}">'
            for name, value in query.items()
        )
        return (
            f'<form method="post" action="{self.base}/login">{hidden}'
            '<input name="who" value=""></form>'
        )

    def answer(self, query: dict[str, str], who: str) -> tuple[str, str]:
        """A cookie, and the page that posts the answer to a request."""
        request = self.server.parse_authn_request(
            query["SAMLRequest"], BINDING_HTTP_REDIRECT, relay_state=query.get("RelayState"),
            sigalg=query.get("SigAlg"), signature=query.get("Signature"),
        ).message  # fmt: skip
        to = self.server.response_args(request, [BINDING_HTTP_POST])
        name_id = NameID(
            format=NAMEID_FORMAT_PERSISTENT, sp_name_qualifier=to["sp_entity_id"],
            name_qualifier=f"{self.base}/metadata", text=f"persistent-{who}",
        )  # fmt: skip
        answer = self.server.create_authn_response(
            PEOPLE[who],
            in_response_to=to["in_response_to"],
            destination=to["destination"],
            sp_entity_id=to["sp_entity_id"],
            name_id=name_id,
            authn={"class_ref": PASSWORD_CONTEXT, "authn_auth": self.base},
            sign_assertion=True,
            sign_response=False,
            encrypt_assertion=self._encrypt,
            # Else its prefixes are others than the response's for the same names: python3-saml puts
            # the decrypted assertion into the response, where lxml makes them the response's, and
            # the signature is wrong.
            encrypt_assertion_self_contained=False,
            sign_alg=SIG_RSA_SHA256,
            digest_alg=DIGEST_SHA256,
        )
        text = str(answer)
        index = _between(text, 'SessionIndex="', '"')
        cookie = secrets.token_hex(16)
        self.sessions[cookie] = (who, name_id, index)
        sent = self.server.apply_binding(
            BINDING_HTTP_POST, text, to["destination"], query.get("RelayState", ""), response=True
        )
        return cookie, sent["data"]

    def logout_asked(self, query: dict[str, str]) -> str:
        """Where the browser goes on with the answer to a service provider's logout request."""
        request = self.server.parse_logout_request(
            query["SAMLRequest"], BINDING_HTTP_REDIRECT, relay_state=query.get("RelayState"),
            sigalg=query.get("SigAlg"), signature=query.get("Signature"),
        )  # fmt: skip
        name = request.message.name_id.text
        self.sessions = {
            cookie: one for cookie, one in self.sessions.items() if one[1].text != name
        }
        answer = self.server.create_logout_response(request.message, [BINDING_HTTP_REDIRECT])
        return self._sent(answer, response=True, relay_state=query.get("RelayState", ""))

    def logout(self, cookie: str) -> str:
        """Where the browser goes on when its user logs out here: to the service provider."""
        _, name_id, index = self.sessions.pop(cookie)
        (sp,) = self.server.metadata.keys()
        to = self.server.metadata.single_logout_service(sp, BINDING_HTTP_REDIRECT, "spsso")
        _, request = self.server.create_logout_request(
            to[0]["location"], sp, name_id=name_id, session_indexes=[index] if index else None
        )
        return self._sent(request, response=False, relay_state="back")

    def _sent(self, message: Any, *, response: bool, relay_state: str) -> str:
        sent = self.server.apply_binding(
            BINDING_HTTP_REDIRECT, str(message), message.destination, relay_state,
            response=response, sign=True, sigalg=SIG_RSA_SHA256,
        )  # fmt: skip
        return str(dict(sent["headers"])["Location"])


def _between(text: str, before: str, after: str) -> str:
    return text.partition(before)[2].partition(after)[0]


class Handler(BaseHTTPRequestHandler):
    provider: Provider

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        query = dict(parse_qsl(parts.query))
        who = self.provider.sessions.get(self._cookie())
        if parts.path == "/sso":
            if who is not None:
                self._page(*self.provider.answer(query, who[0]))
            else:
                self._page("", self.provider.form(query))
        elif parts.path == "/slo" and "SAMLRequest" in query:
            self._to(self.provider.logout_asked(query))
        elif parts.path == "/logout" and who is not None:
            self._to(self.provider.logout(self._cookie()))
        elif parts.path == "/me":
            self._page("", "" if who is None else who[0])
        else:
            self._page("", f"{parts.path}: {'out' if 'SAMLResponse' in query else ''}")

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["content-length"])).decode()
        form = dict(parse_qsl(raw))
        self._page(*self.provider.answer(form, form.pop("who")))

    def _cookie(self) -> str:
        jar = SimpleCookie(self.headers.get("cookie", ""))
        return jar["idp"].value if "idp" in jar else ""

    def _page(self, cookie: str, text: str) -> None:
        self.send_response(200)
        if cookie:
            self.send_header("Set-Cookie", f"idp={cookie}; HttpOnly; Path=/; SameSite=lax")
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(text.encode())

    def _to(self, url: str) -> None:
        self.send_response(303)
        self.send_header("Location", url)
        self.end_headers()


def main() -> None:
    given = json.loads(sys.argv[1])
    port = given["port"]
    Handler.provider = Provider(
        port, given["key"], given["certificate"], given["sp"], encrypt=given["encrypt"]
    )
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main()
