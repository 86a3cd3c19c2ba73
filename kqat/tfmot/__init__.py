"""Translates tfmot's `QuantizeConfig` objects into `kqat.QuantizeConfig`."""

from kqat.tfmot.translation import translate_policy

__all__ = [
    "translate_policy",
]
