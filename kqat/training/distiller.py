"""`Distiller`: trains a QAT model to answer as its float teacher does."""

from collections.abc import Mapping
from typing import Any

import keras
from keras import ops

from kqat.base import ModelError

# How two outputs are compared.
KINDS = ("logits", "probabilities", "values")
_TINY = 1e-7


@keras.saving.register_keras_serializable("kqat")
class Distiller(keras.Model):
    """A student that learns from labels and from a teacher at once; compile, fit and save it.

    The loss is the one it is compiled with, plus `weight` times the difference of the student's
    outputs from the teacher's, plus `feature_weight` times the mean squared difference of features
    over their mean square. In `evaluate` and validation only the compiled loss counts. Without a
    compiled loss the teacher alone is learned from.

        distiller = kqat.Distiller(qat, model, kind="logits")
        distiller.compile(optimizer, loss, metrics=["accuracy"])
        distiller.fit(x, y, epochs=3)
        blob = tflite_export.convert(distiller.student)

    Args:
        student: the model that is trained, a QAT model usually.
        teacher: a built model of the same inputs and outputs; it is not trained.
        kind: `"logits"`: the Kullback-Leibler divergence of the softmax of outputs over
            `temperature`, times its square; `"probabilities"`: the same for outputs behind a
            softmax; `"values"`: the mean squared difference over the teacher's mean square.
        temperature: above 1 it also shows how the teacher ranks the wrong classes.
        weight: of the outputs' part; 0 leaves it out.
        features: name of a layer of the student -> name of a layer of the teacher, of the same
            output shape. A QAT model's layers may be named as in the float model.
        feature_weight: of the features' part.

    Raises:
        ModelError: if outputs or features differ in shape, there is no such layer, or an option
            makes no sense.

    Reference: Hinton et al. 2015, section 2 (https://arxiv.org/abs/1503.02531); for features,
    Romero et al. 2015, section 2.2 (https://arxiv.org/abs/1412.6550), with layers of equal shape.
    """

    def __init__(
        self,
        student: keras.Model,
        teacher: keras.Model,
        *,
        kind: str = "logits",
        temperature: float = 4.0,
        weight: float = 1.0,
        features: Mapping[str, str] | None = None,
        feature_weight: float = 1.0,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        _check_options(kind, temperature, weight, feature_weight)
        self.kind = kind
        self.temperature = float(temperature)
        self.weight = float(weight)
        self.features = dict(features or {})
        self.feature_weight = float(feature_weight)
        self.student = student
        self.teacher = teacher
        teacher.trainable = False
        teacher = _with_outputs(teacher, student)
        _check_shapes("outputs", "the outputs", student.outputs, teacher.outputs)
        _check_shapes("inputs", "the inputs", student.inputs, teacher.inputs)
        theirs = [_layer(teacher, name).output for name in self.features.values()]
        ours = [_layer(student, name).output for name in self.features]
        for name, own, other in zip(self.features, ours, theirs, strict=True):
            _check_shapes("features", f"'{name}'", [own], [other])
        # One run of each model gives its outputs and its features; the student's also its inputs in
        # their order, as Keras finds it out where they come as a dict by names.
        several = len(student.inputs) > 1
        given = student.input if several else student.inputs
        self._student_run = keras.Model(given, [*student.inputs, *student.outputs, *ours])
        self._teacher_run = keras.Model(teacher.inputs, [*teacher.outputs, *theirs])
        self.built = True

    @property
    def trained_model(self) -> keras.Model:
        """The student: what callbacks convert, measure and estimate."""
        return self.student

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """The student's outputs; in training the teacher's losses are added."""
        inputs = inputs if len(self.student.inputs) > 1 else keras.tree.flatten(inputs)
        found = keras.tree.flatten(self._student_run(inputs, training=training))
        count = len(self.student.inputs)
        flat, ours = found[:count], found[count:]
        count = len(self.student.outputs)
        if training:
            answers = keras.tree.flatten(self._teacher_run(flat, training=False))
            theirs = [ops.stop_gradient(y) for y in answers]
            self._add_losses(ours, theirs, count)
        return keras.tree.pack_sequence_as(self.student.output, ours[:count])

    def _add_losses(self, ours: list[Any], theirs: list[Any], count: int) -> None:
        pairs = list(zip(ours, theirs, strict=True))
        if self.weight:
            for own, other in pairs[:count]:
                self.add_loss(self.weight * self.difference(own, other))
        if self.feature_weight:
            for own, other in pairs[count:]:
                self.add_loss(self.feature_weight * _relative_square(own, other))

    def difference(self, own: Any, other: Any) -> Any:
        """How far an output is from the teacher's, a scalar; both of shape `(batch, …)`."""
        own, other = (ops.cast(y, "float32") for y in (own, other))
        if self.kind == "values":
            return _relative_square(own, other)
        if self.kind == "probabilities":
            own, other = (ops.log(ops.maximum(y, _TINY)) for y in (own, other))
        own, other = (ops.log_softmax(y / self.temperature, axis=-1) for y in (own, other))
        divergence = ops.sum(ops.exp(other) * (other - own), axis=-1)
        return self.temperature**2 * ops.mean(divergence)

    def get_config(self) -> dict[str, Any]:
        """Plain JSON types and both models."""
        serialize = keras.saving.serialize_keras_object
        return {
            "student": serialize(self.student),
            "teacher": serialize(self.teacher),
            "kind": self.kind,
            "temperature": self.temperature,
            "weight": self.weight,
            "features": self.features,
            "feature_weight": self.feature_weight,
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "Distiller":
        """The inverse of `get_config`."""
        restore = keras.saving.deserialize_keras_object
        models = [restore(config.pop(key), custom_objects) for key in ("student", "teacher")]
        return cls(*models, **config)


def _relative_square(own: Any, other: Any) -> Any:
    own, other = (ops.cast(y, "float32") for y in (own, other))
    return ops.mean(ops.square(own - other)) / ops.maximum(ops.mean(ops.square(other)), _TINY)


def _with_outputs(teacher: keras.Model, student: keras.Model) -> keras.Model:
    """The teacher, or a functional model that calls it, where it is subclassed."""
    if hasattr(teacher, "outputs"):
        return teacher
    inputs = [keras.Input(t.shape[1:], dtype=t.dtype) for t in student.inputs]
    model = keras.Model(inputs, teacher(inputs if len(inputs) > 1 else inputs[0]))
    model.trainable = False
    return model


def _check_options(kind: str, temperature: float, weight: float, feature_weight: float) -> None:
    if kind not in KINDS:
        raise ModelError(f"Expected kind to be one of {list(KINDS)}. Received: {kind!r}.")
    if not temperature > 0.0:
        raise ModelError(f"Expected a temperature above 0. Received: {temperature!r}. Use 4.")
    if weight < 0.0 or feature_weight < 0.0 or weight == feature_weight == 0.0:
        raise ModelError(
            f"Expected weights of at least 0, one of them above. Received: weight={weight!r}, "
            f"feature_weight={feature_weight!r}."
        )


def _check_shapes(kind: str, what: str, ours: Any, theirs: Any) -> None:
    shapes = [[tuple(t.shape[1:]) for t in some] for some in (ours, theirs)]
    if shapes[0] != shapes[1]:
        raise ModelError(
            f"Expected a teacher with the student's shapes of {kind}: for {what} {shapes[0]}. "
            f"Received: {shapes[1]}. Take another teacher, or put a layer behind it that makes "
            "these shapes."
        )


def _layer(model: keras.Model, name: str) -> keras.layers.Layer:
    """The layer of that name, or the one that quantizes it.

    Raises:
        ModelError: if there is none.
    """
    names = {layer.name: layer for layer in model.layers}
    for candidate in (name, f"quant_{name}"):
        if candidate in names:
            return names[candidate]
    raise ModelError(
        f"Expected features to name layers of '{model.name}'. Received: {name!r}. It has "
        f"{sorted(names)}."
    )
