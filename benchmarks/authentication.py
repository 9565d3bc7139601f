"""What authentication adds to a request on the gateway's path.

    python -m benchmarks.authentication [--credentials 10000] [--rounds 1000]

Calls `Plane.identify`, `is_for` and `may_use`: all that happens between a head and
the choice of an instance because somebody may not ask, on the heads that well-known clients send.
The tables hold as many credentials as asked for, each request shows another; the model is granted
to a thousand users. Prints a Markdown table, with each figure as a multiple of what a hundred
additions take in the same round: that can be compared between machines.
"""

import argparse
import asyncio
import gc
import json
import random
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from gpustack.forward.exchange import Exchange, Link
from gpustack.forward.http1 import Headers
from gpustack.gateway.credentials import is_for, may_use
from gpustack.gateway.plane import Plane
from gpustack.gateway.tables import Tables
from gpustack.gateway.watch import Watch
from gpustack.lib.secrets import digest

LIMIT_US = 5.0
EACH = 100  # requests of a round: as few as are still in the processor's caches, as those just read
END = "2999-01-01T00:00:00Z"
MODEL = "org/model-7b-instruct"
#: What the OpenAI client for Python sends, less what carries the credential.
CLIENT: Headers = [
    (b"host", b"gpustack.example"),
    (b"accept-encoding", b"gzip, deflate"),
    (b"connection", b"keep-alive"),
    (b"accept", b"application/json"),
    (b"content-type", b"application/json"),
    (b"user-agent", b"OpenAI/Python 1.99.1"),
    (b"x-stainless-lang", b"python"),
    (b"x-stainless-package-version", b"1.99.1"),
    (b"x-stainless-os", b"Linux"),
    (b"x-stainless-arch", b"x64"),
    (b"x-stainless-runtime", b"CPython"),
    (b"x-stainless-runtime-version", b"3.11.7"),
    (b"x-stainless-async", b"false"),
    (b"x-stainless-retry-count", b"0"),
    (b"x-stainless-read-timeout", b"600"),
    (b"content-length", b"512"),
]
#: What a browser sends from a page of the same origin.
BROWSER: Headers = [
    (b"host", b"gpustack.example"),
    (b"user-agent", b"Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0"),
    (b"accept", b"*/*"),
    (b"accept-language", b"en-US,en;q=0.5"),
    (b"accept-encoding", b"gzip, deflate, br, zstd"),
    (b"content-type", b"application/json"),
    (b"content-length", b"512"),
    (b"origin", b"https://gpustack.example"),
    (b"sec-fetch-dest", b"empty"),
    (b"sec-fetch-mode", b"cors"),
    (b"sec-fetch-site", b"same-origin"),
]


def secret_of(number: int) -> str:
    return f"gpustack_{number:016x}_{number:032x}"


def credential(number: int, **more: Any) -> bytes:
    said = {"id": number, "kind": "key", "digest": digest(secret_of(number)), "user_id": 1}
    return json.dumps(said | {"scopes": ["*"]} | more).encode()


def filled(count: int) -> Tables:
    """Tables with that many credentials: a fourth each of four sorts, in turn."""
    tables = Tables()
    sorts: Sequence[Mapping[str, Any]] = (
        {"kind": "session", "expires_at": END},
        {},
        {"expires_at": END},
        {"scopes": ["inference"], "allowed_model_names": [MODEL, "other"], "expires_at": END},
    )
    for number in range(count):
        tables.put("credentials", credential(number, **sorts[number % 4]))
    granted = {"user_ids": list(range(1, 1001)), "group_ids": []}
    known = {"id": 1, "name": MODEL, "created_at": "2026-01-01T00:00:00Z", "granted_to": granted}
    tables.put("models", json.dumps(known).encode())
    return tables


def exchange(headers: Headers, peer: str = "192.0.2.7") -> Exchange:
    """A request that has just come: nobody has looked at the words of its head before."""
    parsed = [(bytes(bytearray(name)), bytes(bytearray(value))) for name, value in headers]
    return Exchange(
        cast(Link, None), method="POST", target=b"/v1/chat/completions", headers=parsed,
        peer=peer, http10=False,
    )  # fmt: skip


def cases(count: int) -> dict[str, list[Exchange]]:
    """Case -> requests, each with a credential of the sort of `filled` that the case needs."""

    def of(sort: int, make: Callable[[bytes], Headers]) -> list[Exchange]:
        # Whatever comes next, it is not what has just been looked up.
        chosen = [number - number % 4 + sort for number in random.sample(range(count - 3), EACH)]
        return [exchange(make(secret_of(number).encode())) for number in chosen]

    return {
        "Authorization: Bearer": of(1, lambda key: [*CLIENT, (b"authorization", b"Bearer " + key)]),
        "x-api-key": of(1, lambda key: [*CLIENT, (b"x-api-key", key)]),
        "api-key": of(1, lambda key: [*CLIENT, (b"api-key", key)]),
        "a key that ends": of(2, lambda key: [*CLIENT, (b"authorization", b"Bearer " + key)]),
        "a key for some models, that ends": of(
            3, lambda key: [*CLIENT, (b"authorization", b"Bearer " + key)]
        ),
        "a session's cookie": of(
            0, lambda key: [*BROWSER, (b"cookie", b"theme=dark; gpustack_session=" + key)]
        ),
        "none, on this machine": [
            exchange([(b"host", b"127.0.0.1:80"), *CLIENT[1:]], "127.0.0.1") for _ in range(EACH)
        ],
    }


def plane(tables: Tables) -> Plane:
    watch = cast(Watch, argparse.Namespace(tables=tables))
    nothing: Any = None
    return Plane(
        group=cast(asyncio.TaskGroup, None), pool=nothing, watch=watch, routing=nothing,
        ledger=nothing, server=("127.0.0.1", 1), credential="", tunnels=nothing,
        force_auth_localhost=False,
    )  # fmt: skip


def calibration() -> int:
    """As long as this machine takes for EACH hundred additions of Python."""
    total = 0
    for number in range(EACH * 100):
        total += number
    return total


def timed_us(action: Callable[[], object]) -> float:
    """Microseconds per request."""
    began = time.perf_counter()
    action()
    return (time.perf_counter() - began) / EACH * 1e6


def measure(count: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Case -> of each round: microseconds, and the multiple of the calibration next to it."""
    serving = plane(filled(count))
    model = serving.tables.by_name[MODEL]

    def identify(requests: Sequence[Exchange]) -> None:
        for request in requests:
            known = serving.identify(request)
            assert is_for(known, MODEL)
            assert may_use(known, model)

    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    gc.collect()
    gc.freeze()
    for _ in range(rounds):
        for name, requests in cases(count).items():
            unit = timed_us(calibration)
            taken = timed_us(lambda requests=requests: identify(requests))  # type: ignore[misc]
            found[name].append((taken, taken / unit))
    return found


def resident_bytes() -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.partition("VmRSS:")[2].split()[0]) * 1024


def grown_bytes(count: int) -> int:
    """What that many credentials in tables add to a process."""
    script = (
        "from benchmarks.authentication import filled, resident_bytes; import gc; filled(100); "
        f"gc.collect(); a = resident_bytes(); kept = filled({count}); gc.collect(); "
        "print(resident_bytes() - a)"
    )
    ran = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return int(ran.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--credentials", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=1000)
    given = parser.parse_args()
    print("| credential | µs, median | µs, min | in 100 additions, median | limit, µs |")
    print("|---|---|---|---|---|")
    for name, values in measure(given.credentials, given.rounds).items():
        taken = [one for one, _ in values]
        ratio = statistics.median(one for _, one in values)
        median = statistics.median(taken)
        print(f"| {name} | {median:.2f} | {min(taken):.2f} | {ratio:.2f} | {LIMIT_US} |")
    megabytes = grown_bytes(given.credentials) / 1e6
    print(f"\n{given.credentials} credentials take {megabytes:.1f} MB of each gateway process.")


if __name__ == "__main__":
    main()
