"""String enumerations: what Python 3.11's StrEnum does, on Python 3.10 too."""

import json

from kqat.base import TextEnum


class Side(TextEnum):
    LEFT = "left"


def test_a_member_is_its_string() -> None:
    assert Side.LEFT == "left" and str(Side.LEFT) == "left" and repr(Side.LEFT) == "'left'"
    assert f"{Side.LEFT:>6}" == "  left" and f"{Side.LEFT}" == "left"
    assert json.dumps({Side.LEFT: Side.LEFT}) == '{"left": "left"}'
    assert Side("left") is Side.LEFT
