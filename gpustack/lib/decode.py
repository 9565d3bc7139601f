"""What reading JSON that others wrote can raise."""

from typing import Final

import msgspec

#: msgspec's own error is no ValueError; bytes that are not UTF-8 are one, and nesting of a
#: thousand levels ends the interpreter's patience.
UNREADABLE: Final = (msgspec.DecodeError, ValueError, RecursionError)
