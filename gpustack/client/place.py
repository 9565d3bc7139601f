"""How far a watch was heard: the one rule by which whoever follows this API resumes.

Imports nothing of ours and no HTTP, so that gateways, which bring their own, follow it too.
"""

#: Types of events whose cursor covers all that was sent before them.
_COVERING = frozenset({"synced", "heartbeat"})


class Place:
    """Where a watch stands, over all its connections.

    Attributes:
        cursor: what the next connection asks for as `since`; None: the whole list.
    """

    def __init__(self, since: str | None = None) -> None:
        self.cursor = since
        self._synced = False

    def connect(self) -> bool:
        """A connection begins. Whether it asks for the whole list."""
        self._synced = False
        return self.cursor is None

    def hear(self, type: str, cursor: str | None) -> None:
        """Take in one event of this connection.

        A cursor inside an unfinished list, or one of a change in a batch that is out of order,
        is no place to resume from: it would skip the rest.
        """
        if type == "resync":
            self.cursor, self._synced = None, False
        elif type == "synced":
            self._synced = True
        if self._synced and type in _COVERING and cursor is not None:
            self.cursor = cursor
