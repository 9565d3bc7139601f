"""PURE: whether an ID token is what its provider, and nobody else, says of this login.

OpenID Connect Core 1.0, section 3.1.3.7. Imported only where OpenID Connect is configured.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from authlib.oidc.core import CodeIDToken
from joserfc import jws
from joserfc.errors import JoseError
from joserfc.jwk import JWKRegistry

#: Algorithms that are ever believed -> the kind of key that each takes. None with a shared secret:
#: there, whoever knows the public key could sign.
KEY_TYPES: Final[Mapping[str, str]] = {
    **dict.fromkeys(("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"), "RSA"),
    **dict.fromkeys(("ES256", "ES384", "ES512"), "EC"),
    "EdDSA": "OKP",
}
#: How far the provider's clock may be from this one's.
LEEWAY_S: Final = 60


class _Registry(jws.JWSRegistry):
    """Some providers send the chain of the key's certificates along: no reason to refuse it."""

    max_header_length = 16 * 1024


class Untrusted(Exception):
    """It is not. Says why, without anything of the token but names of its parts."""


class UnknownKey(Untrusted):
    """None of the provider's keys that are known is the one that it names."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What a token has to say.

    Attributes:
        algorithms: that may have signed it; of KEY_TYPES.
        access_token: that came with it, and that it may name by its hash.
        now: seconds since the epoch.
    """

    issuer: str
    client_id: str
    nonce: str
    algorithms: Sequence[str]
    access_token: str
    now: int


def check(token: str, keys: Sequence[Mapping[str, Any]], wanted: Expected) -> dict[str, Any]:
    """The claims of `token`.

    Args:
        keys: the provider's, as its JWKS has them.

    Raises:
        UnknownKey: with newer keys it may be right.
        Untrusted: it is not to be believed.
    """
    try:
        read = jws.extract_compact(token.encode(), registry=_Registry())
    except (JoseError, ValueError, TypeError, RecursionError):
        raise Untrusted("it is no signed token") from None
    header = read.headers()
    algorithm, kid = header.get("alg"), header.get("kid")
    if not isinstance(algorithm, str) or algorithm not in wanted.algorithms:
        raise Untrusted(f"its algorithm is {str(algorithm)[:20]!r}, which is not accepted")
    fitting = [key for key in keys if _fits(key, algorithm, kid)]
    if not fitting:
        raise UnknownKey(f"the provider has no key {str(kid)[:80]!r} for {algorithm}")
    if not any(_signed(token, key, algorithm) for key in fitting):
        raise Untrusted("its signature is wrong")
    try:
        claims = json.loads(read.payload)
        _validate(claims, header, wanted)
    except (JoseError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise Untrusted(_words(error)) from None
    return dict(claims)


def _fits(key: Mapping[str, Any], algorithm: str, kid: object) -> bool:
    # What it is for besides, by `use`, `alg` or its curve, is the library's to check.
    return key.get("kty") == KEY_TYPES[algorithm] and kid in (None, key.get("kid"))


def _signed(token: str, key: Mapping[str, Any], algorithm: str) -> bool:
    registry = _Registry(algorithms=[algorithm], strict_check_header=False)
    try:
        jws.deserialize_compact(token, JWKRegistry.import_key(dict(key)), registry=registry)
    except (JoseError, ValueError, TypeError, KeyError):
        return False
    return True


def _validate(claims: dict[str, Any], header: dict[str, Any], wanted: Expected) -> None:
    CodeIDToken(
        claims,
        header,
        {
            "iss": {"essential": True, "value": wanted.issuer},
            "aud": {"essential": True, "value": wanted.client_id},
        },
        {
            "nonce": wanted.nonce,
            "client_id": wanted.client_id,
            "access_token": wanted.access_token,
        },
    ).validate(now=wanted.now, leeway=LEEWAY_S)


def _words(error: Exception) -> str:
    if isinstance(error, JoseError):
        return " ".join(filter(None, _parts(error)))
    return "its claims cannot be read"


def _parts(error: JoseError) -> Iterator[str]:
    yield error.error
    yield error.description or ""
