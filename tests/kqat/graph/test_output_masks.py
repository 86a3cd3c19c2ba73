"""Losses of a QAT model leave out the steps that those of the float model leave out."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import kqat
import tflite_export
from kqat.graph.output_masks import MaskedOutput
from kqat.graph.tracer import trace

STEPS, WORDS, TAGS = 5, 9, 3


def _tagger(make: Any = None) -> keras.Model:
    x = keras.Input((STEPS,), dtype="int32", name="words")
    y = layers.Embedding(WORDS, 4, mask_zero=True)(x)
    y = make(y) if make else y
    y = layers.TimeDistributed(layers.Dense(TAGS, "softmax"), name="tags")(y)
    model = keras.Model(x, y, name="net")
    generator = np.random.default_rng(1)
    for weight in model.weights:
        weight.assign(generator.normal(size=weight.shape, scale=0.5))
    return model


def _data() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    words = generator.integers(1, WORDS, (24, STEPS)).astype(np.int32)
    words[::2, 3:] = 0
    return words, generator.integers(0, TAGS, (24, STEPS))


def _by_hand(model: keras.Model, words: np.ndarray, tags: np.ndarray) -> float:
    outputs = np.asarray(model(words))
    # As Keras does; rounded ones sum to near one.
    outputs = outputs / outputs.sum(axis=-1, keepdims=True)
    chosen = np.take_along_axis(outputs, tags[..., None], axis=-1)[..., 0]
    return float(-np.log(chosen[words != 0]).mean())


def _loss(model: keras.Model, words: np.ndarray, tags: np.ndarray) -> float:
    model.compile("sgd", "sparse_categorical_crossentropy")
    return float(model.evaluate(words, tags, verbose=0))


def test_a_graph_keeps_masks_beside_its_values() -> None:
    graph, (words, _) = trace(_tagger()), _data()
    (mask,) = graph.output_masks
    assert mask is not None and not graph.loses_masks
    np.testing.assert_array_equal(mask(words), words != 0)


@pytest.mark.slow
def test_a_loss_leaves_masked_steps_out(tmp_path: Path) -> None:
    words, tags = _data()
    model = _tagger()
    qat = kqat.quantize_model(model, calibration_data=words)
    assert qat.output_names == model.output_names == ["tags"]
    for one in (model, qat):
        assert abs(_loss(one, words, tags) - _by_hand(one, words, tags)) < 1e-5
    qat.save(tmp_path / "qat.keras")
    loaded = keras.saving.load_model(tmp_path / "qat.keras")
    assert abs(_loss(loaded, words, tags) - _by_hand(qat, words, tags)) < 1e-5
    # The graph has the values alone, and the file's output the name of the model's.
    graph = trace(loaded)
    assert graph.output_names == ("tags",) and len(graph.output_masks) == 1
    assert not any(type(node.layer).__name__ == "MaskedOutput" for node in graph.nodes)
    assert kqat.freeze(loaded).output_names == ("tags",)
    # So has the float model, which can go the same road again.
    stripped = kqat.strip(loaded)
    assert stripped.output_names == ["tags"]
    assert abs(_loss(stripped, words, tags) - _by_hand(stripped, words, tags)) < 1e-5
    again = kqat.quantize_model(stripped, calibration_data=words)
    assert abs(_loss(again, words, tags) - _by_hand(again, words, tags)) < 1e-5


def _with_a_mask_of_ours(annotated: bool = False) -> keras.Model:
    """A float model as `strip` makes it: what bears the output's name hands the mask on."""
    x = keras.Input((STEPS,), dtype="int32", name="words")
    (mask,) = trace(_tagger()).output_masks
    dense = layers.Dense(TAGS, "softmax", name="own")
    y = layers.Embedding(WORDS, 4)(x)
    y = (kqat.quantize_annotate_layer(dense) if annotated else dense)(y)
    return keras.Model(x, MaskedOutput(mask, name="tags")([y, x]), name="net")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Layers of 'net' stay float")
def test_copies_keep_the_masks_of_outputs() -> None:
    words, tags = _data()
    model, annotated = _with_a_mask_of_ours(), _with_a_mask_of_ours(annotated=True)
    for copy in (
        kqat.adapt(model, "tflite_micro"),
        kqat.adapt(model, calibration_data=words),
        kqat.quantize_apply(annotated, calibration_data=words),
    ):
        assert copy.output_names == ["tags"]
        assert abs(_loss(copy, words, tags) - _by_hand(copy, words, tags)) < 1e-5


@pytest.mark.slow
def test_masks_of_numbers_and_of_one_of_two_outputs() -> None:
    a, b = keras.Input((STEPS, 4), name="a"), keras.Input((2,), name="b")
    tags = layers.Dense(TAGS, name="tags")(layers.Masking()(a))
    model = keras.Model({"a": a, "b": b}, {"tags": tags, "whole": layers.Dense(1, name="whole")(b)})
    generator = np.random.default_rng(0)
    x = {"a": generator.normal(size=(8, STEPS, 4)), "b": generator.normal(size=(8, 2))}
    x = {key: value.astype(np.float32) for key, value in x.items()}
    x["a"][:, 3:] = 0
    y = {"tags": np.ones((8, STEPS, TAGS)), "whole": np.ones((8, 1))}
    qat = kqat.quantize_model(model, calibration_data=x)
    found = []
    for one in (model, qat):
        one.compile("sgd", {"tags": "mse", "whole": "mse"})
        logs = one.evaluate(x, y, verbose=0, return_dict=True)
        outputs = one(x)
        errors = [(np.asarray(outputs["tags"])[:, :3] - 1), np.asarray(outputs["whole"]) - 1]
        assert abs(logs["loss"] - sum(float(np.mean(e**2)) for e in errors)) < 1e-4
        found.append(logs["loss"])
    assert abs(found[0] - found[1]) < 0.1


@pytest.mark.slow
def test_the_file_of_a_tagger_is_right() -> None:
    words, tags = _data()
    qat = kqat.quantize_model(
        _tagger(layers.Bidirectional(layers.GRU(3, return_sequences=True))), calibration_data=words
    )
    qat.compile("sgd", "sparse_categorical_crossentropy")
    qat.fit(words, tags, verbose=0)
    report = tflite_export.verify(qat, tflite_export.convert(qat), words)
    assert all(r.is_right and r.exact and r.exact.is_exact for r in report.runtimes), report
