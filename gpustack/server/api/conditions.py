"""Users' updates are compared with the generation that they were made from."""

import re
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import Depends, Header, Response

from gpustack.errors import BadRequest, Conflict, raises
from gpustack.server.db import audit_log, tables
from gpustack.server.db.database import WriteSession

_TAG = r'(?:W/)?"[^"]*"'
_TAGS = re.compile(rf"\s*{_TAG}(?:\s*,\s*{_TAG})*\s*")


@raises(BadRequest, Conflict)
def _if_match(
    if_match: Annotated[
        str | None,
        Header(description='The generation that was read, in quotes, as its ETag has it: "3".'),
    ] = None,
) -> frozenset[int] | None:
    if if_match is None or if_match.strip() == "*":
        return None
    if not _TAGS.fullmatch(if_match):
        raise BadRequest('If-Match: want the generation in quotes, such as "3"')
    # A weak tag, or one that is none of ours, is of no generation.
    return frozenset(int(tag) for tag in re.findall(r'(?<!W/)"([0-9]{1,18})"', if_match))


#: Rows whose updates are compared.
Generations = tables.Credential | tables.Group | tables.Model | tables.User | tables.Worker
#: The generations of `If-Match`; None: the request names none.
IfMatch = Annotated[frozenset[int] | None, Depends(_if_match)]


def expect(
    session: WriteSession,
    what: str,
    found: int,
    *,
    header: frozenset[int] | None,
    body: int | None,
    current: Any,
) -> None:
    """Go on only if the update was made from what is there.

    Args:
        what: is updated, such as "model m".
        found: its generation.
        header, body: the generations that the request names; without either, the last writer
            wins, and the audit log says so.
        current: the object as it is, for whoever lost.

    Raises:
        Conflict: somebody else was first.
    """
    if header is None and body is None:
        audit_log.remark(session, audit_log.LAST_WRITER_WINS)
        return
    if (header is not None and found not in header) or body not in {None, found}:
        named = sorted({*(header or ()), *(() if body is None else (body,))} - {found})
        wanted = f", not {' or '.join(map(str, named))}" if named else ""
        raise Conflict(f"{what} is at generation {found}{wanted}", current=current)


def change(row: Generations, values: Mapping[str, Any]) -> None:
    """Make `values` the row's. A new generation, unless they are its values already."""
    changes = {name: value for name, value in values.items() if getattr(row, name) != value}
    if changes:
        row.sqlmodel_update(changes | {"generation": row.generation + 1})


def tag(response: Response, generation: int) -> None:
    """Tell which generation an answer shows. Status in it moves without the generation."""
    response.headers["ETag"] = f'"{generation}"'
