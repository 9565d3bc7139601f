"""Who may call which route of the server: whom `tests/support/access.txt` says, and nobody else."""

import pytest

from tests.server.conftest import GATEWAY, JOIN, LOCAL_ADMIN, Plane
from tests.support.access import Row, Stage, compare, differences
from tests.support.routes import PUBLIC, walk

pytestmark = pytest.mark.parametrize("databases", ["sqlite"], indirect=True, scope="session")


def table(plane: Plane) -> list[Row]:
    return compare("server", walk(plane.app.routes))


async def staged(plane: Plane) -> Stage:
    http = await plane.through_gateway()
    return await Stage(http, LOCAL_ADMIN, GATEWAY, JOIN).build()


@pytest.mark.parametrize(
    "thorough", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["few", "all"]
)
async def test_every_route_lets_in_whom_the_table_says(plane: Plane, thorough: bool) -> None:
    known = table(plane)
    wrong = await differences(await staged(plane), known, thorough=thorough)
    assert not wrong, "\n" + "\n".join(wrong)


async def test_nobody_is_let_in_but_where_the_design_says(plane: Plane) -> None:
    let_in = {row.route[1] for row in table(plane) if row.answers["nobody"] not in {401, 403}}
    assert let_in == PUBLIC
