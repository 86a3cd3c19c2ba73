"""`TextEnum`: an enumeration whose members print, compare and save as plain strings."""

import enum


class TextEnum(str, enum.Enum):
    """An enumeration of strings; `repr` shows the string only, and JSON holds it as a string.

    Python's own `StrEnum` came with 3.11.
    """

    def __str__(self) -> str:
        return str(self.value)

    def __format__(self, spec: str) -> str:
        return format(str(self.value), spec)

    def __repr__(self) -> str:
        return repr(self.value)
