"""A plan as a picture: the network as a graph of kernels, with grids, shared scales and islands.

A box is what one kernel computes: a layer with all that is folded or fused into it.
"""

import collections
import dataclasses
import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from kqat.base import KqatError, shortened
from kqat.devices import misfit_lines
from kqat.planning.layered_layout import Layout, layered
from kqat.planning.plan import LayerPlan, Plan, Role, output_scale, weights_text

# Widths of one letter at the sizes that are used, and of a line.
_LETTER, _LINE, _PAD = 6.6, 15.0, 9.0
_LONGEST = 38
# Kind of a box -> what it is, and its fill and stroke on light and on dark screens.
KINDS = {
    "int8": ("8-bit integers", "#dce9f7", "#3a6ea5", "#1d3550", "#6ea3dc"),
    "packed": ("weights of 4 bits or fewer", "#e8e0fa", "#6a4fb3", "#352a57", "#a793ea"),
    "int16": ("16-bit values", "#d8f1ec", "#2a8c7d", "#153f39", "#5cc9b8"),
    "float": ("float island", "#fde7d8", "#c2571a", "#4d2a12", "#f0944d"),
    "port": ("input or output", "#f1f2f4", "#5d6875", "#2a3038", "#9aa5b1"),
}


@dataclasses.dataclass(frozen=True)
class Box:
    """One box: its kind, its lines of text, and the whole of what is known of it."""

    key: str
    kind: str
    lines: tuple[str, ...]
    title: str


@dataclasses.dataclass(frozen=True)
class Picture:
    """Boxes in the order of the network; edges, each with what happens on it or `""`."""

    name: str
    boxes: tuple[Box, ...]
    edges: Mapping[tuple[str, str], str]
    notes: tuple[str, ...]


def draw(plan: Plan, path: Any) -> bytes:
    """The file at `path`, of the kind that its ending names.

    Raises:
        KqatError: if that is no kind of picture.
    """
    suffix = PurePath(path).suffix.lower()
    if suffix not in FORMATS:
        raise KqatError(
            f"Expected a file name that ends with one of {sorted(FORMATS)}. Received: "
            f"{str(path)!r}. Use 'plan.svg'."
        )
    return FORMATS[suffix](picture(plan)).encode()


def picture(plan: Plan) -> Picture:
    """What is drawn of a plan."""
    decisions = {layer.name: layer for layer in plan.layers}
    owner = _owners(plan, decisions)
    producers = {ref: node.name for node in plan.graph.nodes for ref in node.outputs}
    shared = {g.name: i for i, g in enumerate([g for g in plan.groups if g.sites > 1], 1)}
    boxes: list[Box] = []
    edges: dict[tuple[str, str], str] = {}
    makers: dict[Any, str] = {}
    for ref, name in zip(plan.graph.inputs, plan.input_names, strict=True):
        key = f"input {name}"
        makers[ref] = key
        boxes.append(_input_box(plan, key, name, ref, shared))
    members: dict[str, list[LayerPlan]] = collections.defaultdict(list)
    for node in plan.graph.nodes:
        members[owner[node.name]].append(decisions[node.name])
    kinds: dict[str, str] = {box.key: box.kind for box in boxes}
    for node in plan.graph.nodes:
        key = owner[node.name]
        if key not in kinds:
            box = _box(plan, key, members[key], decisions[key], shared)
            kinds[key] = box.kind
            boxes.append(box)
        for ref in node.inputs:
            source = makers.get(ref) or owner[producers[ref]]
            if source != key:
                edges.setdefault((source, key), "")
    for ref, name in zip(plan.graph.outputs, plan.output_names, strict=True):
        key = f"output {name}"
        boxes.append(Box(key, "port", (name, "output"), f"output {name}"))
        kinds[key] = "port"
        edges[owner[producers[ref]], key] = ""
    for source, reader in edges:
        if "port" not in (kinds[source], kinds[reader]):
            leaves, enters = (kinds[key] == "float" for key in (source, reader))
            if leaves != enters:
                edges[source, reader] = "quantize" if leaves else "dequantize"
    notes = [
        f"scale {number}: shared by {', '.join(group.sources)}"
        for group in plan.groups
        if (number := shared.get(group.name))
    ]
    notes += [f"target {plan.target}: {text}" for text in misfit_lines(plan.misfits)]
    return Picture(plan.model_name, _in_order(boxes, edges), edges, tuple(notes))


def _in_order(boxes: Sequence[Box], edges: Mapping[tuple[str, str], str]) -> tuple[Box, ...]:
    """The boxes, each behind all that it reads: a box may be fused of far nodes."""
    waits = collections.Counter(reader for _, reader in edges)
    readers = collections.defaultdict(list)
    for source, reader in edges:
        readers[source].append(reader)
    by_key = {box.key: box for box in boxes}
    ready = [box.key for box in boxes if not waits[box.key]]
    order = []
    while ready:
        key = ready.pop(0)
        order.append(by_key[key])
        for reader in readers[key]:
            waits[reader] -= 1
            if not waits[reader]:
                ready.append(reader)
    return tuple(order)


def _owners(plan: Plan, decisions: Mapping[str, LayerPlan]) -> dict[str, str]:
    """Node -> the node whose box shows it."""
    producers = {ref: node.name for node in plan.graph.nodes for ref in node.outputs}
    owner: dict[str, str] = {}
    for node in plan.graph.nodes:
        decision = decisions[node.name]
        before = {producers.get(ref) for ref in node.inputs}
        target = decision.into if decision.into in before else None
        if target is None and (decision.into or decision.role is Role.TRAINING_ONLY):
            # Behind a layer that is nothing in the file, or that was itself fused.
            target = before.pop() if len(before) == 1 else None
        owner[node.name] = owner.get(target, node.name) if target else node.name
    return owner


def _kind(decision: LayerPlan) -> str:
    if decision.role is Role.FLOAT:
        return "float"
    if any(spec.bits <= 4 for spec in decision.weights.values()):
        return "packed"
    return "int16" if decision.bits == 16 else "int8"


def _input_box(plan: Plan, key: str, name: str, ref: Any, shared: Mapping[str, int]) -> Box:
    group = next((g for g in plan.groups if name in g.sources), None)
    words = "float or indexes" if group is None else f"int{group.spec.bits}"
    if group is not None and group.name in shared:
        words += f", scale {shared[group.name]}"
    shape = "×".join("?" if n is None else str(n) for n in ref.shape[1:])
    return Box(
        key,
        "port",
        (shortened(name, _LONGEST), f"input {shape}", words),
        f"input {name} {shape}: {words}",
    )


def _box(
    plan: Plan,
    key: str,
    members: Sequence[LayerPlan],
    decision: LayerPlan,
    shared: Mapping[str, int],
) -> Box:
    groups = {group.name: group for group in plan.groups}
    rounded = next((m for m in reversed(members) if m.group is not None), decision)
    kinds = [m.kind for m in members if m.role is not Role.TRAINING_ONLY] or [decision.kind]
    counted = collections.Counter(kinds)
    words = " + ".join(k if n == 1 else f"{n} {k}" for k, n in counted.items())
    lines = [shortened(key, _LONGEST), shortened(words, _LONGEST)]
    weights = weights_text(decision)
    weights = f"weights {weights}" if weights else ""
    scale = output_scale(rounded, groups, shared) if decision.role is not Role.FLOAT else "float"
    scale = scale.replace("shared", "scale").replace("own", "own scale")
    lines += [shortened(", ".join(part for part in (weights, scale) if part), _LONGEST)]
    title = "\n".join(
        f"{m.name} ({m.kind}): {m.role}" + (f", into {m.into}" if m.into else "") for m in members
    )
    if decision.ops:
        title += f"\noperators: {', '.join(decision.ops)}"
    notes = dict.fromkeys(m.note for m in members if m.note)
    if notes:
        title += "\n" + "\n".join(notes)
    return Box(key, _kind(decision), tuple(line for line in lines if line), title)


def _size(box: Box) -> tuple[float, float]:
    letters = max(map(len, box.lines))
    return max(letters * _LETTER + 2 * _PAD, 90.0), len(box.lines) * _LINE + 2 * _PAD - 4.0


def svg(found: Picture) -> str:
    """The picture as SVG: one file, for light and dark screens."""
    sizes: dict[Any, tuple[float, float]] = {box.key: _size(box) for box in found.boxes}
    layout = layered(sizes, list(found.edges))
    used = [kind for kind in KINDS if any(box.kind == kind for box in found.boxes)]
    legend = _legend(used, found.notes, layout)
    letters = max([len(f"plan of {found.name}") * 9, *(len(n) * 6.2 for n in legend[1])], default=0)
    width = max(layout.width, letters + 30.0, 260.0)
    height = 40.0 + layout.height + legend[2]
    shift = (width - layout.width) / 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" role="img" '
        f'aria-label="plan of {html.escape(found.name)}">',
        f"<style>{_style()}</style>",
        '<rect class="page" width="100%" height="100%"/>',
        f'<text class="head" x="15" y="28">plan of {html.escape(found.name)}</text>',
        f'<g transform="translate({shift:.1f} 34)">',
    ]
    parts += [_line(layout.lines[edge], words) for edge, words in found.edges.items()]
    parts += [_drawn(box, layout) for box in found.boxes]
    parts += ["</g>", f'<g transform="translate(15 {34 + layout.height:.1f})">', *legend[0], "</g>"]
    return "\n".join([*parts, "</svg>", ""])


def _style() -> str:
    common = (
        "text{font:11px ui-monospace,'DejaVu Sans Mono',Menlo,Consolas,monospace;fill:var(--ink)}"
        ".head{font-size:15px;font-weight:600}.name{font-weight:600}.page{fill:var(--page)}"
        ".edge{fill:none;stroke:var(--soft);stroke-width:1.2}"
        ".cross{stroke:var(--float-line);stroke-dasharray:4 3}.tip{fill:var(--soft)}"
        ".float{stroke-dasharray:5 3}.words{fill:var(--soft);font-size:10px}"
    )
    light = "--page:#fbfbfa;--ink:#1d232b;--soft:#5d6875;"
    dark = "--page:#14171b;--ink:#e6e9ed;--soft:#9aa5b1;"
    for kind, (_, fill, line, dark_fill, dark_line) in KINDS.items():
        light += f"--{kind}:{fill};--{kind}-line:{line};"
        dark += f"--{kind}:{dark_fill};--{kind}-line:{dark_line};"
        common += f".{kind}{{fill:var(--{kind});stroke:var(--{kind}-line)}}"
    return f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}{common}"


def _drawn(box: Box, layout: Layout) -> str:
    place = layout.places[box.key]
    left, radius = place.x - place.width / 2, 14 if box.kind == "port" else 5
    parts = [
        f"<g><title>{html.escape(box.title)}</title>"
        f'<rect class="{box.kind}" x="{left:.1f}" y="{place.y:.1f}" width="{place.width:.1f}" '
        f'height="{place.height:.1f}" rx="{radius}"/>'
    ]
    for index, line in enumerate(box.lines):
        y = place.y + _PAD + 8.0 + index * _LINE
        name = ' class="name"' if index == 0 else ""
        parts.append(
            f'<text{name} x="{place.x:.1f}" y="{y:.1f}" text-anchor="middle">'
            f"{html.escape(line)}</text>"
        )
    return "".join([*parts, "</g>"])


def _line(points: Sequence[tuple[float, float]], words: str) -> str:
    (x, y), *rest = points
    path = f"M{x:.1f} {y:.1f}"
    for index, (to_x, to_y) in enumerate(rest):
        if index % 2:  # down a lane beside the boxes of a layer
            path += f"L{to_x:.1f} {to_y:.1f}"
        else:
            bend = (to_y - y) / 2
            path += f"C{x:.1f} {y + bend:.1f} {to_x:.1f} {to_y - bend:.1f} {to_x:.1f} {to_y:.1f}"
        x, y = to_x, to_y
    tip = f'<path class="tip" d="M{x:.1f} {y:.1f}l-3.5 -7h7z"/>'
    label = ""
    if words:
        (from_x, from_y), (to_x, to_y) = points[0], points[1]
        label = (
            f'<text class="words" x="{(from_x + to_x) / 2 + 5:.1f}" '
            f'y="{(from_y + to_y) / 2 + 3:.1f}">{words}</text>'
        )
    kind = "edge cross" if words else "edge"
    return f'<path class="{kind}" d="{path}"/>{tip}{label}'


def _legend(
    kinds: Sequence[str], notes: Sequence[str], layout: Layout
) -> tuple[list[str], list[str], float]:
    """The legend's elements, its lines of text, and its height."""
    parts, lines, y = [], [], 6.0
    for kind in kinds:
        parts.append(
            f'<rect class="{kind}" x="0" y="{y:.0f}" width="22" height="12" rx="3"/>'
            f'<text x="30" y="{y + 10:.0f}">{KINDS[kind][0]}</text>'
        )
        y += 19.0
    letters = max(int(layout.width / 6.2), 60)
    for note in notes:
        for line in _wrapped(note, letters):
            lines.append(line)
            parts.append(f'<text class="words" x="0" y="{y + 10:.0f}">{html.escape(line)}</text>')
            y += 15.0
    return parts, lines, y + 14.0


def _wrapped(text: str, letters: int) -> list[str]:
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and len(lines[-1]) + len(word) >= letters:
            lines.append("   ")
        lines[-1] += (" " if lines[-1].strip() else "") + word
    return lines


def page(found: Picture) -> str:
    """The picture in a self-contained HTML page that scrolls in both directions."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>plan of {html.escape(found.name)}</title>\n"
        "<style>:root{color-scheme:light dark}body{margin:0;overflow:auto;background:#fbfbfa}"
        "@media(prefers-color-scheme:dark){body{background:#14171b}}"
        "svg{display:block;margin:0 auto}</style>\n"
        f"</head>\n<body>\n{svg(found)}</body>\n</html>\n"
    )


def mermaid(found: Picture) -> str:
    """The picture as a Mermaid flowchart, for Markdown."""
    keys = {box.key: f"n{index}" for index, box in enumerate(found.boxes)}
    lines = ["flowchart TD"]
    for box in found.boxes:
        text = "<br/>".join(html.escape(line).replace("&#x27;", "#39;") for line in box.lines)
        ends = ('(["', '"])') if box.kind == "port" else ('["', '"]')
        lines.append(f"  {keys[box.key]}{ends[0]}{text}{ends[1]}:::{box.kind}")
    for (source, reader), words in found.edges.items():
        arrow = f"-. {words} .->" if words else "-->"
        lines.append(f"  {keys[source]} {arrow} {keys[reader]}")
    for kind, (_, fill, line, *_) in KINDS.items():
        dash = ",stroke-dasharray:5 3" if kind == "float" else ""
        lines.append(f"  classDef {kind} fill:{fill},stroke:{line},color:#1d232b{dash}")
    return "\n".join([*lines, ""])


def dot(found: Picture) -> str:
    """The picture in Graphviz's language."""

    def quoted(text: str) -> str:
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

    lines = [
        f"digraph {quoted(found.name)} {{",
        '  node [shape=box, style="rounded,filled", fontname="monospace", fontsize=11];',
    ]
    for box in found.boxes:
        text = quoted("\n".join(box.lines)).replace("\n", "\\n")
        _, fill, line, *_ = KINDS[box.kind]
        lines.append(f'  {quoted(box.key)} [label={text}, fillcolor="{fill}", color="{line}"];')
    for (source, reader), words in found.edges.items():
        label = f" [label={quoted(words)}, style=dashed]" if words else ""
        lines.append(f"  {quoted(source)} -> {quoted(reader)}{label};")
    return "\n".join([*lines, "}", ""])


FORMATS: dict[str, Callable[[Picture], str]] = {
    ".svg": svg,
    ".html": page,
    ".mmd": mermaid,
    ".dot": dot,
}
