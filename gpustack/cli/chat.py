"""`gpustack chat`: talk to a model, in one breath or in turns."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from gpustack.cli.connection import Connection, connected
from gpustack.errors import GPUStackError, Unavailable

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
    while (line := _line()) is not None:
        if line == r"\q":
            return
        if line == r"\c":
            said.clear()
        elif line.startswith("\\"):
            click.echo(HELP, err=True)
        elif line:
            asked: Message = {"role": "user", "content": line}
            try:
                answer = _say(http, request, [*said, asked])
            except GPUStackError as error:
                click.echo(f"Error: {error}", err=True)
            else:
                said += [asked, {"role": "assistant", "content": answer}]


def _line() -> str | None:
    """The next line typed; None at the end of input."""
    try:
        return input(">>> ").strip()
    except EOFError:
        click.echo(err=True)
        return None


def _say(http: "httpx.Client", request: dict[str, Any], messages: list[Message]) -> str:
    """Print the answer to `messages` as it comes, and return it."""
    whole = []
    for piece in _pieces(http, {**request, "messages": messages}):
        click.echo(piece, nl=False)
        whole.append(piece)
    click.echo()
    return "".join(whole)


def _pieces(http: "httpx.Client", body: dict[str, Any]) -> Iterator[str]:
    import httpx

    from gpustack.client.failures import error_of

    try:
        with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            if not answer.is_success:
                content, wait = answer.read(), answer.headers.get("retry-after")
                raise error_of(answer.status_code, content, wait)
            for line in answer.iter_lines():
                name, _, value = line.partition(":")
                if name == "data" and value.strip() != "[DONE]":
                    yield from _text(json.loads(value), value)
    except httpx.HTTPError as error:
        why = str(error) or type(error).__name__
        raise Unavailable(f"no answer from the server at {http.base_url}: {why}") from error


def _text(event: dict[str, Any], raw: str) -> Iterator[str]:
    from gpustack.client.failures import error_of

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
        base_url=server.url, headers=bearer, timeout=limits, trust_env=False
    ) as client:
        yield client
