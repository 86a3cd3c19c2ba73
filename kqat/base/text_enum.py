"""Enumerations whose members are plain strings wherever they are printed, compared or saved."""

import enum


class TextEnum(enum.StrEnum):
    """An enumeration of words: `repr` shows the word alone, JSON holds it as a string."""

    def __repr__(self) -> str:
        return repr(self.value)
