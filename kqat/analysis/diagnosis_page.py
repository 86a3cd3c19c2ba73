"""A diagnosis as one self-contained HTML page."""

from typing import Any

import jinja2

from kqat.base import decimal


def render(diagnosis: Any) -> str:
    """The HTML page of a `Diagnosis`."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kqat.analysis"),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("diagnosis.html.j2")
    most = max((layer.share for layer in diagnosis.layers), default=0.0) or 1.0
    return page.render(diagnosis=diagnosis, most=most, decimal=decimal) + "\n"
