"""A layered drawing of a directed graph without cycles: where its boxes and its lines lie.

Sugiyama's method in its plain form: each box one layer below the lowest that it reads, fewer
crossings by sorting each layer by the mean place of its neighbours, and straight lines by moving
boxes toward these as far as their neighbours in the layer leave room.
Reference: Sugiyama et al. 1981, sections 3 and 4 (https://doi.org/10.1109/TSMC.1981.4308636).
"""

import dataclasses
import itertools
from collections.abc import Hashable, Mapping, Sequence

SWEEPS = 6
# Distances between boxes side by side, between a line and what is beside it, and between layers.
BESIDE, LANE, BETWEEN = 26.0, 14.0, 34.0


@dataclasses.dataclass(frozen=True)
class Place:
    """A box: its middle, its upper edge and its size."""

    x: float
    y: float
    width: float
    height: float


@dataclasses.dataclass(frozen=True)
class Layout:
    """Boxes by name; each edge as the points that it passes; the size of the whole."""

    places: Mapping[Hashable, Place]
    lines: Mapping[tuple[Hashable, Hashable], tuple[tuple[float, float], ...]]
    width: float
    height: float


def layered(
    sizes: Mapping[Hashable, tuple[float, float]], edges: Sequence[tuple[Hashable, Hashable]]
) -> Layout:
    """Lays out boxes of given width and height.

    Args:
        sizes: box -> width and height; in an order in which no edge leads backwards.
        edges: pairs of boxes, from upper to lower; each once.
    """
    ranks = _ranks(list(sizes), edges)
    chains = {edge: _chain(edge, ranks) for edge in edges}
    layers: list[list[Hashable]] = [[] for _ in range(max(ranks.values(), default=0) + 1)]
    for name in sizes:
        layers[ranks[name]].append(name)
    for (source, _), chain in chains.items():
        for step, vertex in enumerate(chain[1:-1], 1):
            layers[ranks[source] + step].append(vertex)
    above: dict[Hashable, list[Hashable]] = {v: [] for layer in layers for v in layer}
    below: dict[Hashable, list[Hashable]] = {v: [] for layer in layers for v in layer}
    for chain in chains.values():
        for upper, lower in itertools.pairwise(chain):
            above[lower].append(upper)
            below[upper].append(lower)
    _untangle(layers, above, below)
    x = _columns(layers, above, below, {v: _wide(sizes, v) for v in above}, sizes)
    heights = [max((sizes[v][1] for v in layer if v in sizes), default=0.0) for layer in layers]
    tops = [sum(heights[:i]) + BETWEEN * (i + 1) for i in range(len(heights))]
    left = min(x[v] - _wide(sizes, v) / 2 for v in x) - BESIDE if x else 0.0
    places = {
        name: Place(
            x[name] - left,
            tops[ranks[name]] + (heights[ranks[name]] - size[1]) / 2,
            *size,
        )
        for name, size in sizes.items()
    }
    lines = {}
    for edge, chain in chains.items():
        first, last = places[edge[0]], places[edge[1]]
        points = [(first.x, first.y + first.height)]
        for step, vertex in enumerate(chain[1:-1], 1):
            rank = ranks[edge[0]] + step
            points += [(x[vertex] - left, tops[rank] + at) for at in (0.0, heights[rank])]
        lines[edge] = (*points, (last.x, last.y))
    width = max((x[v] + _wide(sizes, v) / 2 for v in x), default=0.0) - left + BESIDE
    return Layout(places, lines, width, sum(heights) + BETWEEN * (len(heights) + 1))


def _ranks(
    names: Sequence[Hashable], edges: Sequence[tuple[Hashable, Hashable]]
) -> dict[Hashable, int]:
    """The layer of each box; one that reads nothing stands right above its first reader."""
    sources: dict[Hashable, list[Hashable]] = {name: [] for name in names}
    readers: dict[Hashable, list[Hashable]] = {name: [] for name in names}
    for source, reader in edges:
        sources[reader].append(source)
        readers[source].append(reader)
    ranks: dict[Hashable, int] = {}
    for name in names:
        ranks[name] = max((ranks[source] + 1 for source in sources[name]), default=0)
    for name in names:
        if not sources[name] and readers[name]:
            ranks[name] = min(ranks[reader] for reader in readers[name]) - 1
    return ranks


def _chain(edge: tuple[Hashable, Hashable], ranks: Mapping[Hashable, int]) -> list[Hashable]:
    """The ends of an edge, with a vertex of its own in each layer between them."""
    source, reader = edge
    return [source, *((edge, rank) for rank in range(ranks[source] + 1, ranks[reader])), reader]


def _wide(sizes: Mapping[Hashable, tuple[float, float]], vertex: Hashable) -> float:
    return sizes[vertex][0] if vertex in sizes else LANE


def _untangle(
    layers: list[list[Hashable]],
    above: Mapping[Hashable, Sequence[Hashable]],
    below: Mapping[Hashable, Sequence[Hashable]],
) -> None:
    """Sorts each layer by the mean place of its neighbours, downwards and upwards in turns."""
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        order = range(1, len(layers)) if down else range(len(layers) - 2, -1, -1)
        neighbours = above if down else below
        for index in order:
            other = layers[index - 1 if down else index + 1]
            place = {vertex: float(i) for i, vertex in enumerate(other)}
            own = {vertex: float(i) for i, vertex in enumerate(layers[index])}
            means = {
                v: sum(place[n] for n in neighbours[v]) / len(neighbours[v])
                if neighbours[v]
                else own[v]
                for v in own
            }
            layers[index].sort(key=means.__getitem__)


def _columns(
    layers: Sequence[Sequence[Hashable]],
    above: Mapping[Hashable, Sequence[Hashable]],
    below: Mapping[Hashable, Sequence[Hashable]],
    widths: Mapping[Hashable, float],
    boxes: Mapping[Hashable, tuple[float, float]],
) -> dict[Hashable, float]:
    """The middle of each vertex."""
    x: dict[Hashable, float] = {}
    for layer in layers:
        x.update(zip(layer, _spread([0.0] * len(layer), layer, widths, boxes), strict=True))
    for sweep in range(4 * SWEEPS):
        down = sweep % 2 == 0
        for layer in layers if down else reversed(layers):
            neighbours = [above[v] if down else below[v] for v in layer]
            wanted = [
                sum(x[n] for n in some) / len(some) if some else x[v]
                for v, some in zip(layer, neighbours, strict=True)
            ]
            x.update(zip(layer, _spread(wanted, layer, widths, boxes), strict=True))
    return x


def _spread(
    wanted: Sequence[float],
    layer: Sequence[Hashable],
    widths: Mapping[Hashable, float],
    boxes: Mapping[Hashable, tuple[float, float]],
) -> list[float]:
    """The places nearest to the wanted ones, by least squares, at which nothing overlaps.

    With distances taken off, places need only not fall: isotonic regression, by pooling neighbours
    that do.
    """
    offsets = [0.0]
    for left, right in itertools.pairwise(layer):
        gap = BESIDE if left in boxes and right in boxes else LANE
        offsets.append(offsets[-1] + (widths[left] + widths[right]) / 2 + gap)
    pools: list[list[float]] = []  # sum and count
    for value, offset in zip(wanted, offsets, strict=False):
        pools.append([value - offset, 1.0])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            total, count = pools.pop()
            pools[-1] = [pools[-1][0] + total, pools[-1][1] + count]
    means = [total / count for total, count in pools for _ in range(int(count))]
    return [mean + offset for mean, offset in zip(means, offsets, strict=False)]
