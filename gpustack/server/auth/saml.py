"""This server as a service provider of SAML 2.0: what it sends, and what it takes.

How a login goes, and why:

1. `GET /auth/saml/login` sends the browser to the identity provider with a request, and leaves it a
   cookie with a random secret. The request's id is the secret's digest.
2. The identity provider has the browser POST its answer to `/auth/saml/callback`. It is checked,
   and its assertion is taken, once on all servers. Browsers send no SameSite=Lax cookie with
   another site's POST, so nobody knows yet whose answer it is: the browser is sent on, with a
   ticket.
3. `GET /auth/saml/callback?ticket=…` is a page of this site, and the cookie comes with it. Only the
   browser whose secret has the digest that the signed assertion answers gets a session. So an
   answer that somebody else got, or that nobody asked for, opens nothing, and no server keeps a
   list of requests.

Requests go by the redirect binding, answers come by POST, as the profile of web browsers says.
Only imported where SAML is configured: python3-saml is an extra.
"""

import base64
import time
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Final
from urllib.parse import urlencode, urljoin, urlsplit
from xml.sax.saxutils import escape

from onelogin.saml2.auth import OneLogin_Saml2_Auth
from onelogin.saml2.authn_request import OneLogin_Saml2_Authn_Request
from onelogin.saml2.constants import OneLogin_Saml2_Constants as Names
from onelogin.saml2.errors import OneLogin_Saml2_Error
from onelogin.saml2.logout_request import OneLogin_Saml2_Logout_Request
from onelogin.saml2.logout_response import OneLogin_Saml2_Logout_Response
from onelogin.saml2.response import OneLogin_Saml2_Response
from onelogin.saml2.settings import OneLogin_Saml2_Settings

from gpustack.config import saml as given
from gpustack.config.options import Settings
from gpustack.errors import SettingsError
from gpustack.lib.secrets import digest, new_secret, same
from gpustack.server.auth import saml_messages as messages
from gpustack.server.auth.saml_messages import Assertion, Logout, Refused, refused
from gpustack.server.auth.sessions import LOGIN_LIFE

LOGOUT_PATH: Final = "/auth/saml/logout/callback"


def new_browser_secret() -> str:
    """What a browser keeps while its user is at the identity provider; says its own end."""
    return f"{int(time.time() + LOGIN_LIFE.total_seconds())}.{new_secret()}{new_secret()}"


def request_id(browser_secret: str) -> str:
    return "_" + digest(browser_secret)  # an XML id begins with no digit


def asked_for(browser_secret: str, answered: str) -> bool:
    """Whether the browser with this secret made the request that is answered, and not long ago."""
    end, _, _ = browser_secret.partition(".")
    is_fresh = end.isascii() and end.isdigit() and len(end) < 12 and int(end) > time.time()
    return same(request_id(browser_secret), answered) and is_fresh


class _Request(OneLogin_Saml2_Authn_Request):  # type: ignore[misc]
    def __init__(self, settings: OneLogin_Saml2_Settings, id: str) -> None:
        self._given_id = id
        super().__init__(settings)

    def _generate_request_id(self) -> str:
        return self._given_id


class ServiceProvider:
    """The options of SAML, read once. Its methods compute only, for some milliseconds.

    Attributes:
        parties: whose words are taken, and for whom they must be.
        login_url: where a login begins.
        prefix: of the names of attributes that options give.
        logout_callback: where the identity provider tells of logouts.
        single_logout: whether it does, and is told of those here.
        metadata: what its administrator is given; signed if there is a key.

    Raises:
        SettingsError: the options are not right after all.
    """

    def __init__(self, settings: Settings) -> None:
        callback = settings.saml_sp_acs_url or ""
        self.parties = messages.Parties(
            idp=settings.saml_idp_entity_id or "",
            sp=settings.saml_sp_entity_id or "",
            callback=callback,
        )
        self.login_url = urljoin(callback, "/auth/saml/login")
        self.prefix = settings.saml_sp_attribute_prefix or ""
        self.logout_callback = urljoin(callback, LOGOUT_PATH)
        self.single_logout = settings.saml_idp_logout_url is not None
        self._login_at = settings.saml_idp_server_url or ""
        self._logout_at = settings.saml_idp_logout_url or ""
        try:
            plain = _library_settings(settings)
            self._settings = OneLogin_Saml2_Settings(deepcopy(plain))
            # The library puts texts into XML as they are; an URL may have an ampersand.
            self._written = OneLogin_Saml2_Settings(_escaped(plain))
            self.metadata = _metadata(plain)
        except (OneLogin_Saml2_Error, ValueError) as error:
            raise SettingsError(f"--saml-*: {error}") from None
        self._security = plain["security"]

    # --- logging in ---------------------------------------------------------------------------

    def login_at(self, browser_secret: str) -> str:
        """The URL at which the identity provider is asked to log a user in."""
        request = _Request(self._written, request_id(browser_secret)).get_request()
        signed = self._security["authnRequestsSigned"]
        return self._with_message(self._login_at, {"SAMLRequest": request}, signed=signed)

    def accept(self, answer: str) -> Assertion:
        """What the answer to a login says; whether this browser asked for it is another question.

        Args:
            answer: the form's field SAMLResponse.

        Raises:
            Refused: for any reason.
        """
        try:
            xml = messages.decoded(answer)
            messages.expect_sound(messages.tree(xml))
            response = OneLogin_Saml2_Response(self._settings, base64.b64encode(xml))
            messages.expect_sound(response.get_xml_document())
            response.is_valid(_received_at(self.parties.callback), raise_exceptions=True)
            return messages.assertion(response, self.parties)
        except Exception as error:  # noqa: BLE001  what the library raises has no common class
            raise refused(error) from None

    # --- single logout ------------------------------------------------------------------------

    async def logout_url(self, provider_session: Mapping[str, Any]) -> str | None:
        """See `external.Elsewhere`. The browser comes back to `logout_callback`."""
        if not self.single_logout:
            return None
        name_id = provider_session["name_id"]
        session_index = provider_session["session_index"]
        request = OneLogin_Saml2_Logout_Request(
            self._written,
            name_id=name_id["Value"],
            name_id_format=name_id.get("Format"),
            nq=name_id.get("NameQualifier"),
            spnq=name_id.get("SPNameQualifier"),
            session_index=escape(session_index) if session_index else None,
        ).get_request()
        signed = self._security["logoutRequestSigned"]
        return self._with_message(self._logout_at, {"SAMLRequest": request}, signed=signed)

    def accept_logout(self, query_string: str) -> Logout:
        """What the identity provider asks by the redirect binding.

        Raises:
            Refused: it is not signed, or for any other reason.
        """
        try:
            query = messages.signed_query(query_string)
            received = _received_at(self.logout_callback) | {
                "get_data": query, "query_string": query_string, "validate_signature_from_qs": True,
            }  # fmt: skip
            # The library has no limit.
            messages.decoded(query.get("SAMLRequest", ""), deflated=True)
            library = OneLogin_Saml2_Auth(received, old_settings=self._settings)
            if not library.validate_request_signature(query):
                raise Refused(str(library.get_last_error_reason()), messages.UNSIGNED)  # noqa: TRY301
            request = OneLogin_Saml2_Logout_Request(self._settings, query["SAMLRequest"])
            root = messages.tree(request.get_xml().encode())
            messages.expect_sound(root)
            request.is_valid(received, raise_exceptions=True)
            name_id = request.get_nameid_data(root, self._settings.get_sp_key())
            return messages.logout(root, name_id, self.parties, self.logout_callback)
        except Exception as error:  # noqa: BLE001  what the library raises has no common class
            raise refused(error) from None

    def logged_out_at(self, logout_id: str, relay_state: str | None) -> str:
        """The URL at which the identity provider hears that what it asked for was done."""
        response = OneLogin_Saml2_Logout_Response(self._written)
        response.build(escape(logout_id))
        query = {"SAMLResponse": response.get_response()}
        if relay_state is not None:
            query["RelayState"] = relay_state
        return self._with_message(
            self._logout_at, query, signed=self._security["logoutResponseSigned"]
        )

    def _with_message(self, url: str, query: dict[str, str], *, signed: bool) -> str:
        """`url` with a message in its query."""
        if signed:
            library = OneLogin_Saml2_Auth({}, old_settings=self._settings)
            sign = (
                library.add_request_signature
                if "SAMLRequest" in query
                else library.add_response_signature
            )
            sign(query, self._security["signatureAlgorithm"])
        # Some check the signature of the query as it is, in the order that the standard has.
        order = ("SAMLRequest", "SAMLResponse", "RelayState", "SigAlg", "Signature")
        text = urlencode({name: query[name] for name in order if name in query})
        return f"{url}{'&' if urlsplit(url).query else '?'}{text}"


def _library_settings(settings: Settings) -> dict[str, Any]:
    """As python3-saml has them.

    Raises:
        ValueError: a certificate or key cannot be read.
    """
    callback = settings.saml_sp_acs_url or ""
    idp_certificates = given.certificates(settings.saml_idp_x509_cert or "")
    sp: dict[str, Any] = {
        "entityId": settings.saml_sp_entity_id,
        "assertionConsumerService": {"url": callback, "binding": Names.BINDING_HTTP_POST},
        # Which one is the identity provider's business; the metadata say which we prefer.
        "NameIDFormat": Names.NAMEID_UNSPECIFIED,
    }
    idp: dict[str, Any] = {
        "entityId": settings.saml_idp_entity_id,
        "singleSignOnService": {"url": settings.saml_idp_server_url},
        "x509cert": idp_certificates[0],
        "x509certMulti": {"signing": idp_certificates, "encryption": idp_certificates[:1]},
    }
    if settings.saml_idp_logout_url is not None:
        idp["singleLogoutService"] = {"url": settings.saml_idp_logout_url}
        sp["singleLogoutService"] = {
            "url": urljoin(callback, LOGOUT_PATH), "binding": Names.BINDING_HTTP_REDIRECT,
        }  # fmt: skip
    key = settings.saml_sp_private_key
    if key is not None:
        sp["x509cert"] = given.certificates(settings.saml_sp_x509_cert or "")[0]
        sp["privateKey"] = given.private_key(key.reveal(), sp["x509cert"])
    security = given.security(settings.saml_security, has_key=key is not None)
    return {"strict": True, "debug": False, "sp": sp, "idp": idp, "security": security}


def _escaped(value: Any) -> Any:
    """`value` with all its texts as XML has them."""
    if isinstance(value, dict):
        return {key: _escaped(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_escaped(one) for one in value]
    return escape(value, {'"': "&quot;"}) if isinstance(value, str) else value


def _metadata(plain: dict[str, Any]) -> bytes:
    """Raises:
    ValueError: they would not be valid.
    """
    settings = deepcopy(plain)
    settings["sp"]["NameIDFormat"] = Names.NAMEID_PERSISTENT
    # With this, the key is offered for encryption too.
    settings["security"]["wantAssertionsEncrypted"] = "privateKey" in settings["sp"]
    library = OneLogin_Saml2_Settings(_escaped(settings))
    made = library.get_sp_metadata()
    if problems := library.validate_metadata(made):
        raise ValueError(f"no valid metadata can be made of these options: {', '.join(problems)}")
    return made.encode() if isinstance(made, str) else bytes(made)


def _received_at(url: str) -> dict[str, Any]:
    """A request to `url`, as python3-saml has it. Headers have no part in it."""
    parts = urlsplit(url)
    return {
        "https": "on" if parts.scheme == "https" else "off",
        "http_host": parts.netloc,
        "script_name": parts.path,
        "get_data": {},
        "post_data": {},
    }
