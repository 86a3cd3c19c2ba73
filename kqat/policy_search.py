"""`search`: which layer gets which preset, so that the file fits a budget and loses least.

Above everything but the command line, as `device_model`: it converts, so it needs `tflite_export`,
which is imported when it is called.
"""

import dataclasses
import glob
import math
import numbers
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from kqat.analysis import Sensitivity, figure_class, measured_layers
from kqat.base import KqatError, PolicyError, TextEnum, significant
from kqat.config import QuantizePolicy, resolve_config
from kqat.devices import Target, stored_bits, target_named
from kqat.graph import Graph, Node, trace
from kqat.planning import LayerPlan, Plan, make_plan
from kqat.training import (
    CalibrationWarning,
    calibrate_for,
    check_unquantized,
    of_fixed_shape,
    some_samples,
    wrap,
)

# Points of the Pareto table, evenly spread between the cheapest and the first choice.
POINTS = 8
# How often the budget of the weights is corrected by the size of a whole file.
CORRECTIONS = 4


class Budget(TextEnum):
    """What a search keeps within a budget."""

    FLASH = "flash"
    ARENA = "arena"
    MAC_BITS = "mac_bits"
    CYCLES = "cycles"


UNITS = {
    Budget.FLASH: "bytes of flash",
    Budget.ARENA: "bytes of arena",
    Budget.MAC_BITS: "MAC x bits",
    Budget.CYCLES: "cycles",
}


@dataclasses.dataclass(frozen=True)
class ParetoPoint:
    """One policy: the least cost that its budget allows.

    Attributes:
        used: of what the budget is of, as the sum of the layers' shares.
        cost: sum of the layers' costs; of outputs' noise the same in dB is `-10 log10(cost)`.
        choices: layer -> preset.
    """

    used: float
    cost: float
    choices: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class ParetoRow:
    """One row of `SearchedPolicy.rows`.

    Attributes:
        name: `"found"` for the policy itself, the preset where all layers have the same, else
            `"mixed"`.
        used: of what the budget is of, in its unit: of the found and the alike policies as their
            files show, of the others as the sum of the layers' shares.
        cost: sum of the layers' costs.
        presets: preset -> how many layers have it.
        within: whether it is within the budget.
    """

    name: str
    used: float
    cost: float
    presets: Mapping[str, int]
    within: bool


@dataclasses.dataclass(frozen=True)
class SearchedPolicy(QuantizePolicy):
    """A policy that `kqat.search` found; `save` keeps what `quantize_model` needs of it.

    Attributes:
        measure: what the budget is of.
        budget: the budget, in its unit.
        used: what the policy takes of it, as its file shows.
        choices: layer -> preset; of layers that read one weight, the first stands for all.
        pareto: what other budgets would give.
        alike: what one preset for all layers gives, for each of the presets.
        sensitivity: what each layer costs at each preset, as measured.
    """

    measure: Budget = Budget.FLASH
    budget: float = 0.0
    used: float = 0.0
    choices: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)
    pareto: tuple[ParetoPoint, ...] = dataclasses.field(default=(), hash=False)
    alike: tuple[ParetoPoint, ...] = dataclasses.field(default=(), hash=False)
    sensitivity: Sensitivity | None = dataclasses.field(default=None, hash=False)

    def text(self) -> str:
        """The policy and the Pareto table, for reading."""
        unit = UNITS[self.measure]
        lines = [
            f"policy within {self.budget:,.0f} {unit}: takes {self.used:,.0f}",
            *(f"  {layer:<40} {choice}" for layer, choice in self.choices.items()),
            f"{unit:>14} {'cost':>10}  layers by preset",
        ]
        for row in self.rows():
            words = ", ".join(f"{n} {choice}" for choice, n in row.presets.items())
            found = "  <- found" if row.name == "found" else ""
            lines.append(f"{row.used:>14,.0f} {significant(row.cost, 3):>10}  {words}{found}")
        return "\n".join(lines)

    def rows(self) -> list[ParetoRow]:
        """The Pareto table, from the least to the most used: this policy, those that other budgets
        give, and those with one choice for all layers."""
        assert self.sensitivity is not None
        cost = sum(self.sensitivity.cost(*pair) for pair in self.choices.items())
        found = [("found", ParetoPoint(self.used, cost, self.choices))]
        for point in (*self.alike, *self.pareto):
            kinds = set(point.choices.values())
            name = next(iter(kinds)) if len(kinds) == 1 else "mixed"
            if all(dict(point.choices) != dict(other.choices) for _, other in found):
                found.append((name, point))
        rows = [
            ParetoRow(
                name, point.used, point.cost, _counted(point.choices), point.used <= self.budget
            )
            for name, point in found
        ]
        return sorted(rows, key=lambda row: (row.used, row.cost))

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws the Pareto table to `path`, in the format of its suffix: `.png`, `.svg`, `.pdf`.

        Each point is a policy, with what it takes below and what it costs on the left; the line at
        the budget parts what fits from what does not.

        Raises:
            KqatError: if matplotlib is not installed, or cannot write such a file.
        """
        figure = figure_class("SearchedPolicy.plot")(figsize=(7.0, 4.5), layout="constrained")
        if Path(path).suffix[1:].lower() not in figure.canvas.get_supported_filetypes():
            raise KqatError(
                f"Expected a file name that ends in .png, .svg or .pdf. Received: "
                f"{os.fspath(path)!r}."
            )
        axes = figure.add_subplot()
        rows = self.rows()
        front = [row for i, row in enumerate(rows) if all(row.cost < r.cost for r in rows[:i])]
        axes.step([r.used for r in front], [r.cost for r in front], where="post", color="#86add6")
        for row in rows:
            mine = row.name == "found"
            axes.plot(
                row.used, row.cost, "D" if mine else "o", color="#c2571a" if mine else "#1d3b5c"
            )
            words = ", ".join(f"{n} {choice}" for choice, n in row.presets.items())
            axes.annotate(
                words, (row.used, row.cost), xytext=(5, 5), textcoords="offset points", fontsize=7
            )
        axes.axvline(self.budget, linestyle="--", color="#777777", linewidth=1)
        if all(row.cost > 0.0 for row in rows):
            axes.set_yscale("log")
        axes.margins(x=0.15)
        axes.set_xlabel(f"{UNITS[self.measure]} (dashed: the budget, {self.budget:,.0f})")
        axes.set_ylabel("cost, the sum over the layers")
        figure.savefig(path)


def _is_amount(value: Any) -> bool:
    # A truth value is a number of Python's, too.
    return type(value) is not bool and isinstance(value, numbers.Real) and float(value) > 0


def _counted(choices: Mapping[str, str]) -> dict[str, int]:
    """Preset -> how many layers have it."""
    values = list(choices.values())
    return {choice: values.count(choice) for choice in dict.fromkeys(values)}


def search(
    model: keras.Model,
    data: Any,
    *,
    budget: float,
    target: str | None = None,
    measure: str = "flash",
    choices: Sequence[str] = ("int8", "w4a8"),
    keep: Mapping[Any, Any] | None = None,
    sensitivity: str = "sqnr",
    loss: Any = None,
    compress: str | None = None,
) -> SearchedPolicy:
    """The policy with the least loss whose file fits a budget.

    What each layer costs at each choice is measured (`kqat.sensitivity`), and an integer linear
    program decides, with costs that add up: minimize the sum of the costs, one choice per layer,
    within the budget. For flash, the file of each choice for all layers is made and weighed, which
    gives the bytes of a weight; for arena and cycles one file for each layer and choice. Then the
    file of the found policy is weighed; where it is above the budget, the program is solved again
    for less.

    Args:
        model: a built float model, as for `kqat.quantize_model`; it is not changed.
        data: as for `kqat.sensitivity`.
        budget: in the unit of `measure`; below 1 as a share of what the first choice for all layers
            takes.
        target: a name from `kqat.TARGETS`, whose kernels decide how few bits are stored.
        measure: what the budget is of: `"flash"`: bytes of the file; `"mac_bits"`:
            multiply-accumulates times bits of weights times bits of activations; `"arena"`: bytes
            of TFLite Micro's arena; `"cycles"`: as Vela estimates them, for an Ethos-U target. The
            last two make a file for each layer and choice.
        choices: names of presets that differ in their weights. Recurrent layers keep the first.
        keep: rules, as in a policy, for layers that the search leaves as these say.
        sensitivity, loss: `measure` and `loss` of `kqat.sensitivity`.
        compress: as of `tflite_export.convert`, for a budget of flash: encoded weights take as many
            bits as they need, where packed ones of three bits take four.

    Raises:
        PolicyError: if no policy fits the budget, naming the least that one takes; or as
            `kqat.sensitivity`.
        TargetError: if there is no such target.
    """
    if measure not in tuple(Budget):
        raise PolicyError(
            f"Expected measure to be one of {[str(m) for m in Budget]}. Received: {measure!r}."
        )
    if not _is_amount(budget):
        raise PolicyError(f"Expected a budget above 0. Received: {budget!r}.")
    device = None if target is None else target_named(target)
    if compress is not None and measure not in (Budget.FLASH, Budget.ARENA):
        raise PolicyError(
            f"Expected no compress for a budget of {measure}, which it does not change. Received: "
            f"compress={compress!r}."
        )
    if measure == Budget.CYCLES and not (target or "").startswith("ethos_u"):
        raise PolicyError(
            "Expected an Ethos-U target for a budget of cycles, which Vela estimates. Received: "
            f"target={target!r}. Use 'ethos_u55', or measure='mac_bits'."
        )
    if compress is not None:
        from tflite_export.exporter import check_compress

        check_compress(compress, target)
    inputs = data[0] if isinstance(data, tuple) and data else data
    check_unquantized(model)
    model = of_fixed_shape(model, None, inputs)
    kept = tuple((keep or {}).items())
    base = QuantizePolicy(default=resolve_config(choices[0]), rules=kept)
    found, plan, graph = measured_layers(model, data, choices, base, sensitivity, loss)
    recurrent = {part.origin for step in plan.steps.values() for part in step.layers}
    free = [
        layer
        for layer in found.layers
        if not any(
            name in recurrent or _is_kept(base, graph, name) for name in plan.of_one_config(layer)
        )
    ]
    if not free:
        raise PolicyError(
            f"Expected layers for the search to decide about. Received: keep={dict(kept)!r}, which "
            "decides about all of them but recurrent ones, which keep the first choice."
        )
    problem = _Problem.of(found, plan, free, Budget(measure), device)

    def policy_of(chosen: Mapping[str, str]) -> QuantizePolicy:
        changed = {layer: choice for layer, choice in chosen.items() if choice != choices[0]}
        rules = [
            (glob.escape(name), choice)
            for layer, choice in changed.items()
            for name in plan.of_one_config(layer)
        ]
        return QuantizePolicy(base.default, (*kept, *rules))

    # The program comes to the same choices again, and a file takes seconds.
    weighed: dict[tuple[str, ...], float] = {}

    def taken(chosen: Mapping[str, str]) -> float:
        if measure == Budget.MAC_BITS:
            return problem.rest + problem.total(chosen)
        key = tuple(chosen[layer] for layer in free)
        if key not in weighed:
            qat = _quantized(model, inputs, policy_of(chosen))
            weighed[key] = _weigh(qat, Budget(measure), target, compress)
        return weighed[key]

    alike = {choice: taken(dict.fromkeys(free, choice)) for choice in problem.choices}
    if measure == Budget.FLASH:
        problem = problem.as_weighed(alike)
    elif measure != Budget.MAC_BITS:
        problem = problem.one_by_one(taken, alike)
    first = alike[choices[0]]
    limit = budget * first if budget < 1 else float(budget)
    chosen, used = _within(problem, limit, taken)
    if chosen is None:
        least = min((problem.least(), *(dict.fromkeys(free, c) for c in alike)), key=taken)
        low = taken(least)
        raise PolicyError(
            f"Expected a budget that a policy of {list(choices)} meets. Received: {budget!r}, "
            f"which is {limit:,.0f} of {first:,.0f}. The least that works is {low:,.0f} "
            f"({100 * low / first:.1f} %): give that as budget, or choices of fewer bits."
        )
    return SearchedPolicy(
        default=base.default,
        rules=policy_of(chosen).rules,
        measure=Budget(measure),
        budget=limit,
        used=used,
        choices=chosen,
        pareto=tuple(_pareto(problem)),
        alike=tuple(
            ParetoPoint(used, problem.cost(same), same)
            for choice, used in alike.items()
            for same in (dict.fromkeys(free, choice),)
        ),
        sensitivity=found,
    )


def _within(
    problem: "_Problem", limit: float, taken: Callable[[Mapping[str, str]], float]
) -> tuple[dict[str, str] | None, float]:
    """The choices of least cost within `limit`, and what they take; `None` if there are none."""
    spare = limit - problem.rest
    for _ in range(CORRECTIONS):
        chosen = problem.solved(spare)
        if chosen is None:
            break
        used = taken(chosen)
        if used <= limit:
            return chosen, used
        spare = min(spare, problem.total(chosen)) - (used - limit)
    least = problem.least()
    used = taken(least)
    return (least, used) if used <= limit else (None, used)


def _is_kept(policy: QuantizePolicy, graph: Graph, name: str) -> bool:
    layer = next((node.layer for node in graph.nodes if node.name == name), None)
    return policy.match(name, layer) is not None


@dataclasses.dataclass(frozen=True)
class _Problem:
    """The integer program: a cost and a weight for each layer and choice.

    `rest` is what the layers that are not free take.
    """

    layers: tuple[str, ...]
    choices: tuple[str, ...]
    costs: np.ndarray
    sizes: np.ndarray
    rest: float

    @classmethod
    def of(
        cls,
        found: Sensitivity,
        plan: Plan,
        free: Sequence[str],
        measure: Budget,
        device: Target | None,
    ) -> "_Problem":
        parts: dict[str, list[LayerPlan]] = {}
        nodes, stored = _nodes(plan), set[int]()
        for part in plan.layers:
            layer = id(nodes[part.name][0].layer)
            # Each call computes, but the file stores the weights once.
            if part.weights and not (measure is Budget.FLASH and layer in stored):
                parts.setdefault(plan.of_one_config(part.origin)[0], []).append(part)
                stored.add(layer)
        shape_of = _shapes(nodes)

        def size(part: LayerPlan, choice: str | None) -> float:
            total = 0.0
            for name, spec in part.weights.items():
                bits = spec.bits
                if choice is not None:
                    bits = resolve_config(choice).weights.bits
                count, positions = shape_of(part.name, name)
                if measure is Budget.FLASH:
                    each = stored_bits(part.ops, bits, spec.axis is None, part.bits, device)
                    total += count * each / 8
                else:
                    total += count * positions * bits * part.bits
            return total

        sizes = [[sum(size(p, c) for p in parts[layer]) for c in found.choices] for layer in free]
        others = [p for name, some in parts.items() if name not in free for p in some]
        costs = [[found.cost(layer, c) for c in found.choices] for layer in free]
        rest = sum(size(part, None) for part in others)
        return cls(tuple(free), found.choices, np.array(costs), np.array(sizes), rest)

    def as_weighed(self, files: Mapping[str, float]) -> "_Problem":
        """The problem with the sizes that whole files have, one for each choice for all layers."""
        rest = files[self.choices[0]] - float(self.sizes[:, 0].sum())
        wanted = np.array([files[choice] - rest for choice in self.choices])
        return dataclasses.replace(
            self, sizes=self.sizes * (wanted / self.sizes.sum(axis=0)), rest=rest
        )

    def one_by_one(
        self, taken: Callable[[Mapping[str, str]], float], alike: Mapping[str, float]
    ) -> "_Problem":
        """The problem with sizes that are what each layer adds where all others have choice 0."""
        first = dict.fromkeys(self.layers, self.choices[0])
        sizes = np.zeros_like(self.sizes)
        for row, layer in enumerate(self.layers):
            for column, choice in enumerate(self.choices[1:], 1):
                sizes[row, column] = taken({**first, layer: choice}) - alike[self.choices[0]]
        return dataclasses.replace(self, sizes=sizes, rest=alike[self.choices[0]])

    def total(self, chosen: Mapping[str, str]) -> float:
        """What the free layers take."""
        return sum(
            float(self.sizes[i, self.choices.index(chosen[name])])
            for i, name in enumerate(self.layers)
        )

    def cost(self, chosen: Mapping[str, str]) -> float:
        """Sum of the costs of the free layers."""
        return sum(
            float(self.costs[i, self.choices.index(chosen[name])])
            for i, name in enumerate(self.layers)
        )

    def least(self) -> dict[str, str]:
        """The choices that take least, and of these those that cost least."""
        found = {}
        for i, name in enumerate(self.layers):
            order = np.lexsort((self.costs[i], self.sizes[i]))
            found[name] = self.choices[order[0]]
        return found

    def solved(self, spare: float) -> dict[str, str] | None:
        """The choices of least cost that take `spare` at most; `None` if there are none."""
        from scipy import optimize

        rows, columns = self.costs.shape
        one_each = np.kron(np.eye(rows), np.ones(columns))
        # In units of the largest, so that the solver's tolerances are relative.
        unit, price = float(np.abs(self.sizes).max()) or 1.0, float(np.abs(self.costs).max()) or 1.0
        constraints = [
            optimize.LinearConstraint(one_each, 1.0, 1.0),
            optimize.LinearConstraint(self.sizes.reshape(1, -1) / unit, -np.inf, spare / unit),
        ]
        result = optimize.milp(
            self.costs.reshape(-1) / price,
            constraints=constraints,
            integrality=np.ones(rows * columns),
            bounds=optimize.Bounds(0.0, 1.0),
            options={"mip_rel_gap": 0.0},
        )
        if result.x is None:
            return None
        picked = result.x.reshape(rows, columns).argmax(axis=1)
        return {name: self.choices[c] for name, c in zip(self.layers, picked, strict=True)}


def _nodes(plan: Plan, times: int = 1) -> dict[str, tuple[Node, int]]:
    """Name of each part of a plan -> its node, and how often that is computed: a step of a
    recurrence as often as its sequence has steps."""
    found = {node.name: (node, times) for node in plan.graph.nodes}
    for name, step in plan.steps.items():
        found |= _nodes(step, times * int(found[name][0].inputs[0].shape[1]))
    return found


def _shapes(nodes: Mapping[str, tuple[Node, int]]) -> Any:
    """A function: (part, weight) -> how many numbers it has, and how often each is multiplied."""

    def shape_of(part: str, weight: str) -> tuple[int, int]:
        node, times = nodes[part]
        count = int(np.prod(getattr(node.layer, weight).shape))
        transposed = "Transpose" in type(node.layer).__name__
        shape = (node.inputs if transposed else node.outputs)[0].shape
        first = getattr(node.layer, "data_format", None) == "channels_first"
        positions = shape[2:] if first else shape[1:-1]
        return count, times * math.prod(int(size or 1) for size in positions)

    return shape_of


def _pareto(problem: _Problem) -> list[ParetoPoint]:
    low = problem.total(problem.least())
    high = float(problem.sizes.max(axis=1).sum())
    points: dict[float, ParetoPoint] = {}
    for spare in np.linspace(low, high, POINTS):
        chosen = problem.solved(float(spare) * (1.0 + 1e-9))
        if chosen is not None:
            used = problem.rest + problem.total(chosen)
            points[used] = ParetoPoint(used, problem.cost(chosen), chosen)
    ordered = [points[used] for used in sorted(points)]
    # A larger file that loses no less is no choice.
    return [p for i, p in enumerate(ordered) if all(p.cost < q.cost for q in ordered[:i])]


def _quantized(model: keras.Model, inputs: Any, policy: QuantizePolicy) -> keras.Model:
    """The QAT model of a policy, calibrated on two samples: sizes do not depend on ranges."""
    qat = wrap(make_plan(trace(model), policy, model.name))
    arrays = some_samples(inputs, trace(qat), 2)
    with warnings.catch_warnings():
        # That two samples are few is known; of the user's own data it would say nothing.
        warnings.simplefilter("ignore", CalibrationWarning)
        calibrate_for(qat, keras.tree.pack_sequence_as(qat.input, arrays), "minmax", stacklevel=4)
    return qat


def _weigh(qat: keras.Model, measure: Budget, target: str | None, compress: str | None) -> float:
    """What a QAT model's file takes: its bytes, its arena, or Vela's cycles."""
    import tflite_export
    from tflite_export.devices import estimate
    from tflite_export.runtimes import tflite_micro_arena_bytes

    blob = tflite_export.convert(qat, target=target, compress=compress)
    if measure is Budget.ARENA:
        return float(tflite_micro_arena_bytes(blob))
    if measure is Budget.CYCLES:
        assert target is not None
        return float(estimate(blob, target).cycles)
    return float(len(blob))
