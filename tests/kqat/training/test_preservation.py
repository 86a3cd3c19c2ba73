"""Pruned and clustered weights: how they are made, kept in training, and found in the file."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import kqat
import tflite_export
from kqat.training.kmeans import clustered
from kqat.training.pruning import Pattern, mask
from tests.tflite_export.file_weights import file_integers


def network() -> keras.Model:
    chain = [
        layers.Conv2D(8, 3, use_bias=False, name="conv"),
        layers.BatchNormalization(name="norm"),
        layers.ReLU(name="relu"),
        layers.DepthwiseConv2D(3, name="depthwise"),
        layers.GlobalAveragePooling2D(name="pool"),
        layers.Dense(16, activation="relu", name="hidden"),
        layers.Dense(4, name="head"),
    ]
    model = keras.Sequential([keras.Input((8, 8, 4), name="image"), *chain], name="net")
    # Folding turns the integers of two channels over.
    model.get_layer("norm").gamma.assign([1.0, -0.8, 1.2, 0.6, 1.0, -1.1, 0.9, 1.0])
    return model


def data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(64, 8, 8, 4)).astype(np.float32), rng.integers(0, 4, 64)


def trained(qat: keras.Model, traced: bool = False) -> keras.Model:
    """Six steps; what tracing a model costs is a multiple of that."""
    x, y = data()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # Weight decay and momentum move weights that have no gradient.
    qat.compile(keras.optimizers.AdamW(3e-3, weight_decay=0.01), loss, run_eagerly=not traced)
    qat.fit(x, y, epochs=3, verbose=0)
    return qat


PRUNED = ("conv", "hidden", "head")


def kernels_of(model: keras.Model) -> dict[str, np.ndarray]:
    return {name: np.asarray(model.get_layer(name).kernel) for name in PRUNED}


@pytest.mark.parametrize(
    "policy", ["int8", *(pytest.param(p, marks=pytest.mark.slow) for p in ("w4a8", "ternary"))]
)
def test_zeros_stay_zeros_in_the_file(policy: str, tmp_path: Path) -> None:
    keras.utils.set_random_seed(0)
    pruned = kqat.prune(network(), 0.5)
    before = kernels_of(pruned)
    assert {name: np.mean(k == 0) for name, k in before.items()} == dict.fromkeys(PRUNED, 0.5)
    qat = trained(
        kqat.quantize_model(pruned, policy, calibration_data=data()[0], preserve="sparsity"),
        traced=policy == "int8",
    )
    moved = np.asarray(qat.get_layer("quant_head").layer.kernel)
    assert not np.array_equal(moved, before["head"])
    qat.save(tmp_path / "qat.keras")
    loaded = trained(keras.models.load_model(tmp_path / "qat.keras"))
    integers = file_integers(tflite_export.convert(loaded))
    for index, name in zip((0, 2, 3), PRUNED, strict=True):
        zero = np.moveaxis(before[name], -1, 0).reshape(-1) == 0
        assert (integers[index][zero] == 0).all()
        if policy != "ternary":
            assert (integers[index][~zero] != 0).mean() > 0.6
    assert (kqat.strip(loaded).get_layer("head").kernel.numpy()[before["head"] == 0] == 0).all()


@pytest.mark.slow
def test_zeros_move_where_nobody_keeps_them() -> None:
    keras.utils.set_random_seed(0)
    pruned = kqat.prune(network(), 0.5)
    qat = trained(kqat.quantize_model(pruned, calibration_data=data()[0]))
    zero = np.asarray(pruned.get_layer("head").kernel) == 0
    head = kqat.freeze(qat).weights[-1].integers
    assert (head[zero] != 0).any()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "clusters"),
    [
        ("int8", 16),
        pytest.param("w4a8", 12, marks=pytest.mark.slow),
        pytest.param(None, 16, marks=pytest.mark.slow),
    ],
    ids=["int8", "w4a8", "one scale"],
)
def test_clusters_are_kept_in_the_file(policy: str | None, clusters: int, tmp_path: Path) -> None:
    keras.utils.set_random_seed(0)
    model = network()
    few = kqat.cluster(kqat.prune(model, 0.3), clusters)
    kinds: Any = ("sparsity", "clusters")
    zero = kernels_of(few)["head"] == 0
    assert np.mean(zero) == pytest.approx(0.3, abs=0.02)
    config: Any = policy
    if policy is None:
        single = kqat.QuantSpec(bits=8, symmetric=True, narrow_range=True, axis=None)
        config = {"hidden": kqat.QuantizeConfig(weights=single)}
    qat = kqat.quantize_model(few, config, calibration_data=data()[0], preserve=kinds)
    if policy == "int8":  # The function is the clustered one, but for channels clustered anew.
        want, got = (m.predict(data()[0], verbose=0) for m in (few, qat))
        assert np.mean((want - got) ** 2) < 0.02 * np.mean(want**2)
    trained(qat, traced=policy == "int8").save(tmp_path / "qat.keras")
    loaded = keras.models.load_model(tmp_path / "qat.keras")
    frozen = kqat.freeze(trained(loaded))
    integers = file_integers(tflite_export.convert(frozen))
    counts = [np.unique(integers[index]).size for index in (0, 2, 3)]
    assert max(counts) <= clusters
    assert min(counts) > clusters // 2
    # The layer that was not clustered has as many as it likes.
    assert policy == "w4a8" or np.unique(integers[1]).size > 16
    assert (frozen.weights[-1].integers[zero] == 0).all()


@pytest.mark.slow
def test_clusters_part_where_nobody_keeps_them() -> None:
    keras.utils.set_random_seed(0)
    few = kqat.cluster(network(), 8)
    qat = trained(kqat.quantize_model(few, calibration_data=data()[0]))
    assert np.unique(kqat.freeze(qat).weights[2].integers).size > 8


def test_a_cluster_learns_as_the_mean_of_its_members() -> None:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((6,)), layers.Dense(4, name="head")])
    few = kqat.cluster(model, 3)
    x = np.random.default_rng(0).normal(size=(32, 6)).astype(np.float32)
    y = np.random.default_rng(1).normal(size=(32, 4)).astype(np.float32)
    qat = kqat.quantize_model(few, calibration_data=x, preserve="clusters")
    before = np.asarray(few.get_layer("head").kernel)
    qat.compile(keras.optimizers.SGD(0.1), "mse")
    qat.train_on_batch(x, y)
    after = np.asarray(qat.get_layer("quant_head").layer.kernel)
    steps = {
        float(v): np.unique(np.round((after - before)[before == v], 6)) for v in np.unique(before)
    }
    assert [len(found) for found in steps.values()] == [1, 1, 1]


def test_the_grid_must_hold_what_is_kept() -> None:
    x, _ = data()
    keras.utils.set_random_seed(0)
    few = kqat.cluster(network(), 16)
    with pytest.raises(kqat.PolicyError, match=r"cluster\(model, 15\), or 5 bits"):
        kqat.quantize_model(few, "w4a8", calibration_data=x, preserve="clusters")
    pruned = kqat.prune(network(), 0.5)
    with pytest.raises(kqat.PolicyError, match=r"a grid with a zero .* 'conv'\. Give it"):
        kqat.quantize_model(pruned, "binary", calibration_data=x, preserve="sparsity")
    with pytest.raises(kqat.PolicyError, match=r"Start from kqat\.prune\(model\)"):
        kqat.quantize_model(network(), calibration_data=x, preserve="sparsity")
    with pytest.raises(kqat.PolicyError, match=r"Start from kqat\.cluster\(model\)"):
        kqat.quantize_model(pruned, calibration_data=x, preserve="clusters")
    with pytest.raises(kqat.PolicyError, match="'sparsity', 'clusters' or both"):
        kqat.quantize_model(pruned, calibration_data=x, preserve="zeros")
    single = kqat.QuantSpec(bits=8, symmetric=True, narrow_range=True, axis=None)
    with pytest.raises(kqat.PolicyError, match="a scale per channel, for preserve='clusters'"):
        kqat.quantize_model(
            few, kqat.QuantizeConfig(weights=single), calibration_data=x, preserve="clusters"
        )
    qat = kqat.quantize_model(few, calibration_data=x, preserve="clusters")
    with pytest.raises(kqat.SpecError, match="'conv', whose zeros or clusters are preserved"):
        kqat.algorithms.gptq(qat, x)
    qat.get_layer("quant_conv").normalization.gamma.assign(-np.ones(8) * np.linspace(-1, 1, 8))
    with pytest.raises(kqat.FreezeError, match=r"a gamma of its .* changed its sign"):
        kqat.freeze(qat)


def test_channels_and_pairs_are_pruned_together() -> None:
    keras.utils.set_random_seed(0)
    model = network()
    kernel = np.asarray(kqat.prune(model, 0.5, pattern="channel").get_layer("conv").kernel)
    dead = ~kernel.any(axis=(0, 1, 2))
    norms = np.sqrt((np.asarray(model.get_layer("conv").kernel) ** 2).sum(axis=(0, 1, 2)))
    assert set(np.flatnonzero(dead)) == set(np.argsort(norms)[:4])
    for name, axis in (("conv", -2), ("hidden", 0)):
        kernel = np.asarray(kqat.prune(model, pattern="2:4").get_layer(name).kernel)
        fours = np.moveaxis(kernel, axis, -1)
        fours = fours.reshape(-1, 4)
        whole = np.moveaxis(np.asarray(model.get_layer(name).kernel), axis, -1).reshape(-1, 4)
        assert ((fours != 0).sum(axis=1) == 2).all()
        np.testing.assert_array_equal(np.sort(np.abs(fours))[:, 2:], np.sort(np.abs(whole))[:, 2:])
    transposed = layers.Conv2DTranspose(4, 3)
    transposed.build((None, 5, 5, 2))
    found = mask(transposed, np.asarray(transposed.kernel), 0.5, Pattern.CHANNEL)
    assert found.all(axis=(0, 1, 3)).sum() == 2 and found.any(axis=(0, 1, 3)).sum() == 2
    with pytest.raises(kqat.ModelError, match=r"in fours for the pattern '2:4'.*'odd'"):
        kqat.prune(
            keras.Sequential([keras.Input((6,)), layers.Dense(4, name="odd")]), pattern="2:4"
        )


@pytest.mark.slow
def test_the_schedule_is_that_of_the_paper() -> None:
    keras.utils.set_random_seed(0)
    model = network()
    schedule = kqat.Pruning(0.8, 8, begin=2, start=0.2, every=2, only="h*")
    shares = [schedule.share(t) for t in (0, 2, 5, 8, 20)]
    np.testing.assert_allclose(shares, [0.2, 0.2, 0.8 - 0.6 * 0.5**3, 0.8, 0.8])
    seen: list[float] = []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            seen.append(float(np.mean(np.asarray(model.get_layer("hidden").kernel) == 0)))

    x, y = data()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(use_ema=True, ema_momentum=0.5), loss)
    watch = Watch()
    model.fit(x, y, batch_size=16, epochs=3, verbose=0, callbacks=[schedule, watch])
    watch.on_train_batch_end(0)  # After the average of all weights took their place.
    size = model.get_layer("hidden").kernel.shape[0] * 16
    want = [0.0, 0.2, 0.2] + [0.8 - 0.6 * (1 - 2 / 6) ** 3] * 2 + [0.8 - 0.6 * (1 - 4 / 6) ** 3] * 2
    want += [0.8] * 6
    np.testing.assert_allclose(seen, [round(s * size) / size for s in want])
    assert np.asarray(model.get_layer("conv").kernel).all()


def test_few_values_are_those_of_k_means() -> None:
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(20, 30)).astype(np.float32)
    found = clustered(weights, 6)
    centers = np.unique(found)
    assert len(centers) == 6
    nearest = centers[np.abs(weights[..., None] - centers).argmin(axis=-1)]
    np.testing.assert_array_equal(found, nearest)
    for center in centers:
        assert weights[found == center].mean() == pytest.approx(center, abs=2e-2)
    sparse = np.where(rng.random((20, 30)) < 0.5, weights, 0)
    again = clustered(sparse, 6)
    np.testing.assert_array_equal(again == 0, sparse == 0)
    assert np.unique(again).size <= 6
    np.testing.assert_array_equal(clustered(again, 6), again)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: kqat.prune(m, 1.0), r"Expected a sparsity in \(0, 1\)"),
        (lambda m: kqat.prune(m, pattern="4:8"), "Expected pattern to be one of"),
        (lambda m: kqat.prune(m, 0.3, pattern="2:4"), "Expected sparsity=0.5"),
        (lambda m: kqat.prune(m, only="nothing"), "to prune whose name matches 'nothing'"),
        (lambda m: kqat.cluster(m, 1), "Expected 2 to 255 clusters"),
        (lambda m: kqat.Pruning(0.5, 10, begin=10), "Expected 0 <= begin < end"),
        (
            lambda m: kqat.prune(kqat.quantize_model(m, calibration_data=data()[0])),
            "Expected a float model to prune",
        ),
    ],
)
def test_what_cannot_be_pruned_or_clustered_is_refused(call: Any, words: str) -> None:
    with pytest.raises(kqat.ModelError, match=words):
        call(network())


class Configured(keras.layers.Layer):
    """Its config has a key that its `__init__` does not take."""

    def build(self, shape: Any) -> None:
        self.scale = self.add_weight(shape=shape[-1:], initializer="ones")

    def call(self, x: Any) -> Any:
        return x * self.scale

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "more": 1}


class Inside(keras.Model):
    """A subclassed model, which has no config."""

    def __init__(self, width: int) -> None:
        super().__init__(name="inside")
        self.hidden, self.head = keras.layers.Dense(width), keras.layers.Dense(3)

    def call(self, x: Any) -> Any:
        return self.head(keras.ops.relu(self.hidden(x)))


@pytest.mark.parametrize("kind", ["config", "subclassed", "lambda"])
def test_models_that_keras_cannot_clone_are_pruned_and_clustered(kind: str) -> None:
    rows = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    if kind == "subclassed":
        model: keras.Model = Inside(16)
    else:
        middle = Configured() if kind == "config" else keras.layers.Lambda(lambda t: t * rows[0, 0])
        model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16), middle])
        model.add(keras.layers.Dense(3))
    before = np.asarray(model(rows))
    for copy in (kqat.prune(model, 0.5), kqat.cluster(model, 4)):
        kernels = [np.asarray(v) for v in copy.trainable_variables if len(v.shape) == 2]
        assert len(kernels) == 2
        assert all(np.mean(k == 0.0) == 0.5 or np.unique(k).size <= 4 for k in kernels)
    np.testing.assert_array_equal(np.asarray(model(rows)), before)
