"""The search: an optimum by brute force, the bytes of real files, a network on real data."""

import itertools
import re
import warnings
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import kqat
import tflite_export
from kqat import policy_search
from kqat.analysis import measured_layers
from kqat.graph import trace
from kqat.policy_search import Budget, _Problem
from tests.kqat.planning.test_tied_weights import KINDS, data_of


@pytest.fixture(scope="module")
def network() -> tuple[keras.Model, np.ndarray]:
    keras.utils.set_random_seed(0)
    chain = [
        layers.Dense(64, activation="relu", name="a"),
        layers.Dense(48, activation="relu", name="b"),
        layers.Dense(64, activation="relu", name="c"),
        layers.Dense(5, name="head"),
    ]
    model = keras.Sequential([keras.Input((32,), name="x"), *chain])
    return model, np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)


CHOICES = ("int8", "w4a8", "w2a8")


@pytest.mark.slow
def test_no_other_policy_within_the_budget_loses_less(
    network: tuple[keras.Model, np.ndarray], tmp_path: Path
) -> None:
    model, x = network
    found = kqat.search(model, x, budget=0.6, target="litert", choices=CHOICES)
    costs = found.sensitivity
    assert costs is not None
    size = {"int8": 1.0, "w4a8": 0.5, "w2a8": 0.25}

    def cost(choices: tuple[str, ...]) -> float:
        return sum(costs.cost(n, c) for n, c in zip(costs.layers, choices, strict=True))

    def weight(choices: tuple[str, ...]) -> float:
        pairs = zip(costs.layers, choices, strict=True)
        return sum(costs.weights[name] * size[choice] for name, choice in pairs)

    mine = tuple(found.choices[name] for name in costs.layers)
    fits = [
        every for every in itertools.product(CHOICES, repeat=4) if weight(every) <= weight(mine)
    ]
    assert min(map(cost, fits)) == pytest.approx(cost(mine))
    # The policy is saved, and its file is within the budget.
    found.save(tmp_path / "policy.json")
    loaded = kqat.QuantizePolicy.load(tmp_path / "policy.json")
    assert (loaded.default, loaded.rules) == (found.default, found.rules)
    files = {
        name: len(
            tflite_export.convert(
                kqat.quantize_model(model, policy, calibration_data=x), target="litert"
            )
        )
        for name, policy in (("int8", "int8"), ("found", loaded))
    }
    assert files["found"] == found.used <= found.budget == 0.6 * files["int8"]
    used = [point.used for point in found.pareto]
    lost = [point.cost for point in found.pareto]
    assert len(used) > 2 and used == sorted(used) and lost == sorted(lost, reverse=True)
    assert "MAC" not in found.text() and "bytes" in found.text()
    check_table(found, files["int8"], tmp_path)


def check_table(found: kqat.SearchedPolicy, largest: int, folder: Path) -> None:
    rows = found.rows()
    assert [row.used for row in rows] == sorted(row.used for row in rows)
    by_name = {row.name: row for row in rows}
    mine = by_name["found"]
    assert (mine.used, mine.within) == (found.used, True)
    assert by_name["int8"].used == largest and not by_name["int8"].within
    assert by_name["int8"].presets == {"int8": 4} and sum(mine.presets.values()) == 4
    assert "<- found" in found.text()
    # The policy loses less than each choice for all layers that takes no more.
    rivals = [by_name[c] for c in CHOICES if c in by_name and by_name[c].used <= mine.used]
    assert rivals and all(mine.cost < rival.cost for rival in rivals)
    found.plot(folder / "pareto.svg")
    drawn = (folder / "pareto.svg").read_text()
    assert "<svg" in drawn
    with pytest.raises(kqat.KqatError, match=r"ends in \.png, \.svg or \.pdf"):
        found.plot(folder / "pareto.txt")


@pytest.mark.slow
def test_no_warning_speaks_of_the_samples_that_sizes_are_measured_with(
    network: tuple[keras.Model, np.ndarray],
) -> None:
    model, x = network
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kqat.search(model, x, budget=0.9, target="litert")
    assert [w for w in caught if issubclass(w.category, kqat.CalibrationWarning)] == []


@pytest.mark.slow
def test_a_budget_that_nothing_meets_names_the_nearest_that_works(
    network: tuple[keras.Model, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = network
    weighed: list[Any] = []
    quantized = policy_search._quantized

    def noted(model: keras.Model, inputs: Any, policy: kqat.QuantizePolicy) -> keras.Model:
        weighed.append(policy.rules)
        return quantized(model, inputs, policy)

    monkeypatch.setattr(policy_search, "_quantized", noted)
    with pytest.raises(kqat.PolicyError, match="The least that works is") as caught:
        kqat.search(model, x, budget=900, target="litert")
    # A file for each preset, and none twice.
    assert len(weighed) == len(set(weighed)) == 2
    least = int(re.search(r"works is ([\d,]+)", str(caught.value))[1].replace(",", ""))
    with warnings.catch_warnings():
        # What the search calibrates for itself, on few samples, is nothing to warn its user of.
        warnings.filterwarnings("error", ".*2 samples are few", kqat.CalibrationWarning)
        found = kqat.search(model, x, budget=least, target="litert")
    assert found.used == least
    assert set(found.choices.values()) == {"w4a8"}


def test_layers_that_are_kept_stay_and_macs_are_counted(
    network: tuple[keras.Model, np.ndarray],
) -> None:
    model, x = network
    keep = {"a": "int8", "head": None}
    found = kqat.search(model, x, budget=0.7, measure="mac_bits", keep=keep)
    assert set(found.choices) == {"b", "c"}
    plan = {layer.name: layer for layer in kqat.plan(model, found).layers}
    assert plan["a"].weights["kernel"].bits == 8
    assert kqat.plan(model, found).float_layers() == ("head",)
    bits = {"int8": 8, "w4a8": 4}
    counts = {"b": 64 * 48, "c": 48 * 64}
    used = 8 * (8 * 32 * 64 + sum(n * bits[found.choices[name]] for name, n in counts.items()))
    assert found.used == used
    assert found.budget == pytest.approx(0.7 * 64 * (32 * 64 + 2 * 48 * 64))


@pytest.mark.parametrize("kind", ["two heads", "decoder", "within TimeDistributed", "function"])
def test_layers_that_read_one_weight_are_one_choice(kind: str) -> None:
    model = KINDS[kind][0]()
    x = data_of(model)
    found = kqat.search(model, x, budget=0.6, measure="mac_bits")
    ((first, choice),) = ((n, c) for n, c in found.choices.items() if n in kqat.plan(model).tied[0])
    assert choice == "w4a8"
    plan, names = kqat.plan(model, found), kqat.plan(model).tied[0]
    bits = {n.bits for part in plan.layers if part.origin in names for n in part.weights.values()}
    assert bits == {4}
    assert found.sensitivity is not None
    assert found.sensitivity.tied[first] == names
    assert f"one choice: {', '.join(names)}" in str(found.sensitivity)
    # What is kept of one of them is kept of all.
    others = {node.name: "int8" for node in trace(model).nodes if node.name not in names}
    with pytest.raises(kqat.PolicyError, match="Expected layers for the search to decide about"):
        kqat.search(model, x, budget=0.6, measure="mac_bits", keep={**others, names[-1]: "int8"})


def test_a_weight_of_two_calls_is_stored_once_and_computed_twice() -> None:
    x, wide = keras.Input((16,)), layers.Dense(16, name="wide")
    model = keras.Model(x, layers.Dense(16, name="last")(wide(layers.ReLU()(wide(x)))))
    data = np.random.default_rng(0).normal(size=(32, 16)).astype(np.float32)
    sizes = {
        measure: _Problem.of(*_measured(model, data), ["wide", "last"], Budget(measure), None).sizes
        for measure in ("flash", "mac_bits")
    }
    assert sizes["flash"].tolist() == [[256, 128], [256, 128]]
    assert sizes["mac_bits"].tolist() == [[2 * 256 * 64, 2 * 256 * 32], [256 * 64, 256 * 32]]


def _measured(model: keras.Model, data: np.ndarray) -> tuple[Any, Any]:
    return measured_layers(model, data, ("int8", "w4a8"), "int8", "sqnr", None)[:2]


def test_recurrent_layers_keep_the_first_choice() -> None:
    model = keras.Sequential(
        [keras.Input((4, 5)), layers.LSTM(6, name="lstm"), layers.Dense(8, name="head")]
    )
    x = np.random.default_rng(0).normal(size=(32, 4, 5)).astype(np.float32)
    found = kqat.search(model, x, budget=0.99, measure="mac_bits")
    assert found.choices == {"head": "w4a8"}
    # The gates of four steps, from the sequence and from the state.
    assert found.used == 8 * (8 * 4 * 24 * (5 + 6) + 4 * 6 * 8)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"measure": "joules"},
            r"Expected measure to be one of \['flash', 'arena'",
        ),
        ({"measure": "cycles", "target": "litert"}, "Expected an Ethos-U target for a budget of"),
        ({"measure": "mac_bits", "compress": "lookup"}, "Expected no compress"),
        ({"compress": "lookup", "target": "litert"}, "with compress='lookup': only TFLite Micro"),
        ({"budget": 0}, "Expected a budget above 0"),
        ({"keep": {"*": "int8"}}, "Expected layers for the search to decide about"),
    ],
)
def test_what_cannot_be_searched_is_refused(
    options: dict[str, object], words: str, network: tuple[keras.Model, np.ndarray]
) -> None:
    model, x = network
    with pytest.raises(kqat.KqatError, match=words):
        kqat.search(model, x, **{"budget": 0.9, **options})  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("measure", "target", "share"), [("arena", "tflite_micro", 0.9), ("cycles", "ethos_u55", 0.995)]
)
def test_arena_and_cycles_are_those_of_the_file(measure: str, target: str, share: float) -> None:
    if measure == "cycles":
        pytest.importorskip("ethosu")
    keras.utils.set_random_seed(0)
    chain = [
        layers.Conv2D(32, 3, padding="same", activation="relu", name="a"),
        layers.Conv2D(32, 3, activation="relu", name="b"),
        layers.GlobalAveragePooling2D(),
        layers.Dense(256, activation="relu", name="wide"),
        layers.Dense(256, name="head"),
    ]
    model = keras.Sequential([keras.Input((8, 8, 16), name="x"), *chain])
    x = np.random.default_rng(0).normal(size=(32, 8, 8, 16)).astype(np.float32)
    order = ("w2a8", "int8") if measure == "arena" else ("int8", "w2a8")
    found = kqat.search(model, x, budget=share, measure=measure, target=target, choices=order)
    blob = tflite_export.convert(
        kqat.quantize_model(model, found, calibration_data=x), target=target
    )
    if measure == "arena":
        used = tflite_export.runtimes.tflite_micro_arena_bytes(blob)
    else:
        used = tflite_export.devices.estimate(blob, target).cycles
    assert used == found.used <= found.budget
    # Weights that are unpacked into the arena cost there, and are noisier; on the NPU fewer bits
    # are read faster, and no more layers change than the budget asks for.
    assert set(found.choices.values()) == ({"int8"} if measure == "arena" else set(order))


@pytest.mark.slow
def test_a_mixed_policy_beats_four_bits_everywhere_at_the_same_size() -> None:
    """Handwritten digits: sizes are those of files, noise is that on digits not seen, untrained."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x = (digits.images[order, ..., None] / 16.0).astype(np.float32)
    y = digits.target[order]
    keras.utils.set_random_seed(0)

    def block(channels: int) -> list[keras.layers.Layer]:
        return [
            layers.DepthwiseConv2D(3, padding="same", use_bias=False),
            layers.BatchNormalization(), layers.ReLU(6.0),
            layers.Conv2D(channels, 1, use_bias=False),
            layers.BatchNormalization(), layers.ReLU(6.0),
        ]  # fmt: skip

    chain = [
        layers.Conv2D(8, 3, padding="same", use_bias=False),
        layers.BatchNormalization(), layers.ReLU(6.0),
        *block(16), layers.MaxPooling2D(), *block(32),
        layers.Flatten(), layers.Dense(96, activation="relu", name="hidden"), layers.Dense(10),
    ]  # fmt: skip
    model = keras.Sequential([keras.Input((8, 8, 1)), *chain])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(2e-3), loss, metrics=["accuracy"])
    model.fit(x[:1300], y[:1300], epochs=8, verbose=0)
    want = model.predict(x[1300:], verbose=0)

    def judged(policy: object) -> tuple[int, float]:
        qat = kqat.quantize_model(model, policy, calibration_data=x[:256])
        noise = np.mean((qat.predict(x[1300:], verbose=0) - want) ** 2) / np.mean(want**2)
        blob = tflite_export.convert(qat, target="cmsis_nn", compress="smallest")
        return len(blob), float(-10 * np.log10(noise))

    whole, four = judged("int8"), judged("w4a8")
    mixed = kqat.search(
        model,
        x[:256],
        budget=min(four[0], int(0.6 * whole[0])),
        target="cmsis_nn",
        choices=("int8", "w4a8", "w3a8", "w2a8"),
        compress="smallest",
    )
    size, sqnr = judged(mixed)
    print(f"int8 {whole}, w4a8 {four}, mixed {(size, sqnr)}\n{mixed.text()}")
    assert size <= four[0] and size <= 0.6 * whole[0]
    # As much as half a bit more for every weight, at 6 dB a bit.
    assert sqnr > four[1] + 3.0
