"""OpenID Connect: this server as a client of an identity provider, with the code flow and PKCE.

Nothing is kept of a login that is under way: state, nonce and PKCE's verifier are made from one
secret in a cookie of the browser that began it, so any server can finish what another began, and no
other browser can. Imported only where OpenID Connect is configured.
"""

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote_plus, urlsplit

import httpx
from authlib.common.urls import add_params_to_uri
from authlib.oauth2.rfc6749.parameters import prepare_grant_uri, prepare_token_request
from authlib.oauth2.rfc7636 import create_s256_code_challenge

from gpustack.config.options import Settings
from gpustack.errors import Forbidden, Unauthorized, Unavailable
from gpustack.hub.proxies import ProxiedTransport
from gpustack.lib.net import is_loopback
from gpustack.lib.secrets import Secret, digest, same
from gpustack.schemas.users import Source
from gpustack.server.auth.external import Profile, profile
from gpustack.server.auth.id_tokens import KEY_TYPES, Expected, UnknownKey, Untrusted, check

logger = logging.getLogger(__name__)

CALLBACK: Final = "/auth/oidc/callback"
SCOPE: Final = "openid profile email"
#: The provider's whole answer is waited for so long, seconds, and read so far.
CALL_S: Final = 10.0
#: All that is asked of it while a browser waits, together: a gateway gives up after 30 s.
WHOLE_S: Final = 25.0
ANSWER_BYTES: Final = 2**20
#: What the provider says of itself, its keys among it, is asked for again after this time.
KEEP_S: Final = 600.0
#: Calls at once: strangers can ask for them.
CALLS: Final = 16

_AWAY = (
    "the identity provider does not answer as it should: try again in a moment, or ask an "
    "administrator; the server's log says more"
)
_UNTRUSTED = (
    "what the identity provider answered cannot be trusted: begin again at {}; if that does not "
    "help, ask an administrator, the server's log says why"
)
_REFUSED = (
    "the identity provider does not know this server: an administrator has to check "
    "--oidc-client-id and --oidc-client-secret"
)
_NOT_BEGUN = (
    "this login did not begin in this browser, or too long ago: begin again at {} with cookies "
    "allowed"
)


class _Unusable(Exception):
    """What a provider answered; for the log."""


@dataclass(frozen=True, slots=True)
class Metadata:
    """What a provider says of itself.

    Attributes:
        issuer: as it writes itself.
        keys: public ones, as JWKs.
        names_itself: each answer to a browser carries `iss` (RFC 9207).
        until: asked for again then, by `time.monotonic`.
    """

    issuer: str
    authorization_endpoint: str
    token_endpoint: str
    jwks_uri: str
    userinfo_endpoint: str | None
    end_session_endpoint: str | None
    algorithms: tuple[str, ...]
    auth_methods: tuple[str, ...]
    names_itself: bool
    keys: Sequence[Mapping[str, Any]]
    until: float


def metadata(said: Mapping[str, Any], issuer: str) -> dict[str, Any]:
    """PURE: what of a discovery document is used, by the names of `Metadata`.

    Raises:
        _Unusable: it is another provider's, lacks something, or names what cannot be called safely.
    """
    named = said.get("issuer")
    if not isinstance(named, str) or named.rstrip("/") != issuer:
        raise _Unusable(f"it calls itself {str(named)[:200]!r}: is that the right --oidc-issuer?")
    places = {name: said.get(name) for name in (
        "authorization_endpoint", "token_endpoint", "jwks_uri", "userinfo_endpoint",
        "end_session_endpoint",
    )}  # fmt: skip
    for name, url in places.items():
        needed = name not in {"userinfo_endpoint", "end_session_endpoint"}
        if (needed or url is not None) and not is_safe(url):
            raise _Unusable(f"its {name} is {str(url)[:200]!r}: want an https URL")
    algorithms = _texts(said.get("id_token_signing_alg_values_supported"), "RS256")
    return places | {
        "issuer": named,
        "algorithms": tuple(one for one in algorithms if one in KEY_TYPES),
        "auth_methods": _texts(
            said.get("token_endpoint_auth_methods_supported"), "client_secret_basic"
        ),
        "names_itself": said.get("authorization_response_iss_parameter_supported") is True,
    }


def _texts(said: Any, default: str) -> tuple[str, ...]:
    if not isinstance(said, list):
        return (default,)
    return tuple(one for one in said if isinstance(one, str))


def is_safe(url: object) -> bool:
    """Whether nobody between here and there can read or change what is sent."""
    if not isinstance(url, str):
        return False
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port  # which raises when it is none
    except ValueError:
        return False
    return bool(host) and (
        parts.scheme == "https" or (parts.scheme == "http" and is_loopback(host))
    )


class Provider:
    """The identity provider that the options name.

    Args:
        http: through which it is called.
        call_s: its whole answer is waited for so long.
        whole_s: all its answers to what one browser wants are.
    """

    def __init__(
        self,
        settings: Settings,
        http: httpx.AsyncClient,
        call_s: float = CALL_S,
        whole_s: float = WHOLE_S,
    ) -> None:
        self._settings = settings
        self._http = http
        self._call_s, self._whole_s = call_s, whole_s
        self._calls = asyncio.Semaphore(CALLS)
        self._known: Metadata | None = None
        self.issuer = settings.oidc_issuer or ""
        self._client_id = settings.oidc_client_id or ""
        self._secret = settings.oidc_client_secret or Secret("")
        self.redirect_uri = (
            settings.oidc_redirect_uri or f"{settings.server_external_url}{CALLBACK}"
        )
        #: Where browsers see this server.
        self.home = self.redirect_uri.removesuffix(CALLBACK) + "/"

    # --- a login -------------------------------------------------------------------------------

    async def login_url(self, secret: str) -> str:
        """Where a browser logs in that keeps `secret` in its cookie.

        Raises:
            Unavailable: the provider is away.
        """
        known = await self._metadata()
        url: str = prepare_grant_uri(
            known.authorization_endpoint,
            self._client_id,
            "code",
            redirect_uri=self.redirect_uri,
            scope=SCOPE,
            state=_state(secret),
            nonce=_nonce(secret),
            code_challenge=create_s256_code_challenge(_verifier(secret)),
            code_challenge_method="S256",
        )
        return url

    async def logged_in(self, said: Mapping[str, str], secret: str | None) -> Profile:
        """Who came back from the provider.

        Args:
            said: the query of the callback.
            secret: of the cookie; None: there is none.

        Raises:
            Unauthorized: this browser did not begin that login, or the answer is not to be trusted.
            Forbidden: the provider, or what it says, lets nobody in.
            Unavailable: the provider is away.
        """
        if not secret or not same(said.get("state", ""), _state(secret)):
            raise Unauthorized(_NOT_BEGUN.format(self.home))
        async with self._in_time():
            return await self._logged_in(said, secret)

    async def _logged_in(self, said: Mapping[str, str], secret: str) -> Profile:
        known = await self._metadata()
        named = said.get("iss")
        if named != known.issuer and (named is not None or known.names_itself):
            raise self._untrusted(f"the answer is of {str(named)[:200]!r}, not of {known.issuer}")
        if (error := said.get("error")) is not None:
            logger.info("the identity provider refused a login: %r", error[:200])
            shown = error if re.fullmatch("[a-z_]{1,64}", error) else "error"
            raise Forbidden(
                f"the identity provider did not let you in ({shown}): begin again at {self.home}, "
                "or ask its administrator"
            )
        if not (code := said.get("code")):
            raise self._untrusted("it carries no code")
        tokens = await self._tokens(known, code, _verifier(secret))
        claims = await self._checked(tokens, _nonce(secret))
        subject = claims["sub"]
        if self._settings.oidc_use_userinfo:
            claims = await self._userinfo(known, tokens.access, subject)
        return profile(
            claims, self._settings, issuer=known.issuer, subject=subject, source=Source.OIDC
        )

    async def _tokens(self, known: Metadata, code: str, verifier: str) -> "_Tokens":
        """The tokens that `code` stands for: the provider gives them once."""
        form = {"redirect_uri": self.redirect_uri, "code": code, "code_verifier": verifier}
        client, secret = self._client_id, self._secret.reveal()
        more: dict[str, Any] = {}
        if "client_secret_basic" in known.auth_methods:
            # RFC 6749, 2.3.1
            more = {"auth": httpx.BasicAuth(quote_plus(client), quote_plus(secret))}
        else:
            form |= {"client_id": client, "client_secret": secret}
        answer = await self._call(
            "POST",
            known.token_endpoint,
            content=prepare_token_request("authorization_code", **form),
            headers={"Content-Type": "application/x-www-form-urlencoded"},
            **more,
        )
        if answer.status == httpx.codes.OK:
            token, access = answer.body.get("id_token"), answer.body.get("access_token")
            if not isinstance(token, str) or not isinstance(access, str):
                raise self._untrusted("there is no ID token or no access token in it")
            return _Tokens(token, access)
        error = str(answer.body.get("error", answer.status))[:80]
        logger.warning("the identity provider refused a code: %r", error)
        if error == "invalid_grant":
            raise Unauthorized(
                f"this login was finished already, or took too long: begin again at {self.home}"
            )
        if error in {"invalid_client", "unauthorized_client"}:
            raise Forbidden(_REFUSED)
        raise Unavailable(_AWAY)

    async def _checked(self, tokens: "_Tokens", nonce: str) -> dict[str, Any]:
        """The claims of the ID token. For a key that is not known, the keys are read once more."""

        def claims(known: Metadata) -> dict[str, Any]:
            wanted = Expected(
                issuer=known.issuer,
                client_id=self._client_id,
                nonce=nonce,
                algorithms=known.algorithms,
                access_token=tokens.access,
                now=int(time.time()),
            )
            return check(tokens.id, known.keys, wanted)

        try:
            try:
                return claims(await self._metadata())
            except UnknownKey:
                return claims(await self._metadata(anew=True))
        except Untrusted as error:
            raise self._untrusted(f"of its ID token: {error}") from None

    async def _userinfo(self, known: Metadata, token: str, subject: str) -> dict[str, Any]:
        """What the UserInfo endpoint says of `subject`, and of nobody else."""
        if known.userinfo_endpoint is None:
            raise self._away(
                known.issuer, "it has no userinfo_endpoint: leave out --oidc-use-userinfo"
            )
        answer = await self._call(
            "GET", known.userinfo_endpoint, headers={"Authorization": f"Bearer {token}"}
        )
        if answer.status != httpx.codes.OK:
            raise self._away(known.userinfo_endpoint, f"it answers {answer.status}")
        if answer.body.get("sub") != subject:
            raise self._untrusted("UserInfo is of another subject than the ID token")
        return answer.body

    # --- a logout ------------------------------------------------------------------------------

    async def logout_url(self, provider_session: Mapping[str, Any]) -> str | None:
        """Where a browser ends its session with the provider; None: nowhere.

        The ID token is not kept to be shown there: the provider may ask whether to log out.
        """
        try:
            async with self._in_time():
                # Whoever leaves does not wait for news.
                known = self._known or await self._metadata()
        except Unavailable:
            return None
        if known.end_session_endpoint is None or provider_session.get("issuer") != known.issuer:
            return None
        url: str = add_params_to_uri(
            known.end_session_endpoint,
            [("client_id", self._client_id), ("post_logout_redirect_uri", self.home)],
        )
        return url

    # --- calls ---------------------------------------------------------------------------------

    @asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        """What a browser waits for.

        Raises:
            Unavailable: it takes too long.
        """
        try:
            async with asyncio.timeout(self._whole_s):
                yield
        except TimeoutError:
            why = f"its answers take longer than {self._whole_s:g} s together"
            raise self._away(self.issuer, why) from None

    async def _metadata(self, *, anew: bool = False) -> Metadata:
        if self._known is None or anew or self._known.until <= time.monotonic():
            said = await self._document(f"{self.issuer}/.well-known/openid-configuration")
            try:
                made = metadata(said, self.issuer)
            except _Unusable as error:
                raise self._away(self.issuer, str(error)) from None
            keys = (await self._document(made["jwks_uri"])).get("keys")
            if not isinstance(keys, list) or not all(isinstance(key, dict) for key in keys):
                raise self._away(made["jwks_uri"], "it answers no keys")
            self._known = Metadata(**made, keys=keys, until=time.monotonic() + KEEP_S)
        return self._known

    async def _document(self, url: str) -> dict[str, Any]:
        answer = await self._call("GET", url)
        if answer.status != httpx.codes.OK:
            raise self._away(url, f"it answers {answer.status}")
        return answer.body

    async def _call(self, method: str, url: str, **more: Any) -> "_Answer":
        """One request, whose answer is a JSON object.

        Raises:
            Unavailable: there is no such answer in time.
        """
        raw = b""
        try:
            async with (
                asyncio.timeout(self._call_s),
                self._calls,
                self._http.stream(method, url, **more) as answer,
            ):
                async for part in answer.aiter_bytes():
                    raw += part
                    if len(raw) > ANSWER_BYTES:
                        raise self._away(url, "its answer is too long")
        except TimeoutError:
            raise self._away(url, f"it does not answer within {self._call_s:g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._away(url, str(error) or type(error).__name__) from None
        try:
            body = json.loads(raw) if raw else {}
        except (ValueError, RecursionError):
            raise self._away(url, f"it answers {answer.status_code} and no JSON") from None
        if not isinstance(body, dict):
            raise self._away(url, f"it answers {answer.status_code} and no JSON object")
        return _Answer(answer.status_code, body)

    def _away(self, url: str, why: str) -> Unavailable:
        logger.warning("the identity provider (%s) cannot be used: %s", url, why)
        return Unavailable(_AWAY)

    def _untrusted(self, why: str) -> Unauthorized:
        logger.warning("an answer of the identity provider (%s) is refused: %s", self.issuer, why)
        return Unauthorized(_UNTRUSTED.format(self.home))


@dataclass(frozen=True, slots=True)
class _Tokens:
    id: str
    access: str


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    body: dict[str, Any]


def _state(secret: str) -> str:
    return digest(f"state {secret}")


def _nonce(secret: str) -> str:
    return digest(f"nonce {secret}")


def _verifier(secret: str) -> str:
    return digest(f"verifier {secret}")


@asynccontextmanager
async def provider(settings: Settings) -> AsyncIterator[Provider]:
    """The provider that `settings` name, and connections to it for as long as it is used.

    An address of http is on this machine: no proxy knows it.
    """
    async with httpx.AsyncClient(
        transport=ProxiedTransport(),
        mounts={"http://": httpx.AsyncHTTPTransport()},
        timeout=CALL_S,  # of each part; `_call` has one for the whole
        limits=httpx.Limits(max_keepalive_connections=0),  # a code is given away once
        trust_env=False,
        headers={"Accept": "application/json"},
    ) as http:
        yield Provider(settings, http)
