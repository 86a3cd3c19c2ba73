"""**The table**: one row for each Keras layer (`layer_table`) and `keras.ops` function
(`operation_table`), and the reasons why the others are refused (`refusals`).
"""

from kqat.registry.layer_facts import LayerFacts
from kqat.registry.layer_table import (
    ACTIVATIONS,
    LAYERS,
    is_custom,
    register_layer,
    registered_rule,
    row_of_class,
    rule_for,
    stock_facts,
    supported_layers,
)
from kqat.registry.operation_table import FUNCTIONS, NETWORKS, OPERATIONS, REDUCING, as_layers
from kqat.registry.refusals import LAYER_REASONS, OPERATION_REASONS
from kqat.registry.rule import LayerRule, Output, Resolution, channel_axes

__all__ = [
    "ACTIVATIONS",
    "FUNCTIONS",
    "LAYERS",
    "LAYER_REASONS",
    "NETWORKS",
    "OPERATIONS",
    "OPERATION_REASONS",
    "REDUCING",
    "LayerFacts",
    "LayerRule",
    "Output",
    "Resolution",
    "as_layers",
    "channel_axes",
    "is_custom",
    "register_layer",
    "registered_rule",
    "row_of_class",
    "rule_for",
    "stock_facts",
    "supported_layers",
]
