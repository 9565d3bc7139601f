"""Which gateway process a tunnel ends in, as the handshake says it."""

from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class Process:
    """One gateway process.

    Attributes:
        node: the server's node that it is of; the same in all its lives.
        life: no other process, before or after, has the same.
        index: among its node's gateway processes, from 0.
        count: of the gateway processes of its node.
    """

    node: str
    life: str
    index: int
    count: int

    def header(self) -> bytes:
        return f"{self.node} {self.life} {self.index} {self.count}".encode()

    @classmethod
    def parse(cls, header: bytes) -> Self:
        """The process that `header` names.

        Raises:
            ValueError: it names none.
        """
        node, life, index, count = header.decode("ascii").split(" ")
        found = cls(node, life, int(index), int(count))
        if not 0 <= found.index < found.count <= 1024:
            raise ValueError("no such process")
        return found
