"""Passwords: the only secrets with few random bits, so the only ones that need a slow hash."""

import asyncio
import re
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from gpustack.errors import Invalid, TooMany

T = TypeVar("T")

_hasher = PasswordHasher()
#: One at a time: each takes 64 MiB and a core for a moment, and strangers can ask for it.
_one = ThreadPoolExecutor(max_workers=1, thread_name_prefix="passwords")
QUEUE_LIMIT = 10
_waiting: set[asyncio.Future[Any]] = set()


async def _in_turn(work: Callable[[], T]) -> T:
    """What `work` answers, once those before it are done.

    Raises:
        TooMany: QUEUE_LIMIT others wait already.
    """
    if len(_waiting) >= QUEUE_LIMIT:
        raise TooMany("too many logins at once: try again in a moment", retry_after_s=2)
    future = asyncio.get_running_loop().run_in_executor(_one, work)
    _waiting.add(future)
    future.add_done_callback(_waiting.discard)
    return await future


@cache
def _nobodys_hash() -> str:
    """Verified when there is no such user, so that the time of a refusal tells nothing."""
    return hash_now(secrets.token_hex(16))


def hash_now(password: str) -> str:
    """Blocks for some 50 ms; for use before serving."""
    return _hasher.hash(password)


async def hash_password(password: str) -> str:
    return await _in_turn(lambda: hash_now(password))


async def matches(password: str, password_hash: str | None) -> bool:
    """Whether `password` is the one behind `password_hash`; takes as long for None (no user)."""

    def verify() -> bool:
        return _hasher.verify(password_hash or _nobodys_hash(), password)

    try:
        right = await _in_turn(verify)
    except (VerificationError, InvalidHashError):
        return False
    return right and password_hash is not None


def check_policy(password: str) -> None:
    """Raises:
    Invalid: the password is too easy; the message says what it lacks.
    """
    rules = {
        "8 characters or more": len(password) >= 8,
        "128 characters at most": len(password) <= 128,
        "an upper-case letter": re.search(r"[A-Z]", password),
        "a lower-case letter": re.search(r"[a-z]", password),
        "a digit": re.search(r"[0-9]", password),
        "a special character": re.search(r"[^A-Za-z0-9\s]", password),
    }
    lacking = [rule for rule, held in rules.items() if not held]
    if lacking:
        raise Invalid(f"the new password needs {', '.join(lacking)}")
