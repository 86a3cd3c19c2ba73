"""Files that take turns. No test looks at a time."""

import keras

from recipes import converter
from recipes.latency import latencies


def test_every_file_runs_in_every_round() -> None:
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])
    blob = converter.float_tflite(model)
    measured = latencies({"a": blob, "b": blob}, rounds=3)
    assert {name: len(seconds) for name, seconds in measured.items()} == {"a": 3, "b": 3}
    assert min(s.wall for seconds in measured.values() for s in seconds) > 0
