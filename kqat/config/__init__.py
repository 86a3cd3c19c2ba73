"""What the user asks for: `QuantizeConfig`, `QuantizePolicy` and presets."""

from kqat.config.layer_config import (
    PRESETS,
    QuantizeConfig,
    QuantizePolicy,
    RecurrenceForm,
    is_foreign_config,
    resolve_config,
)

__all__ = [
    "PRESETS",
    "QuantizeConfig",
    "QuantizePolicy",
    "RecurrenceForm",
    "is_foreign_config",
    "resolve_config",
]
