"""What `TensorBoardQuantization` writes, read from its file; and that training is not disturbed."""

import logging
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers as L

import kqat
from kqat.analysis.tensorboard import _compiled

RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 8, 8, 2)).astype(np.float32)
Y = RNG.integers(0, 3, 64)


def model() -> keras.Model:
    keras.utils.set_random_seed(0)
    x = keras.Input((8, 8, 2), name="x")
    y = L.BatchNormalization(name="bn")(L.Conv2D(4, 3, name="conv")(x))
    y = L.Flatten(name="flat")(L.ReLU(name="relu")(y))
    y = L.Dense(6, activation="relu", name="hidden")(y)
    y = L.Dense(3, activation="softmax", name="head")(y)
    qat = kqat.quantize_model(keras.Model(x, y), {"hidden": "w4a8"}, calibration_data=X)
    qat.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return qat


def events(folder: Path) -> dict[str, dict[int, float]]:
    """Tag -> step -> number, as TensorFlow reads the records."""
    found: dict[str, dict[int, float]] = {}
    for path in sorted(folder.rglob("events.out.tfevents.*")):
        for record in tf.data.TFRecordDataset(str(path)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                assert value.metadata.plugin_data.plugin_name == "scalars" or value.tag in found
                number = float(tf.make_ndarray(value.tensor))
                found.setdefault(value.tag, {})[event.step] = number
    return found


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, keras.Model, Any]:
    folder, qat = tmp_path_factory.mktemp("logs"), model()
    callback = kqat.TensorBoardQuantization(folder, data=X)
    # GapCallback behind it: its logs come after this one's turn.
    history = qat.fit(
        X, Y, batch_size=16, epochs=3, verbose=0, callbacks=[callback, kqat.GapCallback((X, Y))]
    )
    return folder, qat, history.history


@pytest.mark.slow
def test_ranges_steps_and_device_metrics(written: tuple[Path, keras.Model, Any]) -> None:
    folder, qat, history = written
    found = events(folder)
    assert set(found["device/val_accuracy_device"]) == {0, 1, 2}
    for epoch, number in found["device/val_accuracy_device"].items():
        assert number == pytest.approx(history["val_accuracy_device"][epoch])
    quantizers = [la for la in qat.layers if isinstance(la, kqat.ActivationQuantizer)]
    for quantizer in quantizers:
        low, high = quantizer.range()
        name = quantizer.name.removesuffix("_quantizer")
        assert found[f"ranges/{name}/low"][2] == pytest.approx(low, rel=1e-6)
        assert found[f"ranges/{name}/high"][2] == pytest.approx(high, rel=1e-6)
        assert 0.0 <= found[f"clipped/{name}"][2] <= 1.0
    wrappers = [la for la in qat.layers if isinstance(la, kqat.QuantizeWrapper) and la.weight_specs]
    for wrapper in wrappers:
        tag = f"{wrapper.layer.name}/kernel"
        step = float(np.mean(wrapper.scale("kernel")))
        assert found[f"steps/{tag}"][2] == pytest.approx(step, rel=1e-5)
        assert 0.0 <= found[f"oscillating/{tag}"][2] <= 1.0
    assert "oscillating/all" in found


@pytest.mark.slow
def test_tensorboard_reads_it(written: tuple[Path, keras.Model, Any]) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    reader = accumulator.EventAccumulator(str(written[0] / "quantization"))
    reader.Reload()
    assert set(reader.Tags()["tensors"]) == set(events(written[0]))


@pytest.mark.slow
def test_clipped_shares_are_those_of_the_plot(tmp_path: Path) -> None:
    qat = model()
    callback = kqat.TensorBoardQuantization(tmp_path, data=X, oscillations=False)
    qat.optimizer.learning_rate = 0.0
    qat.run_eagerly = True  # One step, which takes less time than tracing it.
    qat.fit(X * 3.0, Y, batch_size=64, verbose=0, callbacks=[kqat.FreezeObservers(0), callback])
    from kqat.analysis.grid_use import counts_of_values, counts_of_weight, rounded_tensors
    from kqat.graph import trace

    graph, found = trace(qat), events(tmp_path)
    tensors = rounded_tensors(qat, graph)
    for tensor, counts in counts_of_values(graph, tensors, X).items():
        share = found[f"clipped/{tensor.title}"][0]
        assert share == pytest.approx(counts.clipped_share, abs=1e-6), tensor.names
    for tensor in tensors:
        if tensor.wrapper is not None:
            share = found[f"clipped/{tensor.title}"][0]
            assert share == pytest.approx(counts_of_weight(tensor).clipped_share, abs=1e-6)
    assert not any(tag.startswith("oscillating") for tag in found)


@pytest.mark.slow
def test_training_is_neither_traced_anew_nor_changed(tmp_path: Path) -> None:
    def weights(callbacks: list[Any]) -> tuple[list[np.ndarray], int]:
        qat = model()
        traces = 0
        step = qat.train_step

        def counted(*args: Any) -> Any:
            nonlocal traces
            traces += 1
            return step(*args)

        qat.train_step = counted
        qat.fit(X, Y, batch_size=16, epochs=2, verbose=0, shuffle=False, callbacks=callbacks)
        return qat.get_weights(), traces

    plain, traced = weights([])
    callback = kqat.TensorBoardQuantization(tmp_path, update_freq=3, data=X)
    seen, traced_with_it = weights([callback])
    assert traced_with_it == traced
    for a, b in zip(plain, seen, strict=True):
        np.testing.assert_array_equal(a, b)
    assert set(events(tmp_path)["ranges/head/low"]) == {3, 6}


@pytest.mark.slow
@pytest.mark.parametrize("first", [False, True])
def test_grids_that_fall_during_training_are_followed(tmp_path: Path, first: bool) -> None:
    qat = model()
    both = [kqat.FallingBits((8,), epochs=1), kqat.TensorBoardQuantization(tmp_path)]
    qat.optimizer.learning_rate = 0.0
    qat.fit(X, Y, epochs=2, verbose=0, callbacks=both[::-1] if first else both)
    steps = events(tmp_path)["steps/hidden/kernel"]
    assert steps[0] < steps[1] / 8
    assert events(tmp_path)["oscillating/all"][1] == 0.0


def test_tensorflow_has_nothing_to_say_of_what_is_compiled() -> None:
    """AutoGraph warns of an annotated variable behind an early return."""

    def counted() -> Any:
        if X is None:
            return 0.0
        found: dict[str, Any] = {}

        def note(value: Any) -> None:
            found.setdefault("a", []).append(value)

        note(keras.ops.ones(2))
        return found["a"][0]

    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    tf.get_logger().addHandler(handler)
    try:
        assert np.sum(_compiled(counted)()) == 2.0
    finally:
        tf.get_logger().removeHandler(handler)
    assert records == []


def test_what_it_cannot_do_is_refused(tmp_path: Path) -> None:
    for wrong in ("batch", 0, -1, True, 2.5):
        with pytest.raises(kqat.ModelError, match="update_freq"):
            kqat.TensorBoardQuantization(tmp_path, update_freq=wrong)  # type: ignore[arg-type]
    plain = keras.Sequential([keras.Input((3,)), L.Dense(2)])
    plain.compile("sgd", "mse")
    with pytest.raises(kqat.ModelError, match="QAT model for TensorBoardQuantization"):
        plain.fit(
            np.zeros((4, 3)), np.zeros((4, 2)), verbose=0,
            callbacks=[kqat.TensorBoardQuantization(tmp_path)],
        )  # fmt: skip
