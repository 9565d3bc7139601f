"""Settings as the API shows them."""

from typing import Any

from gpustack.schemas.base import Schema


class Setting(Schema):
    """One start option of the server's node, as it is in effect.

    Attributes:
        value: None where it is hidden, or nothing.
        hidden: it is a secret.
        hot: a running node takes a new value in: see `gpustack reload-config`.
    """

    key: str
    value: Any = None
    hidden: bool
    hot: bool
    group: str
    meaning: str
