"""The page: everything inside it, nothing from outside, whatever the names are."""

import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tflite_export.devices.vela import Fallback, NpuEstimate
from tflite_export.verification import html_page
from tflite_export.verification.report import (
    LayerReport,
    OutputAgreement,
    Report,
    RuntimeReport,
    SiteDifference,
)

EVIL = "</td><script>alert('é & \"')</script>"
VOID = {"meta", "br"}


def layer(name: str, **changes: object) -> LayerReport:
    row = LayerReport(
        name=name, operator="CONV_2D", shape=(4, 4, 2), bits=8, weight_bits=4, scale=0.5,
        zero_point=-3, clipped_share=0.02, grid_share=0.5, sqnr_db=25.0,
        max_steps={"litert": 2}, macs=12_345, constant_bytes=678,
    )  # fmt: skip
    return dataclasses.replace(row, **changes)


def report(layers: int = 3) -> Report:
    """A report with everything that one can have, and hostile names."""
    site = SiteDifference(
        name=EVIL, operator="CONV_2D", elements=1000, max_steps=2, differing=10, ties=5
    )
    agreement = OutputAgreement(name=EVIL, max_steps=3, equal_fraction=0.9, top1_agreement=0.5)
    npu = NpuEstimate(
        accelerator="ethos-u55-128", system="s", memory_mode="m", cycles=1234567,
        inferences_per_second=10.5, sram_bytes=1, dram_bytes=2, flash_bytes=3, compiled_bytes=4,
        operators=4, fallbacks=(Fallback(operator="CAST", tensor=EVIL, reason=EVIL),),
    )  # fmt: skip
    return Report(
        model_name=EVIL, size_bytes=1 << 20, samples=8, operators={"CONV_2D": 4},
        float_operators=1, macs=10**9, estimate=npu, notes=(EVIL,),
        runtimes=(
            RuntimeReport(runtime="litert", sites=(site,), outputs=(agreement,), unmatched=(EVIL,)),
            RuntimeReport(runtime="tflite_micro", problem=EVIL),
        ),
        layers=tuple(layer(f"{EVIL}{i}", sqnr_db=None if i else 80.0) for i in range(layers)),
    )  # fmt: skip


class Tags(HTMLParser):
    """Checks that what is opened is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def tags(text: str) -> list[str]:
    parser = Tags()
    parser.feed(text)
    assert parser.open == []
    return parser.seen


def test_the_page_is_whole_and_alone(tmp_path: Path) -> None:
    report().save_html(tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    seen = tags(text)
    assert "script" not in seen and "link" not in seen and "img" not in seen
    assert not re.search(r"https?:|url\(|@import", text)
    assert "prefers-color-scheme: dark" in text
    assert seen.count("svg") == 4 and seen.count("rect") == 4 * 3
    for words in (
        "1,234,567", "3 of 4 (75 %)", "same class in 50 %", "of these 50 % halfway",
        "Halfway: exactly between two steps", "<small>CONV_2D</small>", "</i> below 30 dB",
    ):  # fmt: skip
        assert words in text
    assert text.count('class="loud"') > 4


def test_clipping_stands_out_where_it_costs() -> None:
    """A softmax's 1.0 is clipped to 255/256: not a step, however many values are 1.0."""
    cell = 'class="loud">50 %'
    for sqnr_db, loud in ((25.0, True), (51.2, False), (None, False)):
        row = layer("a", clipped_share=0.5, sqnr_db=sqnr_db, max_steps={"litert": 0})
        text = dataclasses.replace(report(), layers=(row,)).to_html()
        assert (cell in text) == loud
        grid = text.split("<b>Use of the grid")[1].split("</svg>")[0]
        assert (grid.count("<rect"), grid.count('" class="loud"')) == (1, int(loud))


@pytest.mark.parametrize("layers", [0, 1, 200])
def test_any_number_of_layers_fits(layers: int) -> None:
    text = report(layers).to_html()
    tags(text)
    for x, width in re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', text):
        assert float(x) + float(width) <= html_page.WIDTH


def verdicts(found: Report) -> list[tuple[str, str]]:
    """The class and the words of each verdict at the head of a page, without its mark."""
    head = found.to_html().split('<ul class="verdicts">')[1].split("</ul>")[0]
    marks = {"good": "✓", "bad": "✗"}
    rows = re.findall(r'<li class="(\w+)">(.) (.*)</li>', head)
    assert all(marks[kind] == mark for kind, mark, _ in rows)
    return [(kind, words) for kind, _, words in rows]


def test_long_names_lose_their_middle_in_the_table_of_layers() -> None:
    rows = (layer("global_average_pooling2d"), layer("dense"))
    text = str(dataclasses.replace(report(), layers=rows))
    assert "\nglobal_aver…_pooling2d " in text and "\ndense " in text


@pytest.mark.slow
def test_headings_stand_over_their_columns() -> None:
    """The first cell of the second row of headings is over numbers; of the first, over names."""
    text = report().to_html()
    head = text.split("<thead>")[1].split("</thead>")[0]
    assert "<tr><th>steps</th>" in head and 'class="left"' not in head
    sticks = re.findall(r"([^{}]*)\{[^{}]*(?:position: sticky|text-align: left)", text)
    assert sticks and all("thead th:first" not in who and " th:first" in who for who in sticks)


def test_a_share_that_is_not_zero_does_not_read_as_zero() -> None:
    shares = (0.0, 2e-5, 1e-4, 0.5, 1.0)
    assert [html_page._percent(share) for share in shares] == ["0", "< 0.01", "0.01", "50", "100"]


def test_a_runtime_that_is_not_installed_has_no_verdict() -> None:
    absent = RuntimeReport(runtime="tflite_micro", problem="not installed", installed=False)
    lacking = RuntimeReport(runtime="litert", problem="no kernel", lacks=("ELU",))
    shown = dataclasses.replace(report(), runtimes=(absent, lacking))
    assert absent.is_right and lacking.is_right
    assert not any("tflite_micro" in words for _, words in verdicts(shown))
    assert any("litert did not run it" in words for _, words in verdicts(shown))


def test_a_verdict_is_good_for_a_good_file_only() -> None:
    site = SiteDifference(
        name="a", operator="CONV_2D", elements=1000, max_steps=1, differing=1, ties=0
    )
    npu = report().estimate
    assert npu is not None
    right = dataclasses.replace(
        report(),
        float_operators=0,
        estimate=dataclasses.replace(npu, fallbacks=()),
        runtimes=(
            RuntimeReport(runtime="litert", sites=(site,)),
            RuntimeReport(runtime="tflite_micro"),
        ),
    )
    assert verdicts(right) == [
        ("good", "full integer"),
        ("good", "litert: at most 1 step in lockstep"),
        ("good", "tflite_micro ran it"),
        ("good", "100 % of operators on the NPU"),
    ]
    two = dataclasses.replace(site, max_steps=2)
    none = dataclasses.replace(site, max_steps=0)
    wrong = dataclasses.replace(
        right,
        float_operators=3,
        estimate=npu,
        runtimes=(
            RuntimeReport(runtime="litert", sites=(none, two)),
            RuntimeReport(runtime="tflite_micro", problem="no kernel"),
        ),
    )
    assert verdicts(wrong) == [
        ("bad", "3 operators read or write floats"),
        ("bad", "litert: at most 2 steps in lockstep"),
        ("bad", "tflite_micro did not run it"),
        ("bad", "75 % of operators on the NPU"),
    ]


def test_without_lockstep_there_is_no_range_use() -> None:
    row = layer("a", clipped_share=None, grid_share=None, sqnr_db=None, max_steps={}, scale=None)
    text = dataclasses.replace(report(), layers=(row,), estimate=None, notes=()).to_html()
    assert tags(text).count("svg") == 2
    assert "Grid used" not in text and "ethos" not in text and "<h2>Notes" not in text


@given(st.floats(0, 1e15))
def test_scales_are_round_and_large_enough(value: float) -> None:
    top = html_page._round_up(value)
    assert top >= max(value, 1.0) or math.isclose(top, value)
    assert top <= max(1.0, 2.5 * value)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (950, "950"),
        (12_500, "12.5 k"),
        (999_950, "1 M"),
        (2_360_000, "2.36 M"),
        (3e9, "3 G"),
    ],
)
def test_counts_are_short(number: float, text: str) -> None:
    assert html_page.counted(number) == text


def test_layers_without_a_grid_have_work_and_no_use(tmp_path: Path) -> None:
    """Layers that stay float stand between those that have a grid."""
    plain = layer("plain", grid_share=None, clipped_share=None, sqnr_db=None, max_steps={})
    mixed = dataclasses.replace(report(), layers=(layer("a"), plain, layer("b")))
    text = mixed.to_html()
    tags(text)
    assert text.count("no grid here") == 1
    # Two plots of what is rounded, two of all.
    assert text.count("<rect") == 2 * 2 + 2 * 3
    for words in ("SQNR, dB", "multiply-accumulates", "layers, input to output"):
        assert words in text


def test_node_data_names_tensors_and_numbers(tmp_path: Path) -> None:
    plain = layer("plain", grid_share=None, clipped_share=None, sqnr_db=None, max_steps={})
    files = dataclasses.replace(report(), layers=(layer("a"), plain)).save_node_data(tmp_path / "n")
    found = {path.stem: json.loads(path.read_text()) for path in files}
    assert found["macs"]["results"] == {"a": {"value": 12_345}, "plain": {"value": 12_345}}
    assert found["sqnr_db"]["results"] == {"a": {"value": 25.0}}
    assert found["clipped_percent"]["results"]["a"]["value"] == pytest.approx(2.0)
    assert [stop["stop"] for stop in found["macs"]["gradient"]] == [0, 1]
    assert dataclasses.replace(report(), layers=()).save_node_data(tmp_path / "n") == ()
