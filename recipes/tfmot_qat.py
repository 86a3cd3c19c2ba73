"""QAT of the lab's network by tfmot in Keras 2, with the same weights, batches and epochs.

The lab runs this in a child process with TF_USE_LEGACY_KERAS=1:

    TF_USE_LEGACY_KERAS=1 python -m recipes.tfmot_qat --request request.json

The request names the files of weights and samples, the output folder and the training options.
Writes model.tflite, by TensorFlow's converter, and history.json to the folder. Continues from its
last epoch if it was killed.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras
from tensorflow_model_optimization import quantization
from tensorflow_model_optimization.python.core.api.experimental import combine

from kqat.base import write_file
from recipes.data import Samples
from recipes.models import mobilenet_v2
from recipes.timing import Seconds
from recipes.training import Batches


def main(argv: Sequence[str] | None = None) -> None:
    """Trains and converts the network of the request."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--request", type=Path, required=True)
    request = json.loads(parser.parse_args(argv).request.read_text())
    folder = Path(request["folder"])
    tf_keras.utils.set_random_seed(request["seed"])
    model = mobilenet_v2(framework=tf_keras, **request["network"])
    with np.load(request["weights"]) as file:
        model.set_weights([file[name] for name in file.files])
    qat = _quantized(model)
    with np.load(request["samples"]) as file:
        batches = Batches((file["images"], file["labels"]), seed=request["seed"])
    _train(qat, batches, folder, request["epochs"], request["learning_rate"])
    write_file(folder / "model.tflite", convert(qat))


def _quantized(model: Any) -> Any:
    """The QAT model whose zero weights stay zero."""
    keras = quantization.keras
    return keras.quantize_apply(
        keras.quantize_annotate_model(model), combine.Default8BitPrunePreserveQuantizeScheme()
    )


def _train(model: Any, batches: Batches, folder: Path, epochs: int, learning_rate: float) -> None:
    rate = tf_keras.optimizers.schedules.CosineDecay(learning_rate, epochs * len(batches))
    model.compile(
        tf_keras.optimizers.Adam(rate), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    done = tf.Variable(0)
    state = tf.train.Checkpoint(model=model, optimizer=model.optimizer, done=done)
    manager = tf.train.CheckpointManager(state, folder / "checkpoints", max_to_keep=1)
    model.optimizer.build(model.trainable_variables)
    manager.restore_or_initialize()
    path = folder / "history.json"
    history = json.loads(path.read_text())[: int(done)] if int(done) else []
    started: list[Seconds] = []

    def begin(epoch: int, logs: dict[str, float]) -> None:
        started.append(Seconds.now())

    def end(epoch: int, logs: dict[str, float]) -> None:
        took = Seconds.now().since(started[-1])
        row = {name: float(value) for name, value in logs.items()}
        row |= {"seconds": took.wall, "processor_seconds": took.processor}
        history.append(row)
        write_file(path, json.dumps(history, indent=1).encode())
        done.assign(epoch + 1)
        manager.save()

    if int(done) < epochs:
        model.fit(
            _stream(batches, int(done), epochs),
            steps_per_epoch=len(batches),
            initial_epoch=int(done),
            epochs=epochs,
            callbacks=[tf_keras.callbacks.LambdaCallback(on_epoch_begin=begin, on_epoch_end=end)],
            verbose=2,
        )


def _stream(batches: Batches, first: int, epochs: int) -> Iterator[Samples]:
    for epoch in range(first, epochs):
        for index in range(len(batches)):
            yield batches.batch(epoch, index)


def convert(model: Any) -> bytes:
    """A trained model of tfmot converted as in its guide, with integer inputs and outputs."""
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.inference_input_type = converter.inference_output_type = tf.int8
    return converter.convert()


if __name__ == "__main__":
    main()
