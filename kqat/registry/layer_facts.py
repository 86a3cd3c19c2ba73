"""`LayerFacts`: what of a row is needed after planning, as data that a saved model can carry."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from kqat.registry.rule import LayerRule, Output


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerFacts:
    """What training, freezing and the exporter ask of a layer that was planned.

    The fields mean what they mean in `LayerRule`; what only planning needs (decompositions,
    refusals, fusion) is left out. A QAT model saves the facts of each layer whose row a user
    registered, so that a process which never registered it can train, freeze and export it.

    Args:
        output: how the scale of the output comes about.
        ops: the TFLite operators that the layer may become.
        channel_axes: name of each quantizable variable -> its channel axes (`None`: one scale).
        rounds: whether a same-scale layer computes new values, which are rounded again.
        clamps: whether it clamps as a fused activation does.
        table: whether it is an elementwise function that may ship as a lookup table.
        wide_table: whether it ships as one where activations have 16 bits.
        largest_input_scale: beyond it the int8 kernel is wrong, and a lookup table ships.
        hides: whether it adds a mask's bias to attention scores.
        affine: whether it is `x * scale + offset`, one pair per channel.
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
        )

    def ships_as_table(self, bits: int, input_scale: float) -> bool:
        """Whether a lookup table may stand for the layer.

        Args:
            bits: width of the integers that it reads.
            input_scale: their scale; the operator's own int8 kernel may be wrong on a coarse one.
        """
        beyond_kernel = bits == 8 and input_scale > self.largest_input_scale
        return self.is_table(bits) or beyond_kernel

    def is_table(self, bits: int) -> bool:
        """Whether the layer may ship as a table where activations have `bits` bits."""
        return self.table or (self.wide_table and bits > 8)

    def keeps_integers(self) -> bool:
        """Whether the output holds the very integers of the input."""
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
        """The facts of `to_dict`."""
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
