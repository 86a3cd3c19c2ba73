"""Writes the pages of `docs/reference` from the tables of the code: presets, devices, operators.

python -m docs.tables
"""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from kqat.config import PRESETS
from kqat.devices import INT16, RUNTIMES, TARGETS, Target, runtimes_with
from kqat.grids import CALIBRATION_METHODS, GRADIENTS, RANGE_METHODS, STEP_METHODS, QuantSpec
from tflite_export.kernels import OP_TABLE, OpRule

FOLDER = Path(__file__).parent / "reference"
RUNTIME_ORDER = ("litert", "litert_reference", "tflite_micro")
WRITTEN = (
    "`python -m docs.tables` writes this page from the tables of the code; a test checks that it "
    "is up to date."
)


def pages() -> dict[str, str]:
    """File name -> text of each page."""
    return {"presets.md": presets(), "targets.md": targets(), "operators.md": operators()}


def presets() -> str:
    """The presets, and the methods that have a name."""
    rows = [
        (
            f"`{name}`",
            _grid(config.weights) if isinstance(config.weights, QuantSpec) else "",
            _class(type(config.weight_step)),
            _grid(config.activation),
        )
        for name, config in PRESETS.items()
    ]
    return "".join(
        (
            f"# Presets and methods by name\n\n{WRITTEN}\n\n## Presets\n\n",
            "A preset is a `kqat.QuantizeConfig` with a name; it may stand wherever a config may: "
            "as the policy of a model, in its rules, on the command line.\n\n",
            _table(("Preset", "Weights", "Step of the weights", "Activations"), rows),
            "\n## Steps of weights\n\n`kqat.QuantizeConfig(weight_step=…)` takes a name for its "
            "defaults, or an object.\n\n",
            _methods(STEP_METHODS),
            "\n## Ranges of activations\n\n`kqat.QuantizeConfig(activation_range=…)`. Those marked "
            "with * are also what `calibration=` of `kqat.quantize_model` and `method=` of "
            "`kqat.calibrate` take, beside `auto`, which chooses.\n\n",
            _methods(RANGE_METHODS, marked=CALIBRATION_METHODS),
            "\n## Derivatives of rounding\n\n`kqat.QuantizeConfig(weight_gradient=…, "
            "activation_gradient=…)`.\n\n",
            _methods(GRADIENTS),
        )
    )


def targets() -> str:
    """The devices, and the operators that each accelerator runs."""
    rows = [
        (
            f"`{target.name}`",
            target.description,
            f"`{target.runtime}`",
            "packed" if target.packs_weights else "one a byte",
            _warns(target),
        )
        for target in TARGETS.values()
    ]
    parts = [
        f"# Devices\n\n{WRITTEN}\n\n`target=` of `kqat.plan`, `kqat.adapt`, `kqat.search`, "
        "`tflite_export.convert` and `tflite_export.verify` takes one of these names. The runtime "
        "runs the file, or what of it the accelerator does not run. Weights of four bits or fewer "
        "are packed where the runtime has the kernel.\n\n",
        _table(("Target", "Device", "Runtime", "4-bit weights", "Slow operators give"), rows),
    ]
    for target in TARGETS.values():
        if target.accelerator:
            parts.append(
                f"\n## {target.name}\n\nOn {target.accelerator}, with activations of 8 bits:\n"
                f"{_names(target.accelerated)}.\n"
            )
            wide = {op for op in target.accelerated if target.accelerates(op, 16)}
            parts.append(f"\nWith activations of 16 bits: {_names(wide) or 'none of them'}.\n")
    return "".join(parts)


def operators() -> str:
    """The operators that files of `tflite_export` may hold."""
    rows = [(f"`{name}`", *_operator(name, rule)) for name, rule in sorted(OP_TABLE.items())]
    return (
        f"# Operators\n\n{WRITTEN}\n\nEvery operator that a file may hold, and what its integer "
        "kernel demands. *Output scale*: its own, that of the inputs, or one that the kernel fixes "
        "(scale, zero point). *Weights*: whether an input holds weights that were trained. "
        "Runtimes are those that have the kernel for activations of 8 and of 16 bits: L is LiteRT "
        "with XNNPACK, R its reference kernels, M TensorFlow Lite Micro. *Packed*: runtimes that "
        "take weights of so many bits, where there is one scale per channel / one scale.\n\n"
        + _table(
            ("Operator", "Output scale", "Weights", "8 bits", "16 bits", "Packed weights"), rows
        )
    )


def _operator(name: str, rule: OpRule) -> tuple[str, ...]:
    scale = {"own": "own", "same": "the input's", "none": "none: indexes or truth values"}.get(
        rule.scales, ""
    )
    if rule.fixed is not None:
        scale = f"{rule.fixed[0]:.6g}, {rule.fixed[1]}"
    weights = "" if rule.weights is None else "yes, with a bias" if rule.bias else "yes"
    packed = [
        f"{bits} bits: {_runtimes(packing.per_axis)} / {_runtimes(packing.per_tensor)}"
        for bits, packing in sorted(rule.packed.items())
    ]
    wide = _runtimes(runtimes_with(name, 16)) if name in INT16 else "no"
    return scale, weights, _runtimes(runtimes_with(name, 8)), wide, "; ".join(packed)


def _runtimes(some: Iterable[str]) -> str:
    letters = dict(zip(RUNTIME_ORDER, "LRM", strict=True))
    # They stay in one line.
    return "&nbsp;".join(letters[name] for name in RUNTIME_ORDER if name in set(some)) or "no"


def _warns(target: Target) -> str:
    if not target.accelerator:
        return ""
    return "a note" if target.notes_only else "a warning"


def _grid(spec: QuantSpec) -> str:
    scales = "one scale per channel" if spec.axis == "channel" else "one scale"
    return f"{spec.bits} bit{'s' * (spec.bits > 1)}, {scales}{', symmetric' * spec.symmetric}"


def _methods(table: Mapping[str, type], marked: Iterable[str] = ()) -> str:
    rows = [
        (f"`{name}`{' *' * (name in set(marked))}", _class(method), _first_sentence(method))
        for name, method in table.items()
    ]
    return _table(("Name", "Class", "What it is"), rows)


def _class(method: type) -> str:
    return f"[`kqat.{method.__name__}`][kqat.{method.__name__}]"


def _first_sentence(thing: object) -> str:
    text = " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())
    text = text if text.endswith(".") else text.rstrip(",:") + "."
    return text.replace("|", "\\|")  # which would end the cell


def _names(operators: Iterable[str]) -> str:
    return ", ".join(sorted(operators))


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    assert set(RUNTIME_ORDER) <= RUNTIMES
    FOLDER.mkdir(exist_ok=True)
    for page, text in pages().items():
        (FOLDER / page).write_text(text)
        print(f"wrote reference/{page}")
