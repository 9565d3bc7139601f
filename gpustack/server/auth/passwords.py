"""Passwords: the only secrets with few random bits, so the only ones that need a slow hash."""

import re
import secrets
from functools import cache

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from gpustack.errors import Invalid
from gpustack.server.auth.in_turn import InTurn

_hasher = PasswordHasher()
#: Each hash takes 64 MiB and a core for a moment.
_in_turn = InTurn("passwords")


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
