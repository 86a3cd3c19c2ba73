"""Hook of MkDocs: formulae between dollar signs become MathML, which browsers draw by themselves.

`$$ … $$` on lines of its own is a formula for itself, `$…$` one in a sentence. Code is left alone.
"""

import re
from typing import Any

from latex2mathml.converter import convert

# Code first, so that a dollar sign in it is not taken for a formula's.
_PARTS = re.compile(
    r"(?P<code>^```.*?^```|<!--.*?-->|`[^`\n]+`)|^\$\$\n(?P<block>.*?)\n\$\$|\$(?P<inline>[^$\n]+)\$",
    re.DOTALL | re.MULTILINE,
)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A page with its formulae as MathML."""
    return _PARTS.sub(_drawn, markdown)


def _drawn(match: re.Match[str]) -> str:
    if match["block"]:
        return str(convert(match["block"], display="block"))
    if match["inline"]:
        # At the beginning of a line Markdown would take <math> for a block of its own.
        return f"<span>{convert(match['inline'])}</span>"
    return match[0]
