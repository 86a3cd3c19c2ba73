"""`TextEnum`: an enumeration whose members print, compare and save as plain strings."""

import enum


class TextEnum(enum.StrEnum):
    """An enumeration of strings; `repr` shows the string only, and JSON holds it as a string."""

    def __repr__(self) -> str:
        return repr(self.value)
