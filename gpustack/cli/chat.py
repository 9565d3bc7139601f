"""`gpustack chat`: talk to a model, in one breath or in turns."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from gpustack.cli.connection import Connection, connected
from gpustack.cli.words import line, typed
from gpustack.errors import GPUStackError, Unavailable
from gpustack.lib.text import plain

if TYPE_CHECKING:
    import httpx

HELP = r"\q ends, \c forgets what was said, \h shows this."
Message = dict[str, str]


@click.command()
@click.argument("model")
@click.argument("prompt", required=False)
@click.option("--max-tokens", type=click.IntRange(1), metavar="N", help="Of each answer, at most.")
@click.option("--temperature", type=click.FloatRange(0), metavar="X", help="0: always the same.")
@connected
def chat(server: Connection, model: str, prompt: str | None, **limits: Any) -> None:
    """Ask MODEL, and print its answer as it comes. Without PROMPT: a conversation."""
    given = {key: value for key, value in limits.items() if value is not None}
    request = {"model": model, "stream": True, **given}
    with _http(server) as http:
        if prompt is not None:
            _say(http, request, [{"role": "user", "content": prompt}])
        else:
            _converse(http, request)


def _converse(http: "httpx.Client", request: dict[str, Any]) -> None:
    said: list[Message] = []
    click.echo(HELP, err=True)
    while (words := _typed_line()) is not None:
        if words == r"\q":
            return
        if words == r"\c":
            said.clear()
        elif words.startswith("\\"):
            click.echo(HELP, err=True)
        elif words:
            asked: Message = {"role": "user", "content": words}
            try:
                answer = _say(http, request, [*said, asked])
            except GPUStackError as error:
                click.echo(f"Error: {line(str(error))}", err=True)
            else:
                said += [asked, {"role": "assistant", "content": answer}]


def _typed_line() -> str | None:
    """The next line typed; None at the end of input."""
    try:
        return str(typed(input(">>> "))).strip()
    except EOFError:
        click.echo(err=True)
        return None


def _say(http: "httpx.Client", request: dict[str, Any], messages: list[Message]) -> str:
    """Print the answer to `messages` as it comes, and return it."""
    whole = []
    for piece in _pieces(http, {**request, "messages": messages}):
        click.echo(plain(piece), nl=False)
        whole.append(piece)
    click.echo()
    return "".join(whole)


def _pieces(http: "httpx.Client", body: dict[str, Any]) -> Iterator[str]:
    import httpx

    from gpustack.client.failures import error_of
    from gpustack.lib import trust

    try:
        with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            if not answer.is_success:
                content, wait = answer.read(), answer.headers.get("retry-after")
                raise error_of(answer.status_code, content, wait)
            whole = False
            for row in answer.iter_lines():
                name, _, value = row.partition(":")
                if name == "data":
                    whole = value.strip() == "[DONE]"
                    yield from () if whole else _text(value)
    except httpx.HTTPError as error:
        why = trust.why(error, http.base_url.host)
        raise Unavailable(f"no answer from the server at {http.base_url}: {why}") from error
    if not whole:
        raise Unavailable("the answer broke off")


def _text(raw: str) -> Iterator[str]:
    from gpustack.client.failures import error_of

    try:
        event = json.loads(raw)
    except ValueError:
        raise Unavailable("the answer broke off") from None
    if not isinstance(event, dict):
        raise Unavailable("the server's answer is no event of a chat")
    if "error" in event:  # a stream that failed after it began
        raise error_of(500, raw.encode())
    for choice in event.get("choices", []):
        delta = choice.get("delta", {})
        if piece := delta.get("content") or delta.get("reasoning_content"):
            yield piece


@contextmanager
def _http(server: Connection) -> "Iterator[httpx.Client]":
    import httpx

    bearer = {"Authorization": f"Bearer {server.token.reveal()}"} if server.token else {}
    # A long prompt on a slow machine takes minutes until its first word.
    limits = httpx.Timeout(600, connect=10)
    with httpx.Client(
        base_url=server.url,
        headers=bearer,
        timeout=limits,
        trust_env=False,
        verify=server.tls() or False,
    ) as client:
        yield client
