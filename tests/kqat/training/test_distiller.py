"""The distiller: its losses by hand, an ordinary model that is saved, and what it refuses."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import kqat


def float_model(units: int = 4, last: str | None = None) -> keras.Model:
    x = keras.Input((6,), name="x")
    y = layers.Dense(16, activation="relu", name="hidden")(x)
    return keras.Model(x, layers.Dense(units, activation=last, name="head")(y), name="net")


@pytest.fixture(scope="module")
def data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(64, 6)).astype(np.float32), rng.integers(0, 4, 64)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_the_losses_are_those_of_the_papers(data: tuple[np.ndarray, np.ndarray]) -> None:
    x, _ = data
    rng = np.random.default_rng(1)
    own, other = (rng.normal(size=(8, 4)).astype(np.float32) for _ in range(2))
    model, teacher = float_model(), float_model()
    logits = kqat.Distiller(model, teacher, temperature=2.0)
    p, q = softmax(other / 2.0), softmax(own / 2.0)
    by_hand = 4.0 * np.mean(np.sum(p * np.log(p / q), axis=-1))
    assert float(logits.difference(own, other)) == pytest.approx(by_hand, rel=1e-5)
    # Behind a softmax the logits are known up to a constant.
    found = kqat.Distiller(model, teacher, kind="probabilities", temperature=2.0)
    assert float(found.difference(softmax(own), softmax(other))) == pytest.approx(by_hand, rel=1e-4)
    values = kqat.Distiller(model, teacher, kind="values")
    by_hand = np.mean((own - other) ** 2) / np.mean(other**2)
    assert float(values.difference(own, other)) == pytest.approx(by_hand, rel=1e-5)
    # In training these are the losses; otherwise there are none.
    features = {"hidden": "hidden"}
    both = kqat.Distiller(
        model, teacher, kind="values", weight=2.0, features=features, feature_weight=3.0
    )
    both(x, training=True)
    hidden = [np.maximum(m.get_layer("hidden")(x).numpy(), 0.0) for m in (model, teacher)]
    outputs = [m(x).numpy() for m in (model, teacher)]
    by_hand = [
        weight * np.mean((a - b) ** 2) / np.mean(b**2)
        for weight, (a, b) in ((2.0, outputs), (3.0, hidden))
    ]
    np.testing.assert_allclose([float(one) for one in both.losses], by_hand, rtol=1e-4)
    both(x, training=False)
    assert both.losses == []


def test_inputs_by_name_reach_the_inputs_of_these_names() -> None:
    """Not in the order of the names, in which Keras flattens a dict."""
    inputs = [keras.Input((3,), name=name) for name in ("right", "left")]
    student = keras.Model(inputs, layers.Dense(2)(layers.Concatenate()(inputs)))
    right, left = (np.full((1, 3), value, np.float32) for value in (1.0, 2.0))
    distiller = kqat.Distiller(student, keras.models.clone_model(student), kind="values")
    expected = student([right, left])
    for given in ({"left": left, "right": right}, [right, left]):
        np.testing.assert_array_equal(distiller(given, training=True), expected)


@pytest.mark.slow
def test_a_student_comes_closer_and_is_saved(
    data: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    x, y = data
    teacher = float_model()
    qat = kqat.quantize_model(teacher, "w2a8", calibration_data=x)
    before = [np.array(v) for v in teacher.weights]
    distiller = kqat.Distiller(qat, teacher, features={"hidden": "hidden"})
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    distiller.compile(keras.optimizers.Adam(5e-3), loss, metrics=["accuracy"])
    gap = np.mean((qat.predict(x, verbose=0) - teacher.predict(x, verbose=0)) ** 2)
    fitted = distiller.fit(x, y, validation_data=(x, y), epochs=1, verbose=0).history
    assert fitted["loss"][0] > fitted["val_loss"][0]  # The teacher's part is not in the latter.
    # Labels aside: the teacher alone.
    alone = kqat.Distiller(qat, teacher, kind="values")
    alone.compile(keras.optimizers.Adam(1e-3))
    alone.fit(x, epochs=60, verbose=0)
    assert np.mean((qat.predict(x, verbose=0) - teacher.predict(x, verbose=0)) ** 2) < 0.5 * gap
    for variable, value in zip(teacher.weights, before, strict=True):
        np.testing.assert_array_equal(variable, value)
    distiller.save(tmp_path / "distiller.keras")
    loaded = keras.models.load_model(tmp_path / "distiller.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), qat.predict(x, verbose=0))
    assert loaded.features == {"hidden": "hidden"}
    loaded.fit(x, y, verbose=0)
    assert [w.bits for w in kqat.freeze(loaded.student).weights] == [2, 2]


@pytest.mark.slow
def test_structures_of_inputs_and_outputs_are_the_students() -> None:
    inputs = {"a": keras.Input((3,), name="a"), "b": keras.Input((3,), name="b")}
    z = layers.Add(name="sum")(list(inputs.values()))
    outputs = {"u": layers.Dense(2, name="u")(z), "v": layers.Dense(3, name="v")(z)}
    teacher = keras.Model(inputs, outputs)
    x = {name: np.random.default_rng(0).normal(size=(40, 3)).astype("float32") for name in "ab"}
    qat = kqat.quantize_model(teacher, calibration_data=x)
    distiller = kqat.Distiller(qat, teacher, kind="values")
    distiller.compile("sgd", {"u": "mse", "v": "mse"})
    targets = {"u": np.zeros((40, 2)), "v": np.zeros((40, 3))}
    distiller.fit(x, targets, verbose=0)
    assert set(distiller.predict(x, verbose=0)) == {"u", "v"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"teacher": float_model(units=5)}, r"of outputs: for the outputs \[\(4,\)\]"),
        ({"features": {"hidden": "head"}}, r"of features: for 'hidden' \[\(16,\)\]"),
        ({"features": {"hiden": "hidden"}}, "name layers of 'net'. Received: 'hiden'"),
        ({"kind": "softmax"}, "Expected kind to be one of"),
        ({"temperature": 0}, "Expected a temperature above 0"),
        ({"weight": 0.0, "feature_weight": 0.0}, "Expected weights of at least 0"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(options: dict[str, Any], words: str) -> None:
    options = {"teacher": float_model(), **options}
    with pytest.raises(kqat.ModelError, match=words):
        kqat.Distiller(float_model(), **options)


class Subclassed(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = layers.Dense(16, "relu"), layers.Dense(4)

    def call(self, x: Any) -> Any:
        return self.head(self.hidden(x))


def test_a_subclassed_teacher_teaches(data: tuple[np.ndarray, np.ndarray]) -> None:
    """It has no `outputs`, which ended in an AttributeError."""
    x, y = data
    teacher = Subclassed()
    teacher(x)
    qat = kqat.quantize_model(teacher, calibration_data=x)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    kqat.finetune(qat, (x, y), epochs=1, loss=loss, teacher=teacher, kind="logits", verbose=0)
    assert np.isfinite(np.asarray(qat(x))).all()
