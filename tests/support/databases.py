"""Fresh databases of every kind, each as the migrations make it and gone after its test.

SQLite is always there. The others are where these variables say, or at their default places:
`GPUSTACK_TEST_POSTGRESQL` and `GPUSTACK_TEST_MYSQL` name a database of a user who may create
others; the embedded PostgreSQL is a pip package.
"""

import asyncio
import os
import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from gpustack.errors import SettingsError
from gpustack.server.db.migrate import migrate
from gpustack.server.db.postgres import Postgres
from gpustack.server.db.url import parse

POSTGRESQL = os.environ.get("GPUSTACK_TEST_POSTGRESQL", "postgresql://postgres@127.0.0.1/postgres")
MYSQL = os.environ.get("GPUSTACK_TEST_MYSQL", "mysql://root@127.0.0.1/test")
#: All names of databases that tests make begin so.
PREFIX = "gpustack_test_"


class Databases(ABC):
    """Makes databases of one kind."""

    kind: str

    @abstractmethod
    async def empty(self, folder: Path) -> str:
        """The URL of a new database without a table. `folder` is the test's own."""

    @abstractmethod
    async def migrated(self, folder: Path) -> str:
        """The URL of a new database with the newest schema."""

    @abstractmethod
    async def drop(self, url: str) -> None:
        """Remove it, whoever is connected to it."""

    async def disconnect(self, url: str) -> None:
        """End every connection to it, as a restart of its server would."""
        raise NotImplementedError

    def user(self, password: str) -> str:
        """The name of one who may use every database of tests with this password."""
        raise NotImplementedError


class SQLite(Databases):
    kind = "sqlite"

    def __init__(self, folder: Path) -> None:
        self._template = folder / "database.db"
        migrate(f"sqlite:///{self._template}")

    async def empty(self, folder: Path) -> str:
        return f"sqlite:///{folder / 'empty.db'}"

    async def migrated(self, folder: Path) -> str:
        shutil.copy(self._template, folder / "database.db")
        return f"sqlite:///{folder / 'database.db'}"

    async def drop(self, url: str) -> None:
        pass  # the folder goes


class PostgreSQL(Databases):
    """Databases of a PostgreSQL server, copied from one template.

    Args:
        admin: URL of a database of it.
    """

    def __init__(self, kind: str, admin: str) -> None:
        self.kind = kind
        self._admin = admin
        self._template = _new_name()
        asyncio.run(self._do(f"CREATE DATABASE {self._template}"))
        migrate(_with_name(admin, self._template))

    async def empty(self, folder: Path) -> str:
        return await self._made("template0")

    async def migrated(self, folder: Path) -> str:
        return await self._made(self._template)

    async def _made(self, template: str) -> str:
        name = _new_name()
        await self._do(f"CREATE DATABASE {name} TEMPLATE {template}")
        return _with_name(self._admin, name)

    async def drop(self, url: str) -> None:
        await self._do(f"DROP DATABASE {urlsplit(url).path[1:]} WITH (FORCE)")

    async def disconnect(self, url: str) -> None:
        whose = f"datname = '{urlsplit(url).path[1:]}'"
        select = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE "
        await self._do(select + whose)

    def user(self, password: str) -> str:
        return urlsplit(self._admin).username or ""  # whom it trusts, whatever is given

    def close(self) -> None:
        asyncio.run(self._do(f"DROP DATABASE {self._template} WITH (FORCE)"))

    async def _do(self, statement: str) -> None:
        import asyncpg

        connection = await asyncpg.connect(self._admin)
        try:
            await connection.execute(statement)
        finally:
            await connection.close()


class MySQL(Databases):
    """Databases of a MySQL or MariaDB server. What made the first one is said again for others."""

    kind = "mysql"

    def __init__(self, admin: str) -> None:
        self._admin = admin
        self._user = _new_name()
        self._said = asyncio.run(self._template())

    async def _template(self) -> list[tuple[str, Any]]:
        url = await self.empty(Path())
        await asyncio.to_thread(migrate, url)
        name = urlsplit(url).path[1:]
        said: list[tuple[str, Any]] = []
        async with self._connected() as ask:
            for (table,) in await ask(f"SHOW TABLES FROM {name}"):
                ((_, made),) = await ask(f"SHOW CREATE TABLE {name}.`{table}`")
                said.append((made, None))
                for row in await ask(f"SELECT * FROM {name}.`{table}`"):  # noqa: S608
                    values = ", ".join(["%s"] * len(row))
                    said.append((f"INSERT INTO `{table}` VALUES ({values})", row))  # noqa: S608
        await self.drop(url)
        return said

    async def empty(self, folder: Path) -> str:
        name = _new_name()
        async with self._connected() as ask:
            # Not what any of our columns has.
            await ask(f"CREATE DATABASE {name} CHARACTER SET latin1")
        return _with_name(self._admin, name)

    async def migrated(self, folder: Path) -> str:
        url = await self.empty(folder)
        async with self._connected() as ask:
            await ask(f"USE {urlsplit(url).path[1:]}")
            await ask("SET foreign_key_checks = 0")
            for statement, values in self._said:
                await ask(statement, values)
        return url

    async def drop(self, url: str) -> None:
        async with self._connected() as ask:
            await ask(f"DROP DATABASE {urlsplit(url).path[1:]}")

    async def disconnect(self, url: str) -> None:
        async with self._connected() as ask:
            whose = f"db = '{urlsplit(url).path[1:]}'"
            select = "SELECT id FROM information_schema.processlist WHERE "
            for (one,) in await ask(select + whose):
                await ask(f"KILL {one}")

    def user(self, password: str) -> str:
        asyncio.run(self._make_user(password))
        return self._user

    async def _make_user(self, password: str) -> None:
        async with self._connected() as ask:
            await ask(f"CREATE USER IF NOT EXISTS {self._user} IDENTIFIED BY '{password}'")
            await ask(f"GRANT ALL ON *.* TO {self._user}")

    async def _drop_user(self) -> None:
        async with self._connected() as ask:
            await ask(f"DROP USER IF EXISTS {self._user}")

    def close(self) -> None:
        asyncio.run(self._drop_user())

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[Any]:
        import asyncmy

        options = {k: v for k, v in parse(self._admin).driver.items() if k != "database"}
        connection = await asyncmy.connect(**options, autocommit=True)
        try:
            async with connection.cursor() as cursor:

                async def ask(statement: str, values: Any = None) -> Any:
                    await cursor.execute(statement, values)
                    return await cursor.fetchall() if cursor.description else ()

                yield ask
        finally:
            await connection.ensure_closed()


def _new_name() -> str:
    return PREFIX + uuid.uuid4().hex[:12]


def _with_name(url: str, name: str) -> str:
    return urlsplit(url)._replace(path=f"/{name}").geturl()


# --- which there are -----------------------------------------------------------------------


@contextmanager
def sqlite(folder: Path) -> Iterator[Databases]:
    yield SQLite(folder)


@contextmanager
def embedded(folder: Path) -> Iterator[Databases]:
    server = Postgres(folder / "postgres")
    try:
        asyncio.run(server.start())
    except SettingsError as error:
        pytest.skip(f"{error} (make install brings it)")
    try:
        yield PostgreSQL("embedded", server.url)
    finally:
        asyncio.run(server.stop())


@contextmanager
def postgresql(folder: Path) -> Iterator[Databases]:
    place = parse(POSTGRESQL).shown
    try:
        databases = PostgreSQL("postgresql", POSTGRESQL)
    except (OSError, SettingsError) as error:
        pytest.skip(
            f"{place} does not answer ({error}): install and start a PostgreSQL there, or name one "
            "in GPUSTACK_TEST_POSTGRESQL"
        )
    try:
        yield databases
    finally:
        databases.close()


@contextmanager
def mysql(folder: Path) -> Iterator[Databases]:
    import asyncmy

    try:
        databases = MySQL(MYSQL)
    except (OSError, asyncmy.errors.Error, SettingsError) as error:
        pytest.skip(
            f"{parse(MYSQL).shown} does not answer ({error}): install and start a MariaDB or MySQL "
            "there, or name one in GPUSTACK_TEST_MYSQL"
        )
    try:
        yield databases
    finally:
        databases.close()


#: Kind -> what makes databases of it, given a folder.
KINDS = {"sqlite": sqlite, "embedded": embedded, "postgresql": postgresql, "mysql": mysql}
