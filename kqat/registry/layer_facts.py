"""`LayerFacts`: the fields of a row that are needed after planning, saved with a QAT model."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from kqat.registry.rule import LayerRule, Output


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerFacts:
    """What training, freezing and export need to know of a planned layer.

    The fields have the same meaning as in `LayerRule`. Fields that only planning needs
    (decompositions, refusals, fusion) are left out. A QAT model saves the facts of each layer
    whose row a user registered. So a process that never registered the row can train, freeze and
    export the model.

    Args:
        output: where the scale of the output comes from.
        ops: the TFLite operators that the layer may become.
        channel_axes: name of each quantizable variable -> its channel axes (`None`: one scale).
        rounds: whether a same-scale layer computes new values, which are rounded again.
        clamps: whether it computes a clamp that TFLite has as a fused activation.
        table: whether it is an elementwise function that may ship as a lookup table.
        wide_table: whether it ships as a lookup table if activations have 16 bits.
        largest_input_scale: above this input scale the int8 kernel gives wrong results, and a
            lookup table ships instead.
        hides: whether it adds a mask's bias to attention scores.
        affine: whether it is `x * scale + offset`, one pair per channel.
        input_axis: the axis of its one weight that belongs to the channels of its input.
    """

    output: Output
    ops: tuple[str, ...] = ()
    channel_axes: Mapping[str, tuple[int, ...] | None] = dataclasses.field(default_factory=dict)
    rounds: bool = False
    clamps: bool = False
    table: bool = False
    wide_table: bool = False
    largest_input_scale: float = math.inf
    hides: bool = False
    affine: bool = False
    input_axis: int | None = None

    @classmethod
    def of(cls, rule: LayerRule) -> "LayerFacts":
        """The facts of a row."""
        return cls(
            output=rule.output,
            ops=tuple(rule.ops),
            channel_axes=dict(rule.weights),
            rounds=rule.rounds,
            clamps=rule.clamp is not None,
            table=rule.table,
            wide_table=rule.wide_table,
            largest_input_scale=rule.largest_input_scale,
            hides=rule.hides,
            affine=rule.affine,
            input_axis=rule.input_axis,
        )

    def ships_as_table(self, bits: int, input_scale: float) -> bool:
        """Whether the layer may ship as a lookup table.

        Args:
            bits: width of the integers that it reads.
            input_scale: their scale. Above `largest_input_scale` a table is needed.
        """
        beyond_kernel = bits == 8 and input_scale > self.largest_input_scale
        return self.is_table(bits) or beyond_kernel

    def is_table(self, bits: int) -> bool:
        """Whether the layer may ship as a lookup table for activations of `bits` bits."""
        return self.table or (self.wide_table and bits > 8)

    def keeps_integers(self) -> bool:
        """Whether the output holds the same integers as the input, only moved or picked."""
        return self.output is Output.SAME and not self.rounds

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types; `LayerFacts.from_dict` is the inverse."""
        largest = self.largest_input_scale
        axes = {name: None if a is None else list(a) for name, a in self.channel_axes.items()}
        return {
            **dataclasses.asdict(self),
            "output": self.output.name,
            "ops": list(self.ops),
            "channel_axes": axes,
            # JSON has no infinity.
            "largest_input_scale": None if math.isinf(largest) else largest,
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "LayerFacts":
        """The inverse of `to_dict`."""
        largest = fields["largest_input_scale"]
        axes = {name: None if a is None else tuple(a) for name, a in fields["channel_axes"].items()}
        return cls(
            **{
                **fields,
                "output": Output[fields["output"]],
                "ops": tuple(fields["ops"]),
                "channel_axes": axes,
                "largest_input_scale": math.inf if largest is None else largest,
            }
        )
