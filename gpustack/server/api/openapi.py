"""The API's description of itself: what each route takes, and all that it can answer.

Which errors those are is said where they are raised: by a route, and by what it depends on
(`errors.raises`). What every route with parameters or a body can answer is known here.
"""

from collections.abc import Iterable, Iterator
from http import HTTPStatus
from itertools import groupby
from typing import Any

from fastapi import FastAPI
from fastapi.dependencies.models import Dependant
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute

from gpustack.errors import (
    BadRequest,
    Forbidden,
    GPUStackError,
    Invalid,
    NotFound,
    TooLarge,
    Unauthorized,
    Unavailable,
    raised,
)
from gpustack.schemas import wire
from gpustack.schemas.base import Schema
from gpustack.schemas.errors import Error
from gpustack.schemas.watch import WatchEvent

#: FastAPI's own, of a body that is not answered here.
_FOREIGN = ("HTTPValidationError", "ValidationError")
_BEARER, _SESSION = "bearer", "session"
_SECURITY_SCHEMES = {
    _BEARER: {"type": "http", "scheme": "bearer"},
    _SESSION: {"type": "apiKey", "in": "cookie", "name": wire.SESSION_COOKIE},
}
_TEXT, _NUMBER = {"type": "string"}, {"type": "integer"}


def describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document of all routes of `app`. Takes a moment."""
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name in _FOREIGN:
        schemas.pop(name, None)
    for model in (Error, WatchEvent):
        schemas |= _with_parts(model)
    responses = components.setdefault("responses", {})
    components["securitySchemes"] = _SECURITY_SCHEMES
    for route in app.routes:
        if isinstance(route, APIRoute) and route.include_in_schema:
            for method in route.methods or ():
                operation = document["paths"][route.path_format][method.lower()]
                operation["operationId"] = route.name
                if security := _security(route):
                    operation["security"] = security
                operation["responses"].pop(str(int(HTTPStatus.UNPROCESSABLE_ENTITY)), None)
                for status, errors in _by_status(_errors(route)):
                    name = "Or".join(error.__name__ for error in errors)
                    responses[name] = _response(errors)
                    answer = {"$ref": f"#/components/responses/{name}"}
                    operation["responses"][str(status)] = answer
    return document


def _errors(route: APIRoute) -> set[type[GPUStackError]]:
    """Every error that a request of `route` can be answered with."""
    errors: set[type[GPUStackError]] = {GPUStackError, *raised(route.endpoint)}
    for used in _dependencies(route.dependant):
        errors |= {*raised(used.call)}
        if used.path_params:  # of a value that is another route's, or nobody's
            errors.add(NotFound)
        if used.path_params or used.query_params or used.header_params:
            errors.add(Invalid)
    if route.body_field:  # of bytes that are no text, of too many, of what they say
        errors |= {BadRequest, TooLarge, Invalid}
    return errors


def _dependencies(dependant: Dependant) -> Iterator[Dependant]:
    yield dependant
    for used in dependant.dependencies:
        yield from _dependencies(used)


def _by_status(
    errors: Iterable[type[GPUStackError]],
) -> Iterator[tuple[int, list[type[GPUStackError]]]]:
    def status(error: type[GPUStackError]) -> int:
        return error.status

    ordered = sorted(errors, key=lambda error: (error.status, error.__name__))
    for shared, group in groupby(ordered, key=status):
        yield shared, list(group)


def _response(errors: list[type[GPUStackError]]) -> dict[str, Any]:
    headers: dict[str, Any] = {}
    if any(issubclass(error, Unavailable) for error in errors):
        headers["Retry-After"] = {"schema": _NUMBER, "description": "Seconds.", "required": True}
    if Unauthorized in errors:
        headers["WWW-Authenticate"] = {"schema": _TEXT, "required": True}
    code = {"type": "string", "enum": [error.code for error in errors]}
    narrowed = {"type": "object", "properties": {"code": code}}
    schema = {"allOf": [{"$ref": _place(Error.__name__)}, narrowed]}
    said = {
        "description": "\n\n".join(f"`{error.code}`: {error()}" for error in errors),
        "content": {"application/json": {"schema": schema}},
    }
    return said | ({"headers": headers} if headers else {})


def _security(route: APIRoute) -> list[dict[str, list[str]]]:
    """The ways to show a credential; none where none is needed. Who joins has no session."""
    used = _dependencies(route.dependant)
    errors = {error for one in used if one is not route.dependant for error in raised(one.call)}
    ways = [(_BEARER, Unauthorized), (_SESSION, Forbidden)]
    return [{way: []} for way, refusal in ways if refusal in errors]


def _with_parts(model: type[Schema]) -> dict[str, Any]:
    """The schema of `model`, and under names of its own those of what it is made of."""
    name = model.__name__
    schema = model.model_json_schema(mode="serialization", ref_template=_place(f"{name}.{{model}}"))
    parts = schema.pop("$defs", {})
    return {name: schema} | {f"{name}.{part}": made for part, made in parts.items()}


def _place(name: str) -> str:
    return f"#/components/schemas/{name}"
