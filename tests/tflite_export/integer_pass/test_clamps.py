"""RELU and RELU6 in integers: what is fused, what stands alone, and where 6 is out of reach."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from keras import layers as L

import kqat
import tflite_export
from kqat.base.errors import LoweringError
from kqat.freezing.frozen_model import FrozenModel
from tests.tflite_export.small_models import operators, quantized
from tflite_export import flatbuffer
from tflite_export.integer_pass.clamps import drop_vast_clamps, fuse_clamps
from tflite_export.integer_pass.draft import Draft
from tflite_export.integer_pass.pipeline import PASSES
from tflite_export.lowering.markers import Labels

KINDS = schema.ActivationFunctionType


def clamped(x: Any) -> Any:
    return L.Activation("relu6", name="six")(L.Dense(4)(x))


def test_the_last_scale_at_which_six_is_an_int32() -> None:
    """Kernels keep the clamp's end as an int32 on the output's grid, and refuse a larger one."""
    frozen = kqat.freeze(quantized((8,), clamped)[0])
    model = flatbuffer.read(tflite_export.convert(frozen))
    (operator,) = model.subgraphs[0].operators
    output, (site,) = int(operator.outputs[0]), [s for s in frozen.sites if s.name == "six"]
    first_too_fine = np.float32(6 / 2**31)
    for scale, kind in (
        (np.nextafter(first_too_fine, np.float32(1)), KINDS.RELU6),
        (first_too_fine, KINDS.RELU),
        (np.float32(1e-30), KINDS.RELU),
    ):
        operator.builtinOptions.fusedActivationFunction = KINDS.RELU6
        labels = Labels(sites={output: dataclasses.replace(site, scale=scale)})
        drop_vast_clamps(
            Draft(model, frozen, frozenset(), labels=labels, integer_operators=[operator])
        )
        assert operator.builtinOptions.fusedActivationFunction == kind, scale
    assert drop_vast_clamps in [step.run for step in PASSES]


def alone(top: float) -> FrozenModel:
    """A RELU6 behind an operator that cannot clamp, whose output's range ends at `top`."""

    def call(x: Any) -> Any:
        return L.Activation("relu6", name="six")(L.MaxPooling2D(name="pool")(x))

    frozen = kqat.freeze(quantized((8, 8, 3), call)[0])
    scale = np.float32(top / 255)
    changed = (
        dataclasses.replace(site, scale=scale, zero_point=-128) if site.name == "six" else site
        for site in frozen.sites
    )
    return dataclasses.replace(frozen, sites=tuple(changed))


# Half a step of 6 / 255 is 0.012.
@pytest.mark.parametrize("top", [3.0, 6.0, 6.01])
def test_a_range_that_ends_at_six_clamps_there(top: float) -> None:
    model = flatbuffer.read(tflite_export.convert(alone(top)))
    assert operators(model) == ["MAX_POOL_2D", "RELU"]


@pytest.mark.parametrize("top", [6.02, 12.0])
def test_a_range_beyond_six_is_refused(top: float) -> None:
    """RELU ships in the place of RELU6, and clamps to the range of its output alone."""
    with pytest.raises(LoweringError, match=r"ends at 6 behind RELU6\. Received: .* for 'six'"):
        tflite_export.convert(alone(top))


def test_a_clamp_that_a_pool_was_given_is_taken_out() -> None:
    """The converter fuses a ReLU into a pooling, whose kernel cannot change the scale.

    A second one behind it hands on what it reads, and is gone.
    """

    def call(x: Any) -> Any:
        y = L.ReLU(name="clamp")(L.AveragePooling2D(2, name="pool")(x))
        return L.MaxPooling2D(2, name="last")(L.ReLU(name="again")(L.Dropout(0.1)(y)))

    qat, x = quantized((8, 8, 3), call)
    blob = tflite_export.convert(qat)
    model = flatbuffer.read(blob)
    assert operators(model) == ["AVERAGE_POOL_2D", "RELU", "MAX_POOL_2D"]
    pool = model.subgraphs[0].operators[0]
    assert pool.builtinOptions.fusedActivationFunction == KINDS.NONE
    report = tflite_export.verify(qat, blob, x, runtimes=["litert_reference"])
    assert report.on("litert_reference").unmatched == ()


@pytest.mark.parametrize("reason", ["", "two readers", "an output", "marked between"])
def test_a_clamp_fuses_where_nothing_else_sees_the_value_before_it(reason: str) -> None:
    """One FULLY_CONNECTED, then a RELU on its own, in float."""
    frozen = kqat.freeze(quantized((8,), clamped)[0])
    model = flatbuffer.read(tflite_export.convert(frozen))
    graph, (dense,) = model.subgraphs[0], model.subgraphs[0].operators
    result, (site,) = int(dense.outputs[0]), [s for s in frozen.sites if s.name == "six"]
    dense.builtinOptions.fusedActivationFunction = KINDS.NONE
    between = flatbuffer.add_tensor(model, (1, 4), schema.TensorType.FLOAT32)
    dense.outputs = [between]
    graph.operators.append(flatbuffer.new_operator(model, "RELU", [between], [result]))
    labels = Labels(sites={int(dense.inputs[0]): site, result: site})
    if reason == "two readers":
        other = flatbuffer.add_tensor(model, (1, 4), schema.TensorType.FLOAT32)
        graph.operators.append(flatbuffer.new_operator(model, "TANH", [between], [other]))
    elif reason == "an output":
        graph.outputs = [*graph.outputs, between]
    elif reason:
        labels.sites[between] = site
    fuse_clamps(Draft(model, frozen, frozenset(), labels=labels))
    assert ("RELU" not in operators(model)) == (reason == "")
    fused = dense.builtinOptions.fusedActivationFunction
    assert fused == (KINDS.NONE if reason else KINDS.RELU)
    assert int(dense.outputs[0]) == (between if reason else result)
