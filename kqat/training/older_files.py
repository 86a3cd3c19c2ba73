"""Configs of QAT layers as older releases saved them, brought up to date when they are loaded."""

from typing import Any


def with_label(config: dict[str, Any], *, prefix: str = "", suffix: str = "") -> dict[str, Any]:
    """`config` with the field `label`, which older releases left to the layer's name to tell.

    They named a layer after what it stood for, with this prefix and suffix around that name.
    """
    if "label" in config:
        return config
    return {**config, "label": config["name"].removeprefix(prefix).removesuffix(suffix)}
