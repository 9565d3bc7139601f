"""This worker's own certificate: what its relay shows, and what the server tells gateways of."""

import logging
import ssl
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from gpustack.lib import platform, trust
from gpustack.schemas.wire import WORKER_CERTIFICATE_FILE

logger = logging.getLogger(__name__)

#: No clock of any host makes it invalid: whoever knows it knows exactly this one.
_BEGINS: Final = datetime(2000, 1, 1, tzinfo=UTC)
_ENDS: Final = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)


class OwnCertificate:
    """The certificate of the worker `name`, in a file of mode 0600 beside its key.

    Made anew when the file is gone or of no use, or another worker's: then the data directory is a
    copy, and two workers must not have one key.

    Attributes:
        pem: the certificate alone.
    """

    def __init__(self, data_dir: Path, name: str) -> None:
        self._file = data_dir / WORKER_CERTIFICATE_FILE
        # PEM lets any text stand before it; to read the name out of a certificate takes a library
        # that would cost the agent megabytes for ever.
        self._title = f"Key and certificate of worker {name!a}"
        self._read_ns: int | None = None
        self.pem = ""
        self.look()

    def look(self) -> bool:
        """See to it that the file is there and right; whether `pem` is another than before."""
        before = self.pem
        if (changed_ns := self._changed_ns()) is None or changed_ns != self._read_ns:
            self.pem = self._load() or self._make()
            self._read_ns = self._changed_ns()
        return self.pem != before

    def _changed_ns(self) -> int | None:
        try:
            return self._file.stat().st_mtime_ns
        except OSError:
            return None

    def _load(self) -> str | None:
        """The certificate in the file; None: there is none of use."""
        try:
            title, _, text = self._file.read_text("ascii").partition("\n")
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self._file)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            logger.warning("%s is of no use and made anew: %s", self._file, type(error).__name__)
            return None
        if title != self._title:
            logger.info("%s is another worker's: this one makes its own", self._file)
            return None
        return trust.certificate_in(text)

    def _make(self) -> str:
        from cryptography import x509
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.serialization import (
            Encoding,
            NoEncryption,
            PrivateFormat,
        )

        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "gpustack worker")])
        made = (
            x509.CertificateBuilder(
                name, name, key.public_key(), x509.random_serial_number(), _BEGINS, _ENDS
            )
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .sign(key, SHA256())
        )
        pem = made.public_bytes(Encoding.PEM).decode()
        secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
        platform.write_private(self._file, f"{self._title}\n{secret}{pem}")
        return pem
