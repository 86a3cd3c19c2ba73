"""Does the file compute what was trained? Each operator is compared with the Keras graph.

Each operator of the `.tflite` is fed the very integers that the runtime computed before it; its
output is compared with what the frozen Keras model computes from the same values. Differences
are stated in output steps, one unit of the output's integer grid. An integer kernel may round
twice where the float graph rounds once, so a right export differs by at most one step, rarely.
"""

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from hashlib import sha256
from typing import Any

import keras
import numpy as np

from kqat.freezing import FrozenModel, Marker, Node, Ref, is_marker
from kqat.grids import Site
from tflite_export.integer_pass import call_layer
from tflite_export.verification.coarse_kernels import allowed_steps
from tflite_export.verification.layer_profile import GridUse, grid_use
from tflite_export.verification.report import SiteDifference
from tflite_export.verification.site_tensors import SiteTensors

_NO_SITES: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What lockstep found on one runtime.

    Attributes:
        differences: of each site that has a tensor, in the order in which the model runs.
        uses: how the values of those sites lie on their grids.
        unmatched: names of the sites that were not compared.
    """

    differences: tuple[SiteDifference, ...]
    uses: tuple[GridUse, ...]
    unmatched: tuple[str, ...]


def compare(
    frozen: FrozenModel,
    tensors: SiteTensors,
    computed: Mapping[int, np.ndarray],
    runtime: str,
    inputs: Sequence[np.ndarray],
) -> Comparison:
    """Compares every site of the model with the integers that a runtime computed.

    1. Each site is looked up in the file, by name and grid.
    2. The model runs node by node. A site that was found hands on the runtime's integers, any
       other site what Keras computes.
    3. The converter makes one operator of two that compute the same, and keeps either name. A
       site without a tensor is therefore looked up again, by what Keras computed there.
    4. Where that finds one, the nodes behind it get other values, so steps 2 and 3 are repeated.

    Args:
        frozen: the model.
        tensors: where its sites are in the file.
        computed: tensor of the file -> its integers, (samples, …).
        runtime: the one that computed them.
        inputs: those that the file ran on, as the float model takes them.
    """
    places = {site: tensor for site, tensor in tensors.places.items() if tensor in computed}
    while True:
        walk = _Walk(frozen, tensors, computed, runtime, places)
        frozen.graph.run([keras.ops.convert_to_tensor(x) for x in inputs], walk.call)
        twins = walk.twins()
        if not twins:
            return walk.comparison()
        places |= twins


@dataclasses.dataclass(frozen=True)
class _Visit:
    """A site that the walk came to.

    Attributes:
        index: of the site.
        tensor: the tensor of the file that it was compared with; `None` without one.
        identity: its grid and what Keras computes there; equal for sites that compute the same.
        held: the same of what the tensor holds, a step off here and there; `None` without one.
    """

    index: int
    tensor: int | None
    identity: Hashable
    held: Hashable = None


@dataclasses.dataclass(frozen=True)
class _Carried:
    """What a value of the graph holds.

    Attributes:
        tensor: the tensor of the file that has the same integers, `None` if none is known.
        passed: the sites without a tensor whose integers these are still, moved at most.
    """

    tensor: int | None = None
    passed: frozenset[int] = _NO_SITES


def _identity(site: Site, integers: np.ndarray) -> Hashable:
    """Equal for equal integers in the same order on equal grids, whatever the axes."""
    grid = (site.scale, site.zero_point, site.bits, integers.size)
    return (*grid, sha256(np.ascontiguousarray(integers).tobytes()).digest())


class _Walk:
    """One run over the frozen model, each node fed what the runtime computed before it.

    Layers that hand integers on as they are (Flatten, then Reshape) may share one tensor of the
    file, which bears one's name. The others' sites count as compared with that one, unless a layer
    between them computes with the integers.
    """

    def __init__(
        self,
        frozen: FrozenModel,
        tensors: SiteTensors,
        computed: Mapping[int, np.ndarray],
        runtime: str,
        places: Mapping[int, int],
    ):
        self.frozen = frozen
        self.tensors = tensors
        self.computed = computed
        self.runtime = runtime
        self.places = places
        self.carried: dict[Ref, _Carried] = {}
        self.visits: list[_Visit] = []
        self.stood_for: set[int] = set()  # sites without a tensor that a later site stands for …
        self.computed_with: set[int] = set()  # … and those that a layer computed with
        self.differences: list[SiteDifference] = []
        self.uses: list[GridUse] = []

    def call(self, node: Node, *args: Any, **kwargs: Any) -> Any:
        """The output of a node, for `Graph.run`."""
        if is_marker(node.layer, "site"):
            return self._at_site(node, args[0])
        carried = [self.carried[ref] for ref in node.inputs if ref in self.carried]
        passed = _NO_SITES.union(*(value.passed for value in carried))
        if self.frozen.facts(node).keeps_integers:
            tensor = next((v.tensor for v in carried if v.tensor is not None), None)
            self.carried |= dict.fromkeys(node.outputs, _Carried(tensor, passed))
        else:
            self.computed_with |= passed
        if isinstance(node.layer, Marker):
            return args[0]
        return call_layer(node.layer, self.runtime, *args, **kwargs)

    def _at_site(self, node: Node, value: Any) -> Any:
        """Compares a site with its tensor, if it has one; returns what the nodes behind it get."""
        index: int = node.layer.index
        site, real = self.frozen.sites[index], np.asarray(value)
        expected, before = site.integers(real), self.carried.get(node.inputs[0], _Carried())
        tensor = self.places.get(index)
        if tensor is not None and self.computed[tensor].size != expected.size:
            tensor = None  # the shape in the file is not that of the value
        identity = _identity(site, expected)
        if tensor is not None:
            self.stood_for |= before.passed
            self.carried[node.outputs[0]] = _Carried(tensor)
            actual = self._compare(site, tensor, real, expected)
            self.visits.append(_Visit(index, tensor, identity, _identity(site, actual)))
            return keras.ops.convert_to_tensor(site.reals(actual))
        if self._are_integers_of(before.tensor, expected):
            # As where no RESHAPE is needed: the site has the tensor of the one before it.
            self.carried[node.outputs[0]] = _Carried(before.tensor)
        elif self._are_padded_integers_of(before.tensor, expected, site.zero_point):
            # As where a convolution pads by its own option: what it computes is compared next.
            self.carried[node.outputs[0]] = before
        else:
            self.visits.append(_Visit(index, None, identity))
            self.carried[node.outputs[0]] = _Carried(None, before.passed | {index})
        return keras.ops.convert_to_tensor(site.reals(expected))

    def _are_integers_of(self, tensor: int | None, expected: np.ndarray) -> bool:
        return tensor is not None and np.array_equal(
            self.computed[tensor].ravel(), expected.ravel()
        )

    def _are_padded_integers_of(
        self, tensor: int | None, expected: np.ndarray, zero_point: int
    ) -> bool:
        """Whether `expected` (samples, rows, columns, channels) is a tensor between zeros."""
        if tensor is None or expected.ndim != 4 or self.computed[tensor].ndim != 4:
            return False
        image = self.computed[tensor]
        lacks = [int(b) - int(a) for a, b in zip(image.shape, expected.shape, strict=True)]
        if lacks[0] or lacks[3] or min(lacks) < 0 or not any(lacks):
            return False
        rows, columns = lacks[1:3]
        return any(
            np.array_equal(
                np.pad(
                    image,
                    ((0, 0), (top, rows - top), (left, columns - left), (0, 0)),
                    constant_values=zero_point,
                ),
                expected,
            )
            for top in range(rows + 1)
            for left in range(columns + 1)
        )

    def _compare(
        self, site: Site, tensor: int, real: np.ndarray, expected: np.ndarray
    ) -> np.ndarray:
        """Notes how a tensor differs from what Keras computes; returns its integers."""
        actual = self.computed[tensor].reshape(expected.shape).astype(np.float32)
        steps = np.abs(actual - expected)
        # Float arithmetic on 24 bits leaves an exact tie of an 8-bit value 2**-12 steps from one.
        position = real / site.scale
        tied = np.abs(position - np.floor(position) - 0.5) < 2.0 ** (site.bits - 20)
        self.uses.append(grid_use(site, tensor, real, actual))
        operator = self.tensors.operator(tensor)
        self.differences.append(
            SiteDifference(
                name=site.name,
                operator=operator,
                elements=steps.size,
                max_steps=int(steps.max(initial=0)),
                differing=int(np.count_nonzero(steps)),
                ties=int(np.count_nonzero(steps * tied)),
                allowed_steps=allowed_steps(
                    self.tensors, tensor, site.bits, self.runtime, self.computed
                ),
            )
        )
        return actual

    def _unmatched(self) -> list[_Visit]:
        """The sites that were not compared, directly or by a later one that stands for them."""
        compared = self.stood_for - self.computed_with
        return [v for v in self.visits if v.tensor is None and v.index not in compared]

    def twins(self) -> dict[int, int]:
        """Unmatched site -> the tensor of another site at which Keras computes the same.

        Or the tensor that holds just that: a layer that computes nothing with its weights of now,
        as a scale of one, is no operator, and reads what the runtime made before it.
        """
        tensors: dict[Hashable, int] = {}
        for visit in self.visits:
            if visit.tensor is not None:
                tensors |= {visit.held: visit.tensor, visit.identity: visit.tensor}
        return {v.index: tensors[v.identity] for v in self._unmatched() if v.identity in tensors}

    def comparison(self) -> Comparison:
        """What the walk found."""
        unmatched = tuple(self.frozen.sites[visit.index].name for visit in self._unmatched())
        return Comparison(tuple(self.differences), tuple(self.uses), unmatched)
