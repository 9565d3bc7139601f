"""What every answer of the server tells a browser."""

from typing import Final

from starlette.types import Message, Scope, Send

_POLICY: Final = b"content-security-policy"
_ALWAYS: Final = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    # Not no-referrer: then a form of our own pages would come with `Origin: null`, as a foreign
    # one (lib.origin).
    (b"referrer-policy", b"same-origin"),
]
#: Data is no page: where a browser shows it all the same, it runs and loads nothing. Pages say
#: what they need themselves.
_DATA: Final = [(_POLICY, b"default-src 'none'; frame-ancestors 'none'")]


def telling(scope: Scope, send: Send) -> Send:
    """`send`, which adds what browsers are to know to the answer's head.

    A session that was found to live longer now (`auth.principals`) does so in the browser as well.
    """
    if scope["type"] != "http":
        return send

    async def tell(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [*message.get("headers", ()), *_ALWAYS]
            names = {name for name, _ in headers}
            if _POLICY not in names:
                headers += _DATA
            renewed = scope.get("state", {}).get("renewed_cookie")
            if renewed and b"set-cookie" not in names:  # a logout's own stands
                headers.append((b"set-cookie", renewed.encode()))
            message = {**message, "headers": headers}
        await send(message)

    return tell
