"""What `--database-url` may say, down to the certificate that the database has to show."""

import asyncio
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from gpustack.errors import SettingsError
from gpustack.server.db import postgres
from gpustack.server.db.engines import writing
from gpustack.server.db.migrate import migrate
from gpustack.server.db.postgres import Postgres
from gpustack.server.db.url import parse
from tests.support.certificate import Issued, issue
from tests.support.ports import free_ports
from tests.support.wait import soon


@pytest.mark.parametrize(
    ("url", "shown", "driver"),
    [
        ("sqlite:////data/gpustack.db", "/data/gpustack.db", {}),
        (
            "postgresql://u:p%40ss@db.example/gp?sslmode=require&charset=utf8&connect_timeout=3",
            "PostgreSQL at db.example:5432",
            {"dsn": "postgresql://u:p%40ss@db.example/gp?sslmode=require"},
        ),
        ("postgresql://u@[::1]:6000/gp", "PostgreSQL at [::1]:6000", {}),
        (
            "postgresql://u@/gp?host=/var/run/postgresql",
            "PostgreSQL at /var/run/postgresql",
            {"dsn": "postgresql://u@/gp?host=%2Fvar%2Frun%2Fpostgresql"},
        ),
        (
            "mysql://u%40x:p%C3%A4ss@db.example:3307/gp?charset=utf8mb4",
            "MySQL at db.example:3307",
            {"host": "db.example", "port": 3307, "user": "u@x", "password": "päss".encode(),
             "database": "gp", "ssl": None},
        ),
        (
            "mysql://u@localhost/gp?unix_socket=/run/mysqld/mysqld.sock&ssl-mode=disabled",
            "MySQL at /run/mysqld/mysqld.sock",
            {"unix_socket": "/run/mysqld/mysqld.sock", "port": 3306, "ssl": None},
        ),
    ],
)  # fmt: skip
def test_a_url_says_where_the_database_is_and_how_to_enter(
    url: str, shown: str, driver: dict[str, Any]
) -> None:
    found = parse(url)
    assert found.shown == shown
    assert {name: found.driver[name] for name in driver} == driver
    assert "p%40ss" not in f"{found} {found!r}"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql://u@h/d?ssl_mode=require", "unknown parameter ssl_mode; want some of .*sslmo"),
        ("postgresql://u@h/d?charset=latin1", "charset: all text is UTF-8"),
        ("mysql://u@h/d?charset=latin1", "charset: all text is UTF-8"),
        ("mysql://u@h/d?sslmode=require", "unknown parameter sslmode; want some of .*ssl_mode"),
        ("mysql://u@h/d?ssl-mode=PREFERRED", "ssl-mode: want one of DISABLED, REQUIRED"),
        ("mysql://u@h/d?ssl-ca=/no/such.pem", "cannot be used: .*No such file"),
    ],
)
def test_a_parameter_that_means_nothing_is_refused(url: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said) as caught:
        parse(url)
    assert str(caught.value).startswith("--database-url: ")


# --- with TLS ------------------------------------------------------------------------------


async def cipher(url: str, query: str) -> str:
    """What `query` answers of the connection that the server would make."""
    engine = writing(parse(url))
    try:
        async with engine.connect() as connection:
            return str((await connection.execute(text(query))).one()[-1])
    finally:
        await engine.dispose()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Issued:
    return issue(tmp_path_factory.mktemp("certificate"))


@pytest.fixture(scope="module")
def another(tmp_path_factory: pytest.TempPathFactory) -> Issued:
    return issue(tmp_path_factory.mktemp("another"))


@pytest.fixture(scope="module")
def postgresql(tmp_path_factory: pytest.TempPathFactory, certificate: Issued) -> Iterator[str]:
    """The URL of a PostgreSQL with a certificate. The embedded one knows no TLS."""
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if not installed:
        pytest.skip("no program /usr/lib/postgresql/*/bin/postgres: install the package postgresql")
    port = free_ports(1)
    server = Postgres(tmp_path_factory.mktemp("tls") / "postgres")
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(server, "_programs", lambda: installed[-1].parent)
        for name, value in {
            "listen_addresses": "127.0.0.1", "port": str(port), "ssl": "on",
            "ssl_cert_file": str(certificate.certfile), "ssl_key_file": str(certificate.keyfile),
        }.items():  # fmt: skip
            changed.setitem(postgres._SETTINGS, name, value)
        asyncio.run(server.start())
        yield f"postgresql://{postgres.USER}@127.0.0.1:{port}/postgres"
        asyncio.run(server.stop())


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["require", "verify-ca", "verify-full"])
def test_postgresql_is_spoken_to_over_tls(
    postgresql: str, certificate: Issued, another: Issued, mode: str
) -> None:
    query = "SELECT cipher FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
    url = f"{postgresql}?sslmode={mode}"
    assert asyncio.run(cipher(f"{url}&sslrootcert={certificate.certfile}", query)).startswith("TLS")
    if mode != "require":
        with pytest.raises(SettingsError, match=r"127\.0\.0\.1.*certificate verify failed"):
            migrate(f"{url}&sslrootcert={another.certfile}")


@pytest.fixture(scope="module")
def mariadb(tmp_path_factory: pytest.TempPathFactory, certificate: Issued) -> Iterator[str]:
    """The URL of a MariaDB with a certificate."""
    if shutil.which("mariadb-install-db") is None or shutil.which("mariadbd") is None:
        pytest.skip("no mariadbd program: install the package mariadb-server")
    folder, port = tmp_path_factory.mktemp("mariadb"), free_ports(1)
    where = ["--no-defaults", f"--datadir={folder / 'data'}", "--user=root"]
    subprocess.run(
        ["mariadb-install-db", *where, "--auth-root-authentication-method=normal"],
        check=True, capture_output=True,
    )  # fmt: skip
    server = subprocess.Popen(
        [
            "mariadbd", *where, f"--socket={folder / 'socket'}", f"--port={port}",
            "--bind-address=127.0.0.1", f"--ssl-cert={certificate.certfile}",
            f"--ssl-key={certificate.keyfile}",
        ],
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    url = f"mysql://root@127.0.0.1:{port}/test"

    def answers() -> bool:
        try:
            return bool(asyncio.run(cipher(url, "SELECT 1")))
        except Exception:  # noqa: BLE001  whatever it says while it starts
            return False

    soon(answers, "MariaDB answers", within_s=30)
    yield url
    server.terminate()
    server.wait(30)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["REQUIRED", "VERIFY_CA", "VERIFY_IDENTITY"])
def test_mysql_is_spoken_to_over_tls(
    mariadb: str, certificate: Issued, another: Issued, mode: str
) -> None:
    query, url = "SHOW STATUS LIKE 'Ssl_cipher'", f"{mariadb}?ssl-mode={mode}"
    assert asyncio.run(cipher(mariadb, query)) == ""
    assert asyncio.run(cipher(f"{url}&ssl-ca={certificate.certfile}", query)) != ""
    if mode != "REQUIRED":
        with pytest.raises(SettingsError, match=r"127\.0\.0\.1.*certificate verify failed"):
            migrate(f"{url}&ssl-ca={another.certfile}")
