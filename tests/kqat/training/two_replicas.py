"""Trains a small QAT model on two virtual CPUs and prints every copy of its ranges, as JSON.

TensorFlow makes virtual devices before it does anything else, so this is a process of its own.
"""

import json

import keras
import numpy as np
import tensorflow as tf

import kqat


def main() -> None:
    """Prints variable -> its values, one per replica."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        model = keras.Sequential([keras.Input((4,), name="x"), keras.layers.Dense(3, name="dense")])
        qat = kqat.quantize_model(model)  # Calibrated ranges would hardly move in two steps.
        qat.compile("sgd", "mse")
    rng = np.random.default_rng(0)
    # The second half of each batch, which the second replica sees, spreads ten times as far.
    x = rng.normal(size=(16, 4)) * np.tile(np.repeat([1.0, 10.0], 4), 2)[:, np.newaxis]
    options = {"batch_size": 8, "shuffle": False, "verbose": 0}
    # The callback reads how many steps there were, of which each replica keeps count.
    options["callbacks"] = [kqat.QuantizeAfter(0)]
    qat.fit(x.astype(np.float32), np.zeros((16, 3), np.float32), **options)
    copies = {
        variable.path: [copy.numpy().tolist() for copy in variable.value.values]
        for variable in qat.variables
        if variable.path.split("/")[-1] in ("low", "high", "count")
    }
    print("ranges:", json.dumps(copies))


if __name__ == "__main__":
    main()
