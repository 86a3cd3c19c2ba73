"""tfmot's `QuantizeConfig` objects, translated into ours."""

from kqat.tfmot.translation import translate_policy

__all__ = [
    "translate_policy",
]
