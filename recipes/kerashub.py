"""KerasHub's own BERT and ViT, trained and shipped as they are: int8 and 4-bit weights.

    pip install '.[zoo]'
    python -m recipes.kerashub --network bert --out out/kerashub_bert
    python -m recipes.kerashub --network vit --out out/kerashub_vit

`bert` is a `BertTextClassifier` that sorts TREC's questions into six kinds, from the first 16 words
of each; it takes token numbers, segments and a padding mask, and leaves the number of words open.
`vit` is a `ViTImageClassifier` that reads MNIST's images as 16 patches and a class token. Both have
two blocks, start from random weights, and are quantized without a change to the model.

Writes to --out: for each policy <policy>.tflite and <policy>.keras (QAT), report.json (the
verification of the last file) and results.json.
"""

import argparse
import importlib
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from kqat.graph import with_input_shapes
from recipes import converter, running, shipping, transformer
from recipes.data import Samples
from recipes.running import Row, Table
from recipes.training import fit

BATCH_SIZE = 64
LEARNING_RATE = 1e-3
# Low, because the weights need to move by only a few steps of their grids.
QAT_LEARNING_RATE = 1e-4
POLICIES = ("int8", "w4a8")
SIZES: dict[str, Any] = {"num_layers": 2, "num_heads": 4, "hidden_dim": 64}
EPOCHS = {"bert": 12, "vit": 8}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the recipe with command-line arguments; returns what results.json holds."""
    options = _options(argv)
    running.start(options)
    model, train, test = _task(options)
    fit(model, train, options.epochs, LEARNING_RATE, batch_size=BATCH_SIZE)
    rows = [running.measure_keras("FP32", model, test), _peer(model, train, test)]

    for policy in POLICIES:
        ptq = shipping.ptq(model, train, test, policy=policy)
        rows.append(_named(ptq.row, f"PTQ {policy}"))
        qat = shipping.train_on(
            ptq, train, test, options.qat_epochs, QAT_LEARNING_RATE, batch_size=BATCH_SIZE
        )
        rows.append(_named(qat.row, f"QAT {policy}"))
        shipping.write(options, qat, policy)
    found = {
        "test_samples": len(test[1]),
        "float_operators": qat.report.float_operators,
        "rows": running.as_json(rows),
    }
    results = running.save_results(options, "kerashub", found)
    running.show(tables(results))
    print(f"\nWritten to {options.out}")
    return results


def tables(results: dict[str, Any]) -> list[Table]:
    """What the recipe prints, from what results.json holds."""
    return running.network_tables(results)


def bert(classes: int = 6) -> keras.Model:
    """A small BERT classifier of random weights; its inputs are (batch, any number of words)."""
    backbone = _models().BertBackbone(
        vocabulary_size=transformer.VOCABULARY,
        intermediate_dim=128,
        max_sequence_length=transformer.STEPS,
        **SIZES,
    )
    return _models().BertTextClassifier(
        backbone=backbone, num_classes=classes, preprocessor=None, activation="softmax"
    )


def vit(classes: int = 10) -> keras.Model:
    """A small ViT classifier of random weights; its input is (batch, 28, 28, 1)."""
    backbone = _models().ViTBackbone(
        image_shape=(28, 28, 1), patch_size=7, mlp_dim=128, dropout_rate=0.1, **SIZES
    )
    return _models().ViTImageClassifier(
        backbone=backbone, num_classes=classes, preprocessor=None, activation="softmax"
    )


def as_bert(samples: Samples) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Word numbers (n, words), where 0 follows the last word, as BERT's three inputs."""
    words, labels = samples
    mask = (words != 0).astype(np.int32)
    return {"token_ids": words, "segment_ids": np.zeros_like(words), "padding_mask": mask}, labels


def _models() -> Any:
    try:
        return importlib.import_module("keras_hub").models
    except ImportError as error:
        raise SystemExit(
            f"Expected KerasHub. Received: {error}. Use `pip install '.[zoo]'`."
        ) from error


def _task(options: argparse.Namespace) -> tuple[keras.Model, Any, Any]:
    """The model, its training samples and its test samples."""
    if options.network == "vit":
        model, count = vit(), options.train_samples
        train, test = _fake((28, 28, 1)) if options.smoke else transformer.digits(count)
        return model, train, test
    words = (
        _fake((transformer.STEPS,))
        if options.smoke
        else transformer.questions(options.train_samples)
    )
    return bert(), as_bert(words[0]), as_bert(words[1])


def _fake(shape: tuple[int, ...]) -> tuple[Samples, Samples]:
    random = np.random.default_rng(0)
    if len(shape) == 1:
        x = random.integers(0, transformer.VOCABULARY, (16, *shape), dtype=np.int32)
    else:
        x = random.uniform(0, 1, (16, *shape)).astype(np.float32)
    batch = x, random.integers(0, 6, 16)
    return batch, batch


def _peer(model: keras.Model, train: Any, test: Any) -> Row:
    """The row of TensorFlow's own post-training int8 file."""
    shapes = {key: array.shape[1:] for key, array in _by_name(model, test[0]).items()}
    fixed = with_input_shapes(model, shapes)
    samples = running.first(train[0], shipping.CALIBRATION_SAMPLES)
    blob = converter.post_training_int8_of_many(fixed, samples)
    (outputs,) = converter.run_signature(blob, fixed, test[0])
    scores = outputs.astype(np.float32)  # Integers of one grid: the largest is the largest.
    return Row(
        name="PTQ int8, TensorFlow",
        accuracy=running.accuracy(scores, test[1]),
        file_bytes=len(blob),
    )


def _by_name(model: keras.Model, x: Any) -> dict[str, np.ndarray]:
    return x if isinstance(x, dict) else {model.inputs[0].name: x}


def _named(row: Row, name: str) -> Row:
    return Row(**{**vars(row), "name": name})


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = running.parser(__doc__, out="out/kerashub")
    parser.add_argument("--network", choices=EPOCHS, default="bert")
    parser.add_argument("--epochs", type=int, help="in float (default 12 for bert, 8 for vit)")
    parser.add_argument("--qat-epochs", type=int, default=3, help="quantized (default 3)")
    parser.add_argument("--train-samples", type=int, default=20_000, help="at most (default 20000)")
    options = parser.parse_args(argv)
    options.epochs = options.epochs or EPOCHS[options.network]
    if options.smoke:
        options.epochs = options.qat_epochs = 1
    return options


if __name__ == "__main__":
    main()
