"""The options of SAML: certificates and keys as they are given, and `--saml-security`.

cryptography is imported where it is needed: most starts have no SAML.
"""

import base64
import binascii
import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, TypeVar

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

T = TypeVar("T")

#: Of python3-saml; it imports xmlsec and lxml.
MODULE: Final = "onelogin.saml2.utils"

_MORE: Final = "http://www.w3.org/2001/04/xmldsig-more#"
_ENC: Final = "http://www.w3.org/2001/04/xmlenc#"
#: Algorithms that signatures may have, by others and by us. No SHA-1, no MD5, no HMAC.
SIGNATURES: Final = frozenset(
    _MORE + name
    for name in (
        "rsa-sha256", "rsa-sha384", "rsa-sha512", "ecdsa-sha256", "ecdsa-sha384", "ecdsa-sha512",
    )
)  # fmt: skip
#: python3-saml makes and checks no others of queries.
RSA_SIGNATURES: Final = frozenset(one for one in SIGNATURES if "#rsa-" in one)
DIGESTS: Final = frozenset({_ENC + "sha256", _MORE + "sha384", _ENC + "sha512"})

#: What holds where --saml-security says nothing; what it may say has the type that is here.
_SECURITY: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "wantAssertionsSigned": True,
        "wantMessagesSigned": False,
        "wantAssertionsEncrypted": False,
        "wantNameId": True,
        "wantNameIdEncrypted": False,
        "wantAttributeStatement": False,
        "rejectDeprecatedAlgorithm": True,
        "failOnAuthnContextMismatch": False,
        "allowRepeatAttributeName": False,
        "allowSingleLabelDomains": True,
        "nameIdEncrypted": False,
        "requestedAuthnContextComparison": "exact",
        "signatureAlgorithm": _MORE + "rsa-sha256",
        "digestAlgorithm": _ENC + "sha256",
        # With a key, all that is sent is signed.
        "authnRequestsSigned": False,
        "logoutRequestSigned": False,
        "logoutResponseSigned": False,
        "signMetadata": False,
        # A bool, or a list of contexts. Else a second factor would be no password, and refused.
        "requestedAuthnContext": False,
        # Copies of the metadata do not go out of date.
        "metadataValidUntil": "",
        "metadataCacheDuration": "",
    }
)
_SIGNED_WITH_KEY: Final = (
    "authnRequestsSigned", "logoutRequestSigned", "logoutResponseSigned", "signMetadata",
)  # fmt: skip
_NEED_KEY: Final = (*_SIGNED_WITH_KEY, "wantAssertionsEncrypted", "wantNameIdEncrypted")
#: Key -> why it cannot be switched off.
_ALWAYS: Final = {
    "wantAssertionsSigned": "assertions must be signed, always",
    "rejectDeprecatedAlgorithm": "signatures with SHA-1 prove nothing",
    "wantNameId": "users are known by their NameID",
}
_CHOICES: Final = {
    "signatureAlgorithm": sorted(RSA_SIGNATURES),
    "digestAlgorithm": sorted(DIGESTS),
    "requestedAuthnContextComparison": ["exact", "minimum", "maximum", "better"],
}


def security(given: Mapping[str, Any] | None, *, has_key: bool) -> dict[str, Any]:
    """What `--saml-security` says, over strict defaults.

    Raises:
        ValueError: a line for each mistake in it.
    """
    given = given or {}
    problems = [
        why for key, value in given.items() if (why := _wrong(key, value, has_key)) is not None
    ]
    if problems:
        raise ValueError("\n".join(problems))
    return {**_SECURITY, **dict.fromkeys(_SIGNED_WITH_KEY, has_key), **given}


def _wrong(key: str, value: object, has_key: bool) -> str | None:
    if key not in _SECURITY:
        return f"unknown key {key[:40]!r}: want some of {', '.join(_SECURITY)}"
    if key in _ALWAYS and value is not True:
        return f"{key} must be true: {_ALWAYS[key]}"
    if key in _NEED_KEY and value and not has_key:
        return f"{key} needs --saml-sp-private-key"
    if key in _CHOICES and value not in _CHOICES[key]:
        return f"{key}: want one of {', '.join(_CHOICES[key])}"
    if key == "requestedAuthnContext":
        is_list = isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)
        return None if is_list or isinstance(value, bool) else f"{key}: want true, false or a list"
    if type(value) is not type(_SECURITY[key]):
        return f"{key}: want {'true or false' if type(_SECURITY[key]) is bool else 'text'}"
    return None


_CERTIFICATE: Final = re.compile(r"-----BEGIN CERTIFICATE-----(.*?)-----END CERTIFICATE-----", re.S)
_KEY: Final = re.compile(
    r"-----BEGIN ((?:RSA )?)PRIVATE KEY-----(.*?)-----END (?:RSA )?PRIVATE KEY-----", re.S
)
_WANTED: Final = "as PEM, as the base64 of a PEM without its first and last line, or as a path"


def certificates(given: str) -> list[str]:
    """As PEM: the certificates in PEM, in base64 or in the file that an option names.

    Raises:
        ValueError: there is none; the message says what would be right.
    """
    from cryptography.hazmat.primitives.serialization import Encoding

    found = _read(given, "a certificate", _certificates)
    return [one.public_bytes(Encoding.PEM).decode() for one in found]


def _certificates(text: str) -> "list[Certificate]":
    from cryptography import x509

    bodies = _CERTIFICATE.findall(text) or [text]
    return [x509.load_der_x509_certificate(_from_base64(body)) for body in bodies]


def private_key(given: str, certificate: str) -> str:
    """As PEM: the RSA key in PEM, in base64 or in the file that an option names.

    Args:
        certificate: PEM; the key is the one of it.

    Raises:
        ValueError: it is none, or another's; the message says what would be right.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        load_der_private_key,
    )

    def load(text: str) -> RSAPrivateKey:
        match = _KEY.search(text)
        key = load_der_private_key(_from_base64(match[2] if match else text), None)
        if not isinstance(key, RSAPrivateKey):
            raise ValueError("no RSA key")
        return key

    key = _read(given, "an RSA private key without a passphrase", load)
    of = x509.load_pem_x509_certificate(certificate.encode()).public_key()
    if key.public_key() != of:
        raise ValueError("it is not the key of --saml-sp-x509-cert: give the two of one pair")
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return pem.decode()


def _read(given: str, what: str, load: Callable[[str], T]) -> T:
    """`load` of what is given, or of the file that it names. What is given is never quoted."""
    try:
        return load(given)
    except (ValueError, TypeError):
        if "-----BEGIN" in given:
            raise ValueError(f"want {what} {_WANTED}: this PEM is none") from None
    try:
        return load(Path(given).read_text())
    except OSError as error:
        raise ValueError(
            f"want {what} {_WANTED}: it is neither, and as a path: {error.strerror}"
        ) from None
    except (ValueError, TypeError):
        raise ValueError(f"want {what} {_WANTED}: the file has none") from None


def _from_base64(text: str) -> bytes:
    # Environment variables hold line ends as two characters.
    try:
        return base64.b64decode("".join(text.replace("\\n", "\n").split()), validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from None


def unusable(given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The key of each option that cannot be used, and why.

    Args:
        given: the settings that begin with saml_, secrets revealed.
    """
    if given["saml_idp_server_url"] is None:
        return
    try:
        importlib.import_module(MODULE)
    except ImportError:
        yield "saml_idp_server_url", "SAML needs python3-saml: pip install 'gpustack[saml]'"
    except Exception as error:  # noqa: BLE001  xmlsec's own, when lxml has another libxml2
        yield (
            "saml_idp_server_url",
            f"python3-saml cannot be used: {error}; install lxml and xmlsec of one libxml2: "
            "pip install --force-reinstall --no-binary lxml,xmlsec lxml xmlsec",
        )
    try:
        certificates(given["saml_idp_x509_cert"])
    except ValueError as error:
        yield "saml_idp_x509_cert", str(error)
    key, certificate = given["saml_sp_private_key"], given["saml_sp_x509_cert"]
    if key is not None:
        found = None
        try:
            (found,) = certificates(certificate)
        except ValueError as error:
            yield "saml_sp_x509_cert", str(error)
        try:
            if found is not None:
                private_key(key, found)
        except ValueError as error:
            yield "saml_sp_private_key", str(error)
    try:
        security(given["saml_security"], has_key=key is not None)
    except ValueError as error:
        for line in str(error).splitlines():
            yield "saml_security", line
