"""Users and how they log in."""

from enum import StrEnum
from typing import Annotated

from pydantic import AfterValidator, Field

from gpustack.schemas.base import Body, Schema, Time

USERNAME_LENGTH = 128


def _is_name(username: str) -> str:
    """Shown as it is, and part of what is split at colons and slashes."""
    if not username.isprintable() or any(letter.isspace() or letter in ":/" for letter in username):
        raise ValueError("want letters, digits and signs without spaces, colons and slashes")
    return username


Username = Annotated[
    str,
    Field(
        min_length=1, max_length=USERNAME_LENGTH, json_schema_extra={"pattern": r"^[^\s:/]{1,128}$"}
    ),
    AfterValidator(_is_name),
]
FullName = Annotated[str | None, Field(max_length=128)]


class Source(StrEnum):
    """Where a user comes from."""

    LOCAL = "local"  # made here, with a password
    OIDC = "oidc"  # from an identity provider, at the first login
    SAML = "saml"


class User(Schema):
    """A user as the API shows it.

    Attributes:
        avatar_url, source: never said by a user or an administrator.
        is_active: False: it is disabled, and can do nothing.
        require_password_change: nothing else can be done with the next login before that.
        generation: of all of it and of the password; an update may name it.
    """

    id: int
    username: str
    full_name: str | None = None
    avatar_url: str | None = None
    source: Source
    is_admin: bool
    is_active: bool
    require_password_change: bool
    generation: int
    created_at: Time


class UserCreate(Body):
    """Body of POST /v2/users.

    Attributes:
        password: None: one is made, which must be changed at the first login.
    """

    username: Username
    full_name: FullName = None
    is_admin: bool = False
    password: str | None = None
    require_password_change: bool = False


class UserCreated(User):
    """The one time that a generated password is shown; None: the one that was given holds."""

    password: str | None


class UserUpdate(Body):
    """Body of PUT /v2/users/{id}.

    Attributes:
        password: a new one; the user's sessions end. None: it stays.
        is_active: False: sessions end, and API keys open nothing until it is True again. None: it
            stays.
        require_password_change: None: it stays.
        generation: the generation that was read; a newer one is a conflict. None: do not compare.
    """

    username: Username
    full_name: FullName = None
    is_admin: bool
    is_active: bool | None = None
    password: str | None = None
    require_password_change: bool | None = None
    generation: int | None = None


class MeUpdate(Body):
    """What users may change of themselves: nothing that grants anything.

    Attributes:
        generation: the generation that was read; a newer one is a conflict. None: do not compare.
    """

    full_name: FullName = None
    generation: int | None = None


class PasswordReset(Body):
    """What an administrator says of another's password; None: make one."""

    password: str | None = None


class PasswordSet(Schema):
    """The one time that a generated password is shown; None: the one that was given holds."""

    password: str | None


class AuthConfig(Schema):
    """The ways in, as a login page shows them; nothing about who may take them.

    Attributes:
        is_local: with a user name and a password.
        first_time_setup: the first administrator has not chosen a password yet; the generated one
            is in <data-dir>/initial_admin_password on the server's machine.
    """

    is_local: bool
    is_oidc: bool
    is_saml: bool
    first_time_setup: bool


class LoggedOut(Schema):
    """Where the browser goes to end the identity provider's session too, and comes back from."""

    logout_url: str


class PasswordUpdate(Body):
    current_password: str
    new_password: str
