"""Whom a TLS connection is opened to: contexts for clients, and what is wrong when one fails.

Three ways to know the other side: by an authority (`authorities`), by its key (`key`), or by its
very certificate (`exactly`). In each, the handshake fails before a byte of a request has left.
"""

import hashlib
import ssl
from functools import lru_cache
from pathlib import Path
from typing import Final

from gpustack.errors import SettingsError

#: X509_V_ERR_* that people meet.
_EXPIRED, _NOT_YET, _NAME, _ADDRESS = 10, 9, 62, 64
_NO_ISSUER: Final = frozenset({2, 18, 19, 20, 21})

#: More messages to and fro than any handshake has.
_FLIGHTS: Final = 10


class WrongKey(ssl.SSLCertVerificationError):
    """The other side has another key than it should."""


def fingerprint(certificate: bytes) -> str:
    """Of the public key in a certificate (DER): a renewed certificate with the same key has it too.

    Raises:
        ValueError: it is no certificate.
    """
    from cryptography import exceptions, x509  # megabytes that few processes need
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    try:
        key = x509.load_der_x509_certificate(certificate).public_key()
    except exceptions.UnsupportedAlgorithm as error:
        raise ValueError(str(error)) from None
    spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return f"sha256:{hashlib.sha256(spki).hexdigest()}"


def authorities(file: Path | None = None) -> ssl.SSLContext:
    """Trusts those whose certificate is for the name that was dialled, signed by an authority.

    Args:
        file: the authorities, as PEM; None: this system's.

    Raises:
        OSError: the file cannot be read, or has no certificates in it.
    """
    context = _client()
    context.check_hostname, context.verify_mode = True, ssl.CERT_REQUIRED
    if file is None:
        context.load_default_certs()
    else:
        context.load_verify_locations(file)
    return context


def of_server(ca: Path | None, fingerprint: str | None) -> ssl.SSLContext:
    """What the options --server-ca and --server-fingerprint say; a fingerprint counts alone.

    Raises:
        SettingsError: --server-ca is of no use.
    """
    if fingerprint is not None:
        return key(fingerprint)
    try:
        return authorities(ca)
    except OSError as error:
        why = "want certificates as PEM" if isinstance(error, ssl.SSLError) else error.strerror
        raise SettingsError(f"--server-ca {ca}: {why}") from None


def key(wanted: str) -> ssl.SSLContext:
    """Trusts who has the key with this fingerprint; what else a certificate says does not count."""

    def check(connection: ssl.SSLObject | ssl.SSLSocket) -> None:
        try:
            shown = fingerprint(connection.getpeercert(binary_form=True) or b"")
        except ValueError as error:
            raise WrongKey(f"its certificate cannot be read ({error})") from None
        if shown != wanted:
            raise WrongKey(f"its key has fingerprint {shown}, not {wanted}")

    class Pinned(ssl.SSLObject):  # of event loops
        def do_handshake(self) -> None:
            super().do_handshake()
            check(self)

    class PinnedSocket(ssl.SSLSocket):  # of everybody else
        def do_handshake(self, block: bool = False) -> None:
            super().do_handshake(block)
            check(self)

    context = _client()
    context.sslobject_class, context.sslsocket_class = Pinned, PinnedSocket
    return context


@lru_cache(maxsize=4096)
def exactly(certificate: str) -> ssl.SSLContext:
    """Trusts who has the key of this very certificate (PEM), which is valid now.

    Raises:
        ssl.SSLError: it is no certificate.
    """
    if not certificate.isascii():
        raise ssl.SSLError("not a certificate")
    context = _client()
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # whoever signed it
    context.load_verify_locations(cadata=certificate)
    return context


def certificate_in(text: str) -> str:
    """The certificate in a file's text, where it comes last: after its key.

    Raises:
        ValueError: there is none.
    """
    return text[text.index(ssl.PEM_HEADER) :]


def _client() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def is_vouched_for(server: ssl.SSLContext, host: str) -> bool:
    """Whether this system's authorities vouch for what `server` shows to who dials `host`."""
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    try:
        client = authorities().wrap_bio(back, there, server_hostname=host)
        ends = [client, server.wrap_bio(there, back, server_side=True)]
        for _ in range(_FLIGHTS):
            for end in ends[:]:
                try:
                    end.do_handshake()
                    ends.remove(end)
                except ssl.SSLWantReadError:
                    continue
    except (ssl.SSLError, ValueError):
        return False
    return not ends


def tls_error(error: BaseException) -> ssl.SSLError | None:
    """The failed handshake behind an error of a library, if that is the cause."""
    waiting = (ssl.SSLWantReadError, ssl.SSLWantWriteError)  # behind a time-out: it was but slow
    at: BaseException | None = error
    while at is not None:
        if isinstance(at, ssl.SSLError) and not isinstance(at, waiting):
            return at
        at = at.__cause__ or at.__context__
    return None


def reason(error: ssl.SSLError) -> str:
    """OpenSSL's word for it, such as CERTIFICATE_VERIFY_FAILED."""
    return getattr(error, "reason", None) or type(error).__name__


def why(error: Exception, host: str) -> str:
    """Why there is no answer from the server at `host`, and for TLS what would be right."""
    refused = tls_error(error)
    # Time-outs carry no text.
    return str(error) or type(error).__name__ if refused is None else _sentence(refused, host)


def _sentence(error: ssl.SSLError, host: str) -> str:
    again = "`gpustack token create` on the server prints it"
    if isinstance(error, WrongKey):
        return (
            f"{error.args[0]}: if the server was given another key, take --server-fingerprint "
            f"from there ({again}), else somebody stands between"
        )
    code = getattr(error, "verify_code", None)
    if code in _NO_ISSUER:
        return (
            "its certificate is signed by nobody whom this machine trusts: give the authority's "
            f"certificate as --server-ca, or the server's --server-fingerprint ({again})"
        )
    if code in (_NAME, _ADDRESS):
        return (
            f"its certificate is not for {host}: have --server-url say a name that it is for, or "
            f"give --server-fingerprint ({again})"
        )
    if code == _EXPIRED:
        return "its certificate has expired: renew it on the server"
    if code == _NOT_YET:
        return "its certificate is not valid yet: compare this machine's clock with the server's"
    if code is not None:
        return f"its certificate is refused: {getattr(error, 'verify_message', error)}"
    return f"it does not speak TLS there: want its --tls-port, or http:// ({reason(error)})"
