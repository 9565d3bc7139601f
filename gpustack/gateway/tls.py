"""The certificate that a listener shows: of the public HTTPS port, or of a relay."""

import asyncio
import logging
import ssl
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from gpustack.config.options import Settings
from gpustack.errors import SettingsError

logger = logging.getLogger(__name__)

#: What OpenSSL calls it, and what it means.
_TOO_SMALL: Final = "key is too small: want RSA of 2048 bits or more, or an elliptic curve"
_REASONS: Final = {
    "KEY_VALUES_MISMATCH": "the key is not the certificate's",
    "EE_KEY_TOO_SMALL": f"the {_TOO_SMALL}",
    "CA_KEY_TOO_SMALL": f"in the chain a {_TOO_SMALL}",
    "CA_MD_TOO_WEAK": "the certificate is signed by way of a weak hash: want SHA-256 or better",
}


class Certificate:
    """A certificate with its key, as their files were when they were last read well.

    One file may hold both.

    Attributes:
        context: for listeners; each handshake is given the newest certificate.

    Raises:
        SettingsError: the files are not what they should be.
    """

    def __init__(self, certfile: Path, keyfile: Path) -> None:
        self._certfile, self._keyfile = certfile, keyfile
        self._read = self._stamps()
        self._newest = _context(certfile, keyfile)
        self.context = _context(certfile, keyfile)
        self.context.sni_callback = self._choose  # called without a server's name as well

    @classmethod
    def of(cls, settings: Settings) -> "Certificate | None":
        """The one that `settings` name, if any."""
        if settings.ssl_certfile is None or settings.ssl_keyfile is None:
            return None
        return cls(settings.ssl_certfile, settings.ssl_keyfile)

    @staticmethod
    def check(settings: Settings) -> list[str]:
        """A sentence for what clients mind about the one that `settings` name, if it can be served.

        Raises:
            SettingsError: it cannot be served.
        """
        if Certificate.of(settings) is None or settings.ssl_certfile is None:
            return []
        from cryptography import x509  # no gateway needs it

        try:
            shown = x509.load_pem_x509_certificates(settings.ssl_certfile.read_bytes())[0]
        except (OSError, ValueError):  # OpenSSL has just read it: this is stricter
            return []
        begins, ends, now = shown.not_valid_before_utc, shown.not_valid_after_utc, datetime.now(UTC)
        place = f"--ssl-certfile {settings.ssl_certfile}: clients refuse the certificate"
        if ends <= now:
            return [f"{place}, since it expired on {ends:%Y-%m-%d %H:%M} UTC"]
        if begins > now:
            return [f"{place}, since it is valid only from {begins:%Y-%m-%d %H:%M} UTC on"]
        return []

    async def follow(self, *, every_s: float) -> None:
        """Take in new files as they appear, for connections to come, until cancelled."""
        while True:
            await asyncio.sleep(every_s)
            if self._stamps() != self._read:
                self.reload()

    def reload(self) -> None:
        """Read the files again, for connections to come. What cannot be used is said, and left."""
        self._read = self._stamps()
        try:
            self._newest = _context(self._certfile, self._keyfile)
        except SettingsError as error:
            logger.error("the certificate stays as it was: %s", error)  # noqa: TRY400
        else:
            logger.info("the certificate was read again")

    def _stamps(self) -> list[tuple[int, int, int] | None]:
        """What changes with the files, whether they are written anew or replaced."""
        return [_stamp(self._certfile), _stamp(self._keyfile)]

    def _choose(self, connection: ssl.SSLObject, _name: str | None, _: ssl.SSLContext) -> None:
        connection.context = self._newest


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        its = file.stat()
    except OSError:
        return None
    return its.st_mtime_ns, its.st_ino, its.st_size


def _context(certfile: Path, keyfile: Path) -> ssl.SSLContext:
    place = f"--ssl-certfile {certfile}, --ssl-keyfile {keyfile}"
    if certfile == keyfile:
        place = str(certfile)

    def no_password() -> str:
        raise SettingsError(f"--ssl-keyfile: {keyfile} is encrypted, and nobody is there to ask")

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(certfile, keyfile, no_password)
    except ssl.SSLError as error:
        why = _REASONS.get(
            error.reason, "want a certificate with its chain and its key, both as PEM"
        )
        raise SettingsError(f"{place}: {why}") from None
    except OSError as error:
        raise SettingsError(f"{place}: {error.strerror}") from None
    return context
