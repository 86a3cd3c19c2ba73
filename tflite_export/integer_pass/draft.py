"""What flows through the integer pass: a draft of the file and what was found out about it.

A pass is one step of `pipeline.PASSES`. It says which facts about the draft it needs, which it
leaves true, and which hold no longer once it has run.
"""

import dataclasses
import enum
import functools
from collections.abc import Callable, Set

from ai_edge_litert import schema_py_generated as schema

from kqat.base import LoweringError
from kqat.freezing import FrozenModel
from kqat.grids import Site
from tflite_export import flatbuffer
from tflite_export.flatbuffer import ModelT, OperatorT, SubGraphT
from tflite_export.kernels import OP_TABLE, OpRule, Weights
from tflite_export.lowering import Labels


class Fact(enum.Enum):
    """What may be true of a draft; the value says it in a sentence."""

    MARKERS = "a QUANTIZE and a DEQUANTIZE stand behind each tensor that training quantized"
    FLOAT_TENSORS = "every quantity is float32, which tells it from an index or a truth value"
    LABELS = "tensors that a marker stood on have their site; the markers are gone"
    OWN_PRODUCTS = "layers with equal weights that read one value have an operator each"
    WHOLE_LAYERS = "the operators that the converter made of one layer are one operator again"
    CLAMPS_INSIDE = "a RELU or RELU6 whose input was not marked is an option of its producer"
    CLAMPS_OUTSIDE = "no operator clamps that hands its input's grid on"
    CLAMPS_IN_INT32 = "the 6 of every fused RELU6 is an int32 on its output's grid"
    GRIDS = "every tensor that a same-scale operator reads or writes has the grid of the others"
    OWN_GRIDS = "layers with equal weights that read one value have a grid each behind it"
    FLOAT_ISLANDS = "the operators that compute on integers are told from those on floats"
    COMPARISONS = "comparisons that no int8 kernel makes aright are of int32"
    OWN_DIFFERENCES = "a value less itself is on a grid that the kernel of SUB computes"
    CHECKED = "integer operators have the grids that their kernels demand"
    CONSTANTS = "integer operators read integer weights, biases and other constants"
    PACKED = "weights of few bits are in whole bytes where all the runtimes read them so"
    CODES = "integer operators have the code and the version of the integer kernel"
    SLOPES = "an int8 LEAKY_RELU that TFLite Micro must run is a PRELU of one slope"
    ROWS = "an int8 MEAN of rows that kernels round twice is a FULLY_CONNECTED of equal weights"
    TABLES = "a lookup stands where a function ships as a table"
    LSTMS = "UNIDIRECTIONAL_SEQUENCE_LSTM has its 24 inputs"
    INTEGER_TENSORS = "tensors with a site have its type, scale and zero point"
    NAMES = "tensors bear the names of their sites"
    CLAMPS_AT_WORK = "no RELU hands on every integer of its input's grid"
    NO_FLATTENING = "no RESHAPE only flattens for FULLY_CONNECTED, which does that itself"
    KEPT_AXES = "no RESHAPE only gives FULLY_CONNECTED's rows the input's axes back"
    JOINED_RESHAPES = "no RESHAPE reads what another one writes"
    CARRIED_RESHAPES = "no RESHAPE stands before what can compute as well on what it reads"
    PADDING_INSIDE = "no PAD stands before convolutions that can pad so themselves"
    DENSE_PACKED = "4-bit matrices that only CONV_2D reads packed are those of a CONV_2D"
    NO_EQUALS = "no operator computes again what another one computes of the same tensors"


@dataclasses.dataclass
class Draft:
    """A model between the marked float file and the integer file; passes change it in place.

    Attributes:
        model: the flatbuffer's tree.
        frozen: the model that it was lowered from.
        runtimes: those that must run the file.
        whole_bytes: the operators, by width of their activations, whose weights are not packed.
        labels: which tensors are sites and which are floats, and where placeholders stand.
        integer_operators: those that compute on integers and are no placeholders.
        weights: the weights that `quantize_constants` wrote, each with its reader.
        unpacked: the FULLY_CONNECTED whose weights of four bits only CONV_2D takes packed.
    """

    model: ModelT
    frozen: FrozenModel
    runtimes: frozenset[str]
    whole_bytes: frozenset[tuple[str, int]] = frozenset()
    labels: Labels = dataclasses.field(default_factory=Labels)
    integer_operators: list[OperatorT] = dataclasses.field(default_factory=list)
    weights: list[tuple[OperatorT, Weights]] = dataclasses.field(default_factory=list)
    unpacked: list[OperatorT] = dataclasses.field(default_factory=list)

    @property
    def graph(self) -> SubGraphT:
        """Subgraph 0, which holds the whole network."""
        return self.model.subgraphs[0]

    @property
    def sites(self) -> dict[int, Site]:
        """Tensor -> its grid."""
        return self.labels.sites

    def op_name(self, operator: OperatorT) -> str:
        """The schema's name of an operator."""
        return flatbuffer.op_name(self.model, operator)

    def tensor_name(self, tensor: int) -> str:
        """The name of a tensor."""
        return flatbuffer.tensor_name(self.graph.tensors[tensor])

    @functools.cached_property
    def site_names(self) -> frozenset[str]:
        """The names of all sites that tensors have; of use once the markers are gone."""
        return frozenset(site.name for sites in self.labels.named.values() for site in sites)

    def hand_name_on(self, dropped: int, source: int) -> None:
        """Names `source` after the site of the tensor that it stands in for, if it has none."""
        name = self.tensor_name(dropped)
        if name in self.site_names and self.tensor_name(source) not in self.site_names:
            self.graph.tensors[source].name = name.encode()

    def rule(self, operator: OperatorT) -> OpRule:
        """The operator's row of the op table.

        Raises:
            LoweringError: if it has none.
        """
        name = self.op_name(operator)
        if name not in OP_TABLE:
            raise LoweringError(
                f"Expected operators of the op table. Received: {name}, which writes "
                f"'{self.tensor_name(operator.outputs[0])}'. Leave the layer float, or add a row."
            )
        return OP_TABLE[name]

    def is_quantity(self, tensor: int) -> bool:
        """Whether it is a float still: no index, shape or truth value."""
        return self.graph.tensors[tensor].type == schema.TensorType.FLOAT32

    def is_constant(self, tensor: int) -> bool:
        """Whether its values are in the file."""
        return flatbuffer.tensor_data(self.model, self.graph.tensors[tensor]) is not None

    def activations(self, operator: OperatorT, rule: OpRule) -> list[int]:
        """The tensors that an operator reads as activations, without constants."""
        inputs = [int(operator.inputs[i]) for i in rule.activation_positions(len(operator.inputs))]
        return [t for t in inputs if t >= 0 and self.is_quantity(t) and not self.is_constant(t)]

    def bits(self, operator: OperatorT) -> int:
        """Width of the activations that an integer operator computes on."""
        tensors = [*operator.inputs, *operator.outputs]
        return max((self.sites[int(t)].bits for t in tensors if int(t) in self.sites), default=8)

    def reads_float(self, operator: OperatorT) -> bool:
        """Whether an input of an operator is a float by the plan."""
        return any(int(t) in self.labels.floats for t in operator.inputs)


@dataclasses.dataclass(frozen=True)
class Pass:
    """One step of the integer pass.

    Args:
        run: what it does to the draft, in place.
        needs: the facts that must hold before it.
        leaves: the facts that it makes true.
        ends: the facts that hold no longer after it.
    """

    run: Callable[[Draft], None]
    needs: Set[Fact]
    leaves: Set[Fact]
    ends: Set[Fact] = frozenset()

    @property
    def name(self) -> str:
        """The name of its function, in words."""
        return self.run.__name__.replace("_", " ")
