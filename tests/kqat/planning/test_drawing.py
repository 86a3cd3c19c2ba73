"""A plan as a picture: every layer in one box, nothing overlapping, grids and islands shown."""

import itertools
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import keras
import pytest
from keras import layers as L

import kqat
from kqat.planning.drawing import Picture, picture
from kqat.planning.layered_layout import layered

SVG = "{http://www.w3.org/2000/svg}"


def residual() -> kqat.Plan:
    x = keras.Input((16, 16, 3), name="image")
    y = L.ReLU(name="stem_relu")(
        L.BatchNormalization(name="stem_bn")(L.Conv2D(4, 3, padding="same", name="stem")(x))
    )
    for block in range(8):
        z = L.Conv2D(4, 3, padding="same", name=f"a{block}")(y)
        z = L.BatchNormalization(name=f"norm{block}")(z)
        y = L.ReLU(name=f"out{block}")(L.Add(name=f"add{block}")([y, z]))
    y = L.Dropout(0.5, name="drop")(L.GlobalAveragePooling2D(name="pool")(y))
    model = keras.Model(x, L.Dense(3, name="head")(y), name="residual & <deep>")
    return kqat.plan(model, {"a1": None, "a2": "w4a8", "a3": "int16x8"})


def transformer() -> kqat.Plan:
    x = keras.Input((6, 8), name="tokens")
    y = L.MultiHeadAttention(2, 4, name="attention")(*[L.LayerNormalization(name="norm")(x)] * 2)
    y = L.Add(name="add")([x, y])
    return kqat.plan(keras.Model(x, L.Dense(3, name="head")(y), name="transformer"))


def recurrent() -> kqat.Plan:
    x = keras.Input((5, 4), name="steps")
    y = L.Bidirectional(L.GRU(3), name="both")(x)
    y = L.Concatenate(name="join")([y, L.GlobalMaxPooling1D(name="most")(x)])
    return kqat.plan(keras.Model(x, [L.Dense(2, name="one")(y), L.Dense(3, name="two")(y)]))


PLANS = {make.__name__: make for make in (residual, transformer, recurrent)}


@pytest.fixture(scope="module", params=PLANS)
def plan(request: pytest.FixtureRequest) -> kqat.Plan:
    return PLANS[request.param]()


def box_of(found: Picture, name: str) -> Any:
    return next(box for box in found.boxes if box.key == name)


def test_every_layer_is_in_one_box(plan: kqat.Plan) -> None:
    found = picture(plan)
    titles = "\n".join(box.title for box in found.boxes)
    nodes = [node.name for node in plan.graph.nodes]
    assert [len(re.findall(rf"^{re.escape(name)} \(", titles, re.M)) for name in nodes] == [
        1
    ] * len(nodes)
    keys = [box.key for box in found.boxes]
    assert len(set(keys)) == len(keys)
    order = {key: index for index, key in enumerate(keys)}
    assert all(order[source] < order[reader] for source, reader in found.edges)


def test_boxes_do_not_overlap_and_lines_run_down(plan: kqat.Plan, tmp_path: Path) -> None:
    plan.draw(tmp_path / "plan.svg")
    root = ET.fromstring((tmp_path / "plan.svg").read_text())
    boxes = [
        [float(rect.get(key, "")) for key in ("x", "y", "width", "height")]
        for group in root.iter(f"{SVG}g")
        if group.find(f"{SVG}title") is not None
        for rect in group.findall(f"{SVG}rect")
    ]
    assert len(boxes) == len(picture(plan).boxes)
    for (ax, ay, aw, ah), (bx, by, bw, bh) in itertools.combinations(boxes, 2):
        assert ax + aw <= bx or bx + bw <= ax or ay + ah <= by or by + bh <= ay
    width, height = (float(n) for n in root.get("viewBox", "").split()[2:])
    assert all(0 <= x and x + w <= width and 0 <= y and y + h <= height for x, y, w, h in boxes)


def test_lines_pass_beside_boxes() -> None:
    """An edge over several layers has a lane of its own."""
    names = [*"abcde"]
    chain = list(itertools.pairwise(names))
    layout = layered(dict.fromkeys(names, (100.0, 40.0)), [*chain, ("a", "e"), ("b", "d")])
    for edge in (("a", "e"), ("b", "d")):
        for x, y in layout.lines[edge][1:-1]:
            for place in layout.places.values():
                beside = abs(x - place.x) >= place.width / 2
                assert beside or y <= place.y or y >= place.y + place.height
    for points in layout.lines.values():
        heights = [y for _, y in points]
        assert heights == sorted(heights)


def test_grids_islands_and_shared_scales_are_shown() -> None:
    found = picture(residual())
    stem = box_of(found, "stem")
    assert stem.kind == "int8" and "BatchNorm" in stem.lines[1] and "int8/ch" in stem.lines[2]
    assert box_of(found, "a1").kind == "float"
    assert (box_of(found, "a2").kind, box_of(found, "a3").kind) == ("packed", "int16")
    assert found.edges["add0", "a1"] == "dequantize"
    assert "drop (Dropout): training only" in box_of(found, "pool").title
    joined = picture(recurrent())
    assert any(note.startswith("scale 1: shared by ") for note in joined.notes)
    assert any("scale 1" in line for box in joined.boxes for line in box.lines)


@pytest.mark.parametrize("ending", [".html", ".mmd", ".dot", ".SVG"])
def test_each_kind_of_file_has_every_box_and_edge(
    plan: kqat.Plan, tmp_path: Path, ending: str
) -> None:
    path, found = tmp_path / f"plan{ending}", picture(plan)
    plan.draw(path)
    text = path.read_text()
    if ending == ".mmd":
        assert len(re.findall(r"^  n\d+[\[(]", text, re.M)) == len(found.boxes)
        assert len(re.findall(r"^  n\d+ -.*> n\d+$", text, re.M)) == len(found.edges)
        assert '"' not in "".join(re.findall(r'\["(.*)"\]', text))
    elif ending == ".dot":
        assert (text.count(" -> "), text.count("[label=")) >= (len(found.edges), len(found.boxes))
    else:
        assert text.count("<title>") >= len(found.boxes)
        assert "&amp; &lt;deep&gt;" in text or found.name.isidentifier()
        assert "http" not in text.replace("http://www.w3.org/2000/svg", "")  # self-contained


def test_other_endings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(kqat.KqatError, match=r"ends with one of \['\.dot'.*plan\.png"):
        recurrent().draw(tmp_path / "plan.png")
    assert not list(tmp_path.iterdir())
