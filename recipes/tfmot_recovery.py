"""The cell of `recipes.recovery` that tfmot fills, in Keras 2, from the same weights and batches.

That recipe runs this in a child process:

    TF_USE_LEGACY_KERAS=1 python -m recipes.tfmot_recovery --request request.json

The request names the float `.keras` file and that of the samples, the `.tflite` to write, and the
options of training. Nothing is kept between runs.
"""

import argparse
import functools
import inspect
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tf_keras
from tensorflow_model_optimization import quantization

from kqat.base import write_file
from recipes import data, training
from recipes.tfmot_qat import convert


def main(argv: Sequence[str] | None = None) -> None:
    """Trains and converts the network of the request."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--request", type=Path, required=True)
    request = json.loads(parser.parse_args(argv).request.read_text())
    tf_keras.utils.set_random_seed(request["seed"])
    model = in_keras2(keras.models.load_model(request["model"]))
    qat = quantization.keras.quantize_model(model)
    named = request["scaled_as"]
    with np.load(request["samples"]) as file:
        batches = training.Batches(
            (file["images"], file["labels"]),
            batch_size=request["batch_size"],
            seed=request["seed"],
            scale=functools.partial(data.model_input, named) if named else training.scaled,
            parts=request["parts"],
        )
    _train(qat, batches, request)
    write_file(Path(request["tflite"]), convert(qat))


def _train(qat: Any, batches: training.Batches, request: dict[str, Any]) -> None:
    """As `recipes.recovery` trains a float network: Adam, a warm-up and half a cosine."""
    steps = len(batches) * request["epochs"]
    warm = max(steps // 10, 1)
    rate = tf_keras.optimizers.schedules.CosineDecay(
        0.0, steps - warm, warmup_target=request["learning_rate"], warmup_steps=warm
    )
    loss = tf_keras.losses.SparseCategoricalCrossentropy(from_logits=request["from_logits"])
    qat.compile(tf_keras.optimizers.Adam(rate), loss)
    qat.fit(_stream(batches, request["epochs"]), steps_per_epoch=steps, verbose=0)


def _stream(batches: training.Batches, epochs: int) -> Iterator[data.Samples]:
    for epoch in range(epochs):
        for index in range(len(batches)):
            yield batches.batch(epoch, index)


def in_keras2(model: keras.Model) -> Any:
    """A functional model of stock layers, with its weights, as a model of Keras 2."""
    tensors: dict[str, Any] = {}
    made: dict[str, Any] = {}
    config = model.get_config()
    for layer in config["layers"]:
        name, given = layer["name"], layer["config"]
        if layer["class_name"] == "InputLayer":
            tensors[name] = tf_keras.Input(given["batch_shape"][1:], name=name)
            continue
        kind = getattr(tf_keras.layers, layer["class_name"])
        # Initializers and policies are dictionaries; weights come from the model.
        known = inspect.signature(kind.__init__).parameters
        options = {k: v for k, v in given.items() if k in known and not isinstance(v, dict)}
        made[name] = kind(**{**options, "name": name})
        read = [tensors[source] for source in _sources(layer["inbound_nodes"][0]["args"])]
        tensors[name] = made[name](read[0] if len(read) == 1 else read)
    inputs, outputs = (_names(config[key]) for key in ("input_layers", "output_layers"))
    ours = tf_keras.Model([tensors[n] for n in inputs], [tensors[n] for n in outputs])
    for name, layer in made.items():
        layer.set_weights(model.get_layer(name).get_weights())
    return ours


def _sources(given: Any) -> list[str]:
    """The names of the layers whose values a serialized call reads."""
    if isinstance(given, dict):
        if given.get("class_name") == "__keras_tensor__":
            return [given["config"]["keras_history"][0]]
        given = given.values()
    if isinstance(given, str) or not hasattr(given, "__iter__"):
        return []
    return [name for one in given for name in _sources(one)]


def _names(given: Any) -> list[str]:
    """Layers' names in `[name, 0, 0]`, or in a list of such."""
    return [given[0]] if isinstance(given[0], str) else [one[0] for one in given]


if __name__ == "__main__":
    main()
