"""The integer pass: marked float flatbuffer to full-integer flatbuffer, in the order of `PASSES`.

Nothing is measured or guessed here: scales and zero points are those of the frozen model's sites,
integer weights those that training used.
"""

from kqat.devices import RUNTIMES
from kqat.freezing import FrozenModel
from tflite_export.flatbuffer import ModelT
from tflite_export.integer_pass.carry_reshapes import carry_reshapes
from tflite_export.integer_pass.clamps import (
    drop_idle_clamps,
    drop_vast_clamps,
    fuse_clamps,
    split_clamps,
)
from tflite_export.integer_pass.comparisons import compare_integers
from tflite_export.integer_pass.constants import pack_weights, quantize_constants
from tflite_export.integer_pass.dense_as_conv import convolve_dense
from tflite_export.integer_pass.draft import Draft, Fact, Pass
from tflite_export.integer_pass.drop_reshapes import drop_flattening, join_reshapes, keep_axes
from tflite_export.integer_pass.equal_operators import join_equals
from tflite_export.integer_pass.fused_lstm import insert_lstms
from tflite_export.integer_pass.leaky_relu import multiply_slopes
from tflite_export.integer_pass.operators import check_operators, set_codes
from tflite_export.integer_pass.own_differences import part_own_differences
from tflite_export.integer_pass.row_means import multiply_rows
from tflite_export.integer_pass.same_padding import join_padding
from tflite_export.integer_pass.shared_products import split_shared_products
from tflite_export.integer_pass.tables import insert_tables
from tflite_export.integer_pass.tensor_grids import (
    convert_tensors,
    find_float_islands,
    part_merged_values,
    read_markers,
    spread_grids,
)
from tflite_export.integer_pass.tensor_names import name_tensors
from tflite_export.integer_pass.whole_layers import make_layers_whole

# What is true of a marked float file, and what must be true of an integer file.
START = frozenset({Fact.MARKERS, Fact.FLOAT_TENSORS})
GOAL = frozenset(Fact) - START

PASSES: tuple[Pass, ...] = (
    Pass(
        read_markers,
        needs={Fact.MARKERS},
        leaves={Fact.LABELS},
        ends={Fact.MARKERS},
    ),
    Pass(split_shared_products, needs={Fact.LABELS}, leaves={Fact.OWN_PRODUCTS}),
    Pass(
        make_layers_whole,
        needs={Fact.LABELS, Fact.OWN_PRODUCTS, Fact.FLOAT_TENSORS},
        leaves={Fact.WHOLE_LAYERS},
    ),
    # A clamp of an ADD that joins a bias is one of the bias's operator.
    Pass(fuse_clamps, needs={Fact.LABELS, Fact.WHOLE_LAYERS}, leaves={Fact.CLAMPS_INSIDE}),
    # Behind the one above, which looks for a clamp that stands alone.
    Pass(
        split_clamps,
        needs={Fact.LABELS, Fact.CLAMPS_INSIDE},
        leaves={Fact.CLAMPS_OUTSIDE},
    ),
    Pass(
        spread_grids,
        needs={Fact.LABELS, Fact.CLAMPS_INSIDE, Fact.CLAMPS_OUTSIDE, Fact.FLOAT_TENSORS},
        leaves={Fact.GRIDS},
    ),
    Pass(
        part_merged_values,
        needs={Fact.LABELS, Fact.GRIDS, Fact.FLOAT_TENSORS},
        leaves={Fact.OWN_GRIDS},
    ),
    Pass(
        find_float_islands,
        needs={Fact.LABELS, Fact.CLAMPS_INSIDE, Fact.CLAMPS_OUTSIDE, Fact.FLOAT_TENSORS},
        leaves={Fact.FLOAT_ISLANDS},
    ),
    Pass(
        compare_integers,
        needs={Fact.GRIDS, Fact.OWN_GRIDS, Fact.FLOAT_ISLANDS, Fact.FLOAT_TENSORS},
        leaves={Fact.COMPARISONS},
    ),
    Pass(
        part_own_differences,
        needs={Fact.GRIDS, Fact.OWN_GRIDS, Fact.FLOAT_ISLANDS, Fact.FLOAT_TENSORS},
        leaves={Fact.OWN_DIFFERENCES},
    ),
    Pass(
        check_operators,
        needs={Fact.COMPARISONS, Fact.OWN_DIFFERENCES, Fact.FLOAT_TENSORS},
        leaves={Fact.CHECKED},
    ),
    Pass(
        quantize_constants,
        needs={Fact.CHECKED, Fact.FLOAT_ISLANDS, Fact.FLOAT_TENSORS},
        leaves={Fact.CONSTANTS},
    ),
    Pass(pack_weights, needs={Fact.CONSTANTS}, leaves={Fact.PACKED}),
    Pass(
        drop_vast_clamps,
        needs={Fact.CHECKED, Fact.CLAMPS_INSIDE},
        leaves={Fact.CLAMPS_IN_INT32},
    ),
    # The version depends on the type of the weights.
    Pass(set_codes, needs={Fact.FLOAT_ISLANDS, Fact.PACKED}, leaves={Fact.CODES}),
    # Behind the passes that read the weights of a PRELU from the frozen model.
    Pass(
        multiply_slopes,
        needs={Fact.CODES, Fact.CONSTANTS, Fact.GRIDS, Fact.FLOAT_ISLANDS},
        leaves={Fact.SLOPES},
    ),
    Pass(
        multiply_rows,
        needs={Fact.CODES, Fact.CONSTANTS, Fact.GRIDS, Fact.FLOAT_ISLANDS},
        leaves={Fact.ROWS},
    ),
    Pass(insert_tables, needs={Fact.LABELS, Fact.FLOAT_ISLANDS}, leaves={Fact.TABLES}),
    # Only the sequence is an input up to here; those that are left out have no type.
    Pass(insert_lstms, needs={Fact.LABELS, Fact.CHECKED, Fact.CODES}, leaves={Fact.LSTMS}),
    Pass(
        convert_tensors,
        needs={Fact.GRIDS},
        leaves={Fact.INTEGER_TENSORS},
        ends={Fact.FLOAT_TENSORS},
    ),
    Pass(name_tensors, needs={Fact.LABELS}, leaves={Fact.NAMES}),
    Pass(
        drop_idle_clamps,
        needs={Fact.NAMES, Fact.CODES, Fact.INTEGER_TENSORS},
        leaves={Fact.CLAMPS_AT_WORK},
    ),
    Pass(drop_flattening, needs={Fact.NAMES}, leaves={Fact.NO_FLATTENING}),
    Pass(keep_axes, needs={Fact.NO_FLATTENING}, leaves={Fact.KEPT_AXES}),
    # Behind the two that look for a RESHAPE beside FULLY_CONNECTED.
    Pass(join_reshapes, needs={Fact.KEPT_AXES}, leaves={Fact.JOINED_RESHAPES}),
    # The parts of a table compute number by number, too.
    Pass(
        carry_reshapes,
        needs={Fact.JOINED_RESHAPES, Fact.TABLES, Fact.INTEGER_TENSORS},
        leaves={Fact.CARRIED_RESHAPES},
    ),
    Pass(
        join_padding,
        needs={Fact.NAMES, Fact.PACKED, Fact.INTEGER_TENSORS},
        leaves={Fact.PADDING_INSIDE},
    ),
    # It adds RESHAPEs without names, and tensors of the types and grids of those around them.
    Pass(
        convolve_dense,
        needs={Fact.PACKED, Fact.CODES, Fact.INTEGER_TENSORS, Fact.NAMES, Fact.KEPT_AXES},
        leaves={Fact.DENSE_PACKED},
    ),
    # Behind the passes that make operators, and those that look for what only one operator reads.
    Pass(
        join_equals,
        needs={
            Fact.DENSE_PACKED,
            Fact.CARRIED_RESHAPES,
            Fact.PADDING_INSIDE,
            Fact.TABLES,
            Fact.CLAMPS_AT_WORK,
        },
        leaves={Fact.NO_EQUALS},
    ),
)


def quantize(
    marked: ModelT,
    frozen: FrozenModel,
    runtimes: frozenset[str] = RUNTIMES,
    whole_bytes: frozenset[tuple[str, int]] = frozenset(),
) -> ModelT:
    """The integer model of a marked float one, which is consumed.

    Tensors bear the names of their sites.

    Args:
        marked: from `lowering.lower`.
        frozen: what it was lowered from.
        runtimes: those that must run it. Weights of four bits or fewer are packed two a byte
            where all of them have the kernel, and stored as int8 where one does not.
        whole_bytes: pairs of an operator and a width of activations whose weights are stored as
            int8 in any case.

    Raises:
        LoweringError: if an operator is not in `OP_TABLE`, a tensor that an integer operator
            reads or writes was not marked, or weights are not those of the frozen model.
    """
    draft = Draft(marked, frozen, runtimes, whole_bytes)
    for step in PASSES:
        step.run(draft)
    return draft.model
