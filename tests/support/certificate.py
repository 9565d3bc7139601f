"""Certificates of this machine's own, made with the openssl program."""

import shutil
import ssl
import subprocess
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec


@dataclass(frozen=True)
class Issued:
    """A certificate for 127.0.0.1 and localhost, which vouches for itself."""

    certfile: Path
    keyfile: Path

    def trust(self) -> ssl.SSLContext:
        """For a client that believes this certificate and no other."""
        return ssl.create_default_context(cafile=str(self.certfile))

    @property
    def der(self) -> bytes:
        return ssl.PEM_cert_to_DER_cert(self.certfile.read_text())

    def replace_by(self, other: "Issued") -> None:
        self.certfile.write_bytes(other.certfile.read_bytes())
        self.keyfile.write_bytes(other.keyfile.read_bytes())

    @property
    def options(self) -> tuple[str, ...]:
        return ("--ssl-certfile", str(self.certfile), "--ssl-keyfile", str(self.keyfile))


def issue(
    folder: Path,
    name: str = "server",
    *,
    password: str = "",
    key: tuple[str, ...] = ("ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
) -> Issued:
    """A new key and certificate in `folder`; with a password the key is encrypted."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl program: install the package openssl")
    made = Issued(folder / f"{name}.crt", folder / f"{name}.key")
    subprocess.run(
        [
            openssl, "req", "-x509", "-days", "2", "-newkey", *key, "-subj", f"/CN={name}",
            "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost",
            "-keyout", str(made.keyfile), "-out", str(made.certfile),
            *(["-passout", f"pass:{password}"] if password else ["-nodes"]),
        ],
        check=True,
        capture_output=True,
    )  # fmt: skip
    made.keyfile.chmod(0o600)
    return made


def expire(issued: Issued, ended: datetime) -> Issued:
    """`issued`, made anew with the same key so that it was valid for a day until `ended`."""
    key = serialization.load_pem_private_key(issued.keyfile.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    old = x509.load_pem_x509_certificate(issued.certfile.read_bytes())
    builder = x509.CertificateBuilder(
        old.issuer, old.subject, key.public_key(), old.serial_number, ended - timedelta(1), ended
    )
    for one in old.extensions:
        builder = builder.add_extension(one.value, one.critical)
    made = builder.sign(key, hashes.SHA256())
    issued.certfile.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    return issued
