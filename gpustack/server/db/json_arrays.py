"""Arrays within JSON columns, asked in SQL."""

from typing import Any

from sqlalchemy import Boolean
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import GenericFunction


class has_text(GenericFunction[bool]):
    """`has_text(column, key, text)`: whether the array at `key` of a JSON object holds `text`."""

    type = Boolean()
    inherit_cache = True


@compiles(has_text, "sqlite")
def _sqlite(element: has_text, compiler: SQLCompiler, **options: Any) -> str:
    column, key, text = (compiler.process(part, **options) for part in element.clauses)
    array = f"json_each({column}, '$.' || {key})"
    return f"EXISTS (SELECT 1 FROM {array} WHERE value = {text})"  # noqa: S608  all of it is ours


@compiles(has_text, "postgresql")
def _postgresql(element: has_text, compiler: SQLCompiler, **options: Any) -> str:
    column, key, text = (compiler.process(part, **options) for part in element.clauses)
    array = f"CAST({column} -> CAST({key} AS TEXT) AS JSONB)"
    return f"({array} @> to_jsonb(CAST({text} AS TEXT)))"


@compiles(has_text, "mysql")
@compiles(has_text, "mariadb")
def _mysql(element: has_text, compiler: SQLCompiler, **options: Any) -> str:
    column, key, text = (compiler.process(part, **options) for part in element.clauses)
    return f"JSON_CONTAINS({column}, JSON_QUOTE({text}), CONCAT('$.', {key}))"
