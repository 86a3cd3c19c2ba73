"""Keras model to flat graph and back. This sub-package alone knows Keras's internals
(`keras_internals`).
"""

from kqat.graph.copies import Part, activation_name, clone, config_of, duplicate, finalize
from kqat.graph.input_shapes import fits, has_open_sizes, input_shapes, with_input_shapes
from kqat.graph.keras_internals import (
    FUNCTIONAL_MODULE,
    attach_masks,
    bearing,
    borne_mask,
    call_signature,
    depth_to_space,
    frozen_function,
    layer_behind,
    maker_of,
    operations_between,
    option,
    parts_of,
    space_to_depth,
    takes_masks_off,
    unmasked,
    values_between,
    with_masks,
)
from kqat.graph.sharing import check_apart
from kqat.graph.tensorflow_calls import tensorflow_traced
from kqat.graph.tracer import (
    Graph,
    Node,
    Ref,
    fill,
    non_finite_variable,
    rebuild,
    refs_in,
    trace,
    trace_call,
    unique_name,
)
from kqat.graph.values import holds_indexes, is_tensor

__all__ = [
    "FUNCTIONAL_MODULE",
    "Graph",
    "Node",
    "Part",
    "Ref",
    "activation_name",
    "attach_masks",
    "bearing",
    "borne_mask",
    "call_signature",
    "check_apart",
    "clone",
    "config_of",
    "depth_to_space",
    "duplicate",
    "fill",
    "finalize",
    "fits",
    "frozen_function",
    "has_open_sizes",
    "holds_indexes",
    "input_shapes",
    "is_tensor",
    "layer_behind",
    "maker_of",
    "non_finite_variable",
    "operations_between",
    "option",
    "parts_of",
    "rebuild",
    "refs_in",
    "space_to_depth",
    "takes_masks_off",
    "tensorflow_traced",
    "trace",
    "trace_call",
    "unique_name",
    "unmasked",
    "values_between",
    "with_input_shapes",
    "with_masks",
]
