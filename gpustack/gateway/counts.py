"""How many requests each instance has under way, shared by the gateway processes of a node.

A memory-mapped file: one column of int32 per process, one slot per instance (its id modulo
65536; two instances that share a slot only look busier than they are). Each process writes its
own column alone, so no lock is needed.
"""

import mmap
import os
from array import array
from typing import Final

SLOTS: Final = 65536
_COLUMN_BYTES: Final = SLOTS * 4


class Counts:
    """Outstanding requests by instance."""

    def __init__(self, columns: memoryview, processes: int, index: int) -> None:
        self._columns = columns
        self._bases = tuple(range(0, processes * SLOTS, SLOTS))
        self._own = index * SLOTS

    @classmethod
    def shared(cls, fd: int, processes: int, index: int) -> "Counts":
        """The counts in the file `fd`; this process's column starts at zero."""
        size = processes * _COLUMN_BYTES
        if os.fstat(fd).st_size < size:
            os.ftruncate(fd, size)
        mapped = mmap.mmap(fd, size)
        mapped[index * _COLUMN_BYTES : (index + 1) * _COLUMN_BYTES] = bytes(_COLUMN_BYTES)
        return cls(memoryview(mapped).cast("i"), processes, index)

    @classmethod
    def private(cls) -> "Counts":
        """Counts of this process alone."""
        return cls(memoryview(array("i", bytes(_COLUMN_BYTES))), 1, 0)

    def add(self, instance_id: int, change: int) -> None:
        self._columns[self._own + instance_id % SLOTS] += change

    def total(self, instance_id: int) -> int:
        """Of all processes. A column being zeroed at a start may be read half done."""
        slot = instance_id % SLOTS
        columns = self._columns
        return sum([max(0, columns[base + slot]) for base in self._bases])
