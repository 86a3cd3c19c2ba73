"""What do SmoothQuant, AWQ and GPTQ win on a transformer, and on one with outlier channels?

    python -m recipes.outliers --out out/outliers

The text transformer of `recipes.transformer` learns TREC's questions in float. Its twin computes
the same function, but two channels behind each normalization are forty times as large, and the rows
of the kernels that read them forty times smaller, as in large language models (Dettmers et al.
2022, https://arxiv.org/abs/2208.07339). Both are calibrated only, at 8 and at 4 bits of weights,
before and after each method.

Writes to --out: results.json.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

import kqat
import tflite_export
from kqat import algorithms
from recipes import running, transformer
from recipes.models import text_transformer, transformers
from recipes.running import Table
from recipes.shipping import CALIBRATION_SAMPLES
from recipes.training import fit

CHANNELS = (5, 29)
FACTOR = 40.0
POLICIES = ("int8", "w4a8")
LEGEND = """\
agreement  share of the test questions on which the file and the float model
           name the same class
SQNR       of the file's probabilities against the float model's, in dB
searched   the exponent of each normalization searched (alpha="search")"""

Method = Callable[[keras.Model, Any], keras.Model]


def _smoothed(qat: keras.Model, x: Any) -> keras.Model:
    return algorithms.smooth_quant(qat, x)


def _searched(qat: keras.Model, x: Any) -> keras.Model:
    return algorithms.smooth_quant(qat, x, alpha="search")


def _searched_then_gptq(qat: keras.Model, x: Any) -> keras.Model:
    return algorithms.gptq(_searched(qat, x), x)


METHODS: dict[str, Method] = {
    "none": lambda qat, x: qat,
    "SmoothQuant": _smoothed,
    "SmoothQuant, searched": _searched,
    "AWQ": algorithms.awq,
    "GPTQ": algorithms.gptq,
    "SmoothQuant, then GPTQ": _searched_then_gptq,
}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the recipe with command-line arguments; returns what results.json holds."""
    options = _options(argv)
    running.start(options)
    model = text_transformer(transformer.STEPS, transformer.VOCABULARY, transformer.CLASSES["text"])
    if options.smoke:
        random = np.random.default_rng(0)
        x = random.integers(0, transformer.VOCABULARY, (16, transformer.STEPS), dtype=np.int32)
        train = test = x, random.integers(0, transformer.CLASSES["text"], 16)
    else:
        train, test = transformer.questions(options.train_samples)
    fit(model, train, options.epochs, transformer.LEARNING_RATE, batch_size=transformer.BATCH_SIZE)
    want = running.keras_outputs(model, test[0])
    images = train[0][:CALIBRATION_SAMPLES]
    networks = {"as trained": model, "with outliers": planted(model)}
    rows = []
    for network, one in networks.items():
        drift = running.sqnr_db(want, running.keras_outputs(one, test[0]))
        if drift < 80.0:
            raise RuntimeError(f"Expected the same function. Received: {drift:.1f} dB.")
        for policy in options.policies:
            start = kqat.quantize_model(one, policy, calibration_data=images)
            for name, method in METHODS.items():
                print(f"{network}, {policy}: {name}", flush=True)
                blob = tflite_export.convert(method(start, images), target="litert")
                (got,) = running.predict(blob, [test[0]])
                rows.append(
                    {
                        "network": network,
                        "policy": policy,
                        "method": name,
                        "accuracy": running.accuracy(got, test[1]),
                        "agreement": running.accuracy(got, want.argmax(-1)),
                        "sqnr_db": running.sqnr_db(want, got),
                        "file_bytes": len(blob),
                    }
                )
    found = {
        "test_samples": len(test[1]),
        "float_accuracy": running.accuracy(want, test[1]),
        "rows": rows,
    }
    results = running.save_results(options, "outliers", found)
    running.show(tables(results))
    return results


def tables(results: dict[str, Any]) -> list[Table]:
    """One table for each network, from what results.json holds."""
    float_accuracy = running.percent(results["float_accuracy"])
    header = ("", "weights", "accuracy", "agreement", "SQNR", "bytes")
    found = []
    for network in dict.fromkeys(row["network"] for row in results["rows"]):
        rows = [
            (
                row["method"],
                row["policy"],
                running.percent(row["accuracy"]),
                running.percent(row["agreement"]),
                f"{row['sqnr_db']:.1f}",
                running.counted(row["file_bytes"]),
            )
            for row in results["rows"]
            if row["network"] == network
        ]
        title = (
            f"Text transformer {network}, calibrated only, {results['test_samples']:,} test "
            f"questions, float {float_accuracy}"
        )
        found.append(Table(title, header, rows, LEGEND))
    return found


def planted(model: keras.Model) -> keras.Model:
    """A copy that computes the same, with `CHANNELS` behind each block's normalizations larger."""
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    for block in range(1, transformers.BLOCKS + 1):
        attention = copy.get_layer(f"block{block}_attention")
        readers = [
            v
            for v in attention.weights
            if v.path.endswith("kernel") and "attention_output" not in v.path
        ]
        _enlarge(copy.get_layer(f"block{block}_norm1"), readers)
        _enlarge(
            copy.get_layer(f"block{block}_norm2"), [copy.get_layer(f"block{block}_wide").kernel]
        )
    return copy


def _enlarge(norm: Any, readers: Sequence[keras.Variable]) -> None:
    """Multiplies the channels of a normalization, and divides the rows that read them."""
    factor = np.ones(norm.gamma.shape, np.float32)
    factor[list(CHANNELS)] = FACTOR
    for variable in (norm.gamma, norm.beta):
        variable.assign(np.asarray(variable) * factor)
    for kernel in readers:
        shape = (-1, *[1] * (len(kernel.shape) - 1))
        kernel.assign(np.asarray(kernel) / factor.reshape(shape))


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = running.parser(__doc__, out="out/outliers")
    parser.add_argument("--epochs", type=int, default=8, help="in float (default 8)")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--train-samples", type=int, default=20_000, help="at most")
    options = parser.parse_args(argv)
    if options.smoke:
        options.epochs = 1
    return options


if __name__ == "__main__":
    main()
