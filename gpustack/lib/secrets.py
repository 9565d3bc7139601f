"""Random secrets, and the digests by which they are known."""

import hashlib
import hmac
import secrets as random_source


def new_secret() -> str:
    """128 random bits as 32 hex digits."""
    return random_source.token_hex(16)


def digest(secret: str) -> str:
    """SHA-256 of a secret, hex. Enough for secrets of 128 random bits; passwords need argon2."""
    return hashlib.sha256(secret.encode()).hexdigest()


def same(left: str, right: str) -> bool:
    """Whether two secrets are equal, in a time that tells nothing about them."""
    return hmac.compare_digest(left.encode(), right.encode())


class Secret(str):
    """Text that prints as stars, so that no log or error message can show it by accident."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'********'"

    def __str__(self) -> str:
        return "********"

    def __format__(self, spec: str) -> str:
        return "********"

    def reveal(self) -> str:
        return str.__str__(self)
