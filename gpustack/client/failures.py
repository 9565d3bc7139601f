"""From an answer of the server to the exception that it means."""

import json
from collections.abc import Iterator
from typing import Any

from gpustack.errors import GPUStackError, Unavailable


def _tree(root: type[GPUStackError]) -> Iterator[type[GPUStackError]]:
    """What is below `root` on the wire; a module's own subclasses have their parents' codes."""
    for child in root.__subclasses__():
        if child.__module__ == root.__module__:
            yield child
            yield from _tree(child)


#: `code` is contract; a status alone comes from something that stands in between.
BY_CODE = {cls.code: cls for cls in _tree(GPUStackError)}
BY_STATUS: dict[int, type[GPUStackError]] = {}
for _cls in _tree(GPUStackError):
    if _cls.status != GPUStackError.status:
        BY_STATUS.setdefault(_cls.status, _cls)


def error_of(status: int, body: bytes, retry_after: str | None = None) -> GPUStackError:
    """The error that an answer stands for: by its `code`, else by its status.

    Understands the native shape and OpenAI's; anything else is quoted.
    """
    content = _object(body)
    if isinstance(inner := content.get("error"), dict):
        content = inner
    cls = BY_CODE.get(str(content.get("code"))) or BY_STATUS.get(status)
    text = content.get("message") or body[:200].decode(errors="replace").strip()
    detail = content.get("detail")
    facts = {str(k): v for k, v in detail.items()} if isinstance(detail, dict) else {}
    facts.pop("message", None)
    if cls is not None and issubclass(cls, Unavailable):
        facts.pop("retry_after_s", None)
        wait_s = int(retry_after) if retry_after and retry_after.isdigit() else 1
        return cls(text or None, retry_after_s=wait_s, **facts)
    if cls is None:
        return GPUStackError(f"the server answered {status}: {text}", **facts)
    return cls(text or None, **facts)


def _object(body: bytes) -> dict[str, Any]:
    try:
        content = json.loads(body)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
