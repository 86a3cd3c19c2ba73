"""The layers that quantize.

`QuantizeWrapper` stands around a layer that computes on integers, `ActivationQuantizer` after a
group. Both are ordinary Keras layers, saved and loaded without a custom-object scope.
"""

import contextlib
import dataclasses
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

from kqat.base import ModelError, array_of
from kqat.graph import activation_name, call_signature, finalize, layer_behind
from kqat.grids import (
    GradientEstimator,
    LearnedMethod,
    MaxAbs,
    QuantSpec,
    StepMethod,
    TrainedThreshold,
    arithmetic,
    estimated,
    gradient_from_dict,
    gradient_to_dict,
    on_bias_grid,
    step_method_from_dict,
    step_method_to_dict,
)
from kqat.registry import LayerFacts, Output, stock_facts
from kqat.training.activation_quantizer import ActivationQuantizer
from kqat.training.batchnorm import (
    affine_numbers,
    normalization_factor,
    normalization_numbers,
    normalize,
)
from kqat.training.controls import Controls
from kqat.training.preservation import Preserved, cluster_means

# Layers that add their bias last, along the last axes of the output.
_ADDS_BIAS = (
    layers.Dense,
    layers.EinsumDense,
    layers.Conv1D,
    layers.Conv2D,
    layers.Conv3D,
    layers.Conv1DTranspose,
    layers.Conv2DTranspose,
    layers.Conv3DTranspose,
    layers.DepthwiseConv1D,
    layers.DepthwiseConv2D,
)


class _Quantizers:
    """The quantizers of a wrapper's inputs by their names, found where the model's graph is made.

    Keras, which would take their variables for the wrapper's too, does not look in here.
    """

    def __init__(self) -> None:
        self.by_name: dict[str | None, ActivationQuantizer | QuantizeWrapper] = {}
        self.names: dict[int, set[str]] = {}  # of the inputs of each branch
        # By the number of a bias of a tied weight.
        self.of_bias: dict[int, ActivationQuantizer | QuantizeWrapper] = {}
        # Rounded weights and their scales by name and branch, while `keep_rounded` says so.
        self.kept: dict[tuple[str, int], tuple[Any, Any]] | None = None
        self.corrects = True
        # What scales and shifts the input, first to last, and folds into the weights and the bias.
        self.affines: list[QuantizeWrapper] = []

    def find_affines(self, x: Any, names: Sequence[str]) -> None:
        found = [layer_behind(x, name) for name in names]
        self.affines = [layer for layer in found if isinstance(layer, QuantizeWrapper)]

    def find(self, x: Any, name: str, branch: int, bias: int | None) -> None:
        found = layer_behind(x, name)
        if isinstance(found, ActivationQuantizer | QuantizeWrapper):
            self.by_name[name] = found
            self.names.setdefault(branch, set()).add(name)
            if bias is not None:
                self.of_bias[bias] = found

    def of(self, branch: int) -> "list[ActivationQuantizer | QuantizeWrapper]":
        return [self.by_name[name] for name in self.names.get(branch, ())]


def _scale_of(quantizer: "ActivationQuantizer | QuantizeWrapper") -> Any:
    """The scale of the values of a quantizer, or of the rows of a tied weight, a scalar."""
    if isinstance(quantizer, ActivationQuantizer):
        return quantizer.scale()
    return ops.reshape(quantizer.scale("kernel"), ())


def _scale_now(quantizer: "ActivationQuantizer | QuantizeWrapper") -> Any:
    """`_scale_of` as a number."""
    if isinstance(quantizer, ActivationQuantizer):
        return quantizer.scale_now()
    return np.float32(np.asarray(quantizer.scale("kernel")).reshape(()))


@contextlib.contextmanager
def rounded_once(wrappers: Iterable["QuantizeWrapper"]) -> Iterator[None]:
    """Inside, weights do not change, and eager calls round each of them once."""
    kept = list(wrappers)
    for wrapper in kept:
        wrapper.keep_rounded(True)
    try:
        yield
    finally:
        for wrapper in kept:
            wrapper.keep_rounded(False)


@contextlib.contextmanager
def uncorrected(wrappers: Iterable["QuantizeWrapper"]) -> Iterator[None]:
    """Inside, the biases of these layers are their own, without what calibration adds to them."""
    kept = list(wrappers)
    for wrapper in kept:
        wrapper.keep_correction(False)
    try:
        yield
    finally:
        for wrapper in kept:
            wrapper.keep_correction(True)


@keras.saving.register_keras_serializable("kqat")
class QuantizeWrapper(keras.layers.Layer):
    """A layer that computes with fake-quantized weights; the layer itself is untouched.

    During a call the weights named in `weights` are replaced by their rounded values
    (`keras.StatelessScope`); gradients reach the float weights straight through. A
    BatchNormalization that will fold into the layer follows inside. Per channel, folding
    commutes with rounding. Per tensor it does not, nor where scales are powers of two, so there the
    weights are rounded *as folded*, with the moving variance, and unfolded again (Krishnamoorthi
    2018, section 3.2.2, https://arxiv.org/abs/1806.08342).

    Rounding moves the mean of an output channel. Calibration measures by how much, and `correction`
    takes it off the bias that ships; the layer's own bias stays as it is. Training leaves the
    correction alone, as it trains the bias beside it.

    Args:
        layer: the wrapped layer.
        weights: attribute of the layer -> grid.
        normalization: the BatchNormalization that folds into the layer, or `None`.
        weight_step: how the step of each grid is found; a learned one is a variable here.
        freeze_statistics: whether BatchNormalization uses its moving statistics in training.
        between: layers between the two that change nothing in inference, as Dropout.
        branches: further BatchNormalizations, of a layer that is called more than once with one of
            their own each: `call(x, branch=1)` takes the first of them. Per channel, all branches
            have the same integers.
        preserve: name of a weight -> what is kept of it in training: its zeros, its number of
            distinct values. Such values have one step for the whole weight, so that each is one
            integer in the file.
        facts: what the registry knew of the layer when it was planned; they are saved, so that no
            later process has to know a row that a user registered. Those of the stock table if
            they are left out, as in the files of older releases.
        gradient: what stands for the derivative of rounding; `None` is what `weight_step` says.
    """

    def __init__(
        self,
        layer: keras.layers.Layer,
        weights: Mapping[str, QuantSpec],
        normalization: keras.layers.Layer | None = None,
        *,
        weight_step: StepMethod = MaxAbs(),
        freeze_statistics: bool = False,
        between: Sequence[keras.layers.Layer] = (),
        branches: Sequence[keras.layers.Layer] = (),
        preserve: Mapping[str, Preserved] | None = None,
        facts: LayerFacts | None = None,
        gradient: GradientEstimator | None = None,
        **kwargs: Any,
    ):
        # The layer inside casts by its own policy; here weights are rounded, in float32.
        super().__init__(autocast=False, **{"dtype": "float32", **kwargs})
        self.layer = layer
        self.weight_specs = dict(weights)
        # What ships, whatever a callback has put in their place for a while.
        self.planned_specs = dict(weights)
        self.normalization = normalization
        self.weight_step = weight_step
        self.steps: dict[str, keras.Variable] = {}
        # The widths of the grids that learned steps are of, in the order of `weight_specs`; and
        # whether calls ask for them. See `take_grids`.
        self.step_bits: keras.Variable | None = None
        self.asks_step_bits = False
        self._starts_steps = False
        self.preserve = dict(preserve or {})
        self.masks: dict[str, keras.Variable] = {}
        self.assignments: dict[str, keras.Variable] = {}
        self.correction: keras.Variable | None = None
        self.corrected: keras.Variable | None = None
        self._states: list[keras.Variable] = []
        self.freeze_statistics = freeze_statistics
        self.between, self.branches = list(between), list(branches)
        self.facts = facts or stock_facts(layer) or LayerFacts(output=Output.OWN)
        self._axes = 0  # of the layer's first input
        self._takes_training = "training" in call_signature(layer).parameters
        self._quantizers = _Quantizers()
        self.gradient = gradient
        self.controls = Controls()
        self.seeds = None
        if gradient is not None and gradient.ADDS_NOISE:
            self.seeds = keras.random.SeedGenerator()
        self.supports_masking = layer.supports_masking

    def build(self, input_shape: Any) -> None:
        """Builds the layer and the BatchNormalization, and learned steps, which are one."""
        if not self.layer.built and self.computes_with_grids:
            self.layer.build(input_shape)
        self._axes = len(input_shape)
        for part in (*self.between, *self.normalizations):
            if not part.built:
                part.build(self.layer.compute_output_shape(input_shape))
        if isinstance(self.weight_step, LearnedMethod):
            self.steps = {name: self._new_step(name) for name in self.weight_specs}
        if self.steps:
            # Floats: TensorFlow keeps int32 variables on the host, and a mean of the weights of two
            # checkpoints would cut an integer off.
            widths = np.array(self._widths(), np.float32)
            self.step_bits = self._kept_state("step_bits", widths.shape, "float32", widths)
        for name, kept in self.preserve.items():
            shape = self._variable(name).shape
            if kept.sparsity:
                self.masks[name] = self._kept_state(f"{name}_mask", shape, "int8")
            if kept.clusters:
                self.assignments[name] = self._kept_state(f"{name}_clusters", shape, "int32")
        if self._can_correct():
            norm: Any = self.normalization
            shape = (self.layer.bias if norm is None else norm.moving_mean).shape
            self.correction = self._kept_state("correction", shape, "float32")
            # The checksum of the weights whose rounding it corrects.
            self.corrected = self._kept_state("corrected", (), "int32")

    def _can_correct(self) -> bool:
        """Whether there is one bias in the file that the mean of the output can be moved by."""
        layer: Any = self.layer
        if (
            not self.weight_specs
            or type(layer) not in _ADDS_BIAS
            or self.branches
            or not self._ships_bias()
        ):
            return False
        if getattr(layer, "data_format", "channels_last") != "channels_last":
            return False
        return activation_name(layer.activation) == "linear"

    def _kept_state(
        self, name: str, shape: Any, dtype: str, initial: np.ndarray | None = None
    ) -> keras.Variable:
        variable = self.add_weight(
            name=name,
            shape=shape,
            initializer="zeros" if initial is None else lambda shape, dtype=None: initial,
            dtype=dtype,
            trainable=False,
            autocast=False,
            aggregation="only_first_replica",
        )
        self._states.append(variable)
        return variable

    def load_own_variables(self, store: Mapping[str, Any]) -> None:
        """As Keras's; older files hold no correction of the bias, or no widths of steps."""
        own = [*self.steps.values(), *self._states]
        corrects = [v for v in (self.correction, self.corrected) if v is not None]
        widths = [self.step_bits] if self.step_bits is not None else []
        for lacking in ([], widths, corrects, [*widths, *corrects]):
            if len(store) == len(own) - len(lacking):
                break
        else:
            super().load_own_variables(store)  # It tells what is wrong.
            return
        missing = {id(variable) for variable in lacking}
        held = [variable for variable in own if id(variable) not in missing]
        for index, variable in enumerate(held):
            variable.assign(store[str(index)])
        if id(self.correction) in missing:
            self.correct(None)
        # Weights of a stage of `kqat.FallingBits` may come into the planned grids, or those of a
        # model of another width. The weights themselves are not here yet.
        self._starts_steps = not self._steps_fit()
        self.asks_step_bits |= self._starts_steps

    @property
    def takes_correction(self) -> bool:
        """Whether `correct` can move the mean of this layer's output, in the file too."""
        return self.correction is not None and len(self._quantizers.of(0)) == 1

    def correct(self, correction: np.ndarray | None) -> None:
        """Takes over what is added to the bias that ships; `None` forgets what there was."""
        if self.correction is None or self.corrected is None:
            return
        none = correction is None
        self.correction.assign(np.zeros(self.correction.shape) if none else correction)
        self.corrected.assign(0 if none else self._checksum())

    @property
    def is_corrected(self) -> bool:
        """Whether calibration corrected the bias."""
        return self._corrected_checksum() != 0

    @property
    def is_as_corrected(self) -> bool:
        """Whether the weights are those whose rounding was corrected."""
        return self.is_corrected and self._corrected_checksum() == self._checksum()

    def _corrected_checksum(self) -> int:
        return 0 if self.corrected is None else int(array_of(self.corrected))

    def _checksum(self) -> int:
        """Of all weights, never zero."""
        found = 0
        for part in (self.layer, *self.normalizations):
            for value in part.get_weights():
                found = zlib.crc32(np.ascontiguousarray(value).tobytes(), found)
        return found & 0x7FFFFFFF or 1

    def keep_correction(self, keeps: bool) -> None:
        """Whether the correction takes part in eager calls; see `uncorrected`."""
        self._quantizers.corrects = keeps

    def _shift(self, trains: bool) -> Any:
        """What the bias is moved by, now; `None` where it cannot be."""
        if self.correction is None or not self._quantizers.corrects:
            return None
        shift = self.correction.value
        if trains and self.controls.rounds is not None:
            shift = shift * self.controls.rounds.value
        return shift

    @property
    def normalizations(self) -> list[keras.layers.Layer]:
        """The BatchNormalization of each branch; none without one."""
        return [] if self.normalization is None else [self.normalization, *self.branches]

    def _new_step(self, name: str) -> keras.Variable:
        variable, spec = self._variable(name), self._step_spec(name)
        shared = arithmetic.shared_axes(variable, spec)
        shape = tuple(1 if a in shared else n for a, n in enumerate(variable.shape))
        assert isinstance(self.weight_step, LearnedMethod)
        shape = self.weight_step.variable_shape(shape, spec)
        return self.add_weight(name=f"{name}_step", shape=shape, initializer="ones", autocast=False)

    def take_over(self, weights: Any, *normalizations: Any) -> None:
        """Assigns the layer's and the BatchNormalizations' weights; learned steps start there."""
        self.layer.set_weights(weights)
        finalize(self.layer)
        for norm, values in zip(self.normalizations, normalizations, strict=True):
            norm.set_weights(values)
        for name in self.preserve:
            value = np.asarray(self._variable(name))
            if name in self.masks:
                self.masks[name].assign((value != 0.0).astype(np.int8))
            if name in self.assignments:
                index = np.unique(value, return_inverse=True)[1].reshape(value.shape)
                self.assignments[name].assign(index.astype(np.int32))
        self.start_steps()

    def _step_spec(self, name: str) -> QuantSpec:
        """The grid of weight `name` as its step is found: clusters have one step for all."""
        spec = self.weight_specs[name]
        kept = self.preserve.get(name)
        return dataclasses.replace(spec, axis=None) if kept and kept.clusters else spec

    def start_steps(self) -> None:
        """Puts learned steps where they start for the weights as they are."""
        method = self.weight_step
        if isinstance(method, LearnedMethod):
            for name, step in self.steps.items():
                step.assign(method.initial(self._folded(name), self._step_spec(name)))
        if self.step_bits is not None:
            self.step_bits.assign(self._widths())

    def take_grids(self, specs: Mapping[str, QuantSpec]) -> list[keras.Variable]:
        """Lets weights be rounded on other grids; returns the learned steps that start anew.

        Those are the ones that are of another width: not those which a backup of this stage gave
        back. From then on calls ask whether steps are of their grids, as weights of another stage
        may come back at any time: a step that is not is replaced by the one that it would start at.
        """
        self.weight_specs = dict(specs)
        self.asks_step_bits = isinstance(self.weight_step, LearnedMethod)
        if self._steps_fit():
            return []
        self.start_steps()
        return list(self.steps.values())

    def _widths(self) -> list[int]:
        return [self.weight_specs[name].bits for name in self.steps]

    def _steps_fit(self) -> bool:
        """Whether learned steps are of the grids that weights are rounded on now."""
        bits = self.step_bits
        return bits is None or np.rint(array_of(bits)).tolist() == self._widths()

    def set_weights(self, weights: Any) -> None:
        """As every layer's; a Normalization inside computes with them at once."""
        super().set_weights(weights)
        finalize(self.layer)

    @property
    def computes_with_grids(self) -> bool:
        """Whether the layer has numbers that ship as integers; else only its facts are carried."""
        return bool(self.weight_specs) or self.facts.affine

    def keep_rounded(self, keeps: bool) -> None:
        """Whether eager calls round each weight once, as none will change; else each call does."""
        self._quantizers.kept = {} if keeps else None

    def call(
        self,
        x: Any,
        *args: Any,
        training: bool | None = None,
        branch: int = 0,
        input_quantizer: str | None = None,
        input_affines: Sequence[str] = (),
        **kwargs: Any,
    ) -> Any:
        """What the layer (and BatchNormalization) computes with rounded weights.

        `x` and further arguments are those of the layer. `input_quantizer` is the name of the
        `ActivationQuantizer` on whose grid `x` lies; the bias is rounded to the grid that it has
        in the file. `input_affines` are the names of the layers that scale and shift what lies on
        that grid to `x`; in the file the weights and the bias do so. Where the statistics of a
        batch normalize, no such bias is added: there the output is moved by the rounding error
        that the bias of the moving statistics has.
        """
        self.controls.are_read |= bool(training)
        if training and self._starts_steps:
            # As training is traced: from here on steps are learned. What only infers computes with
            # where they start. A stage of `kqat.FallingBits` may have begun that they are of.
            self._starts_steps = False
            with tf.init_scope():
                if not self._steps_fit():
                    self.start_steps()
        statistics = bool(training and not self.freeze_statistics)
        quantizer = self._quantizers.by_name.get(input_quantizer)
        if training and self.controls.dampening is not None:
            self.add_loss(self.oscillation_penalty(branch))

        def computed(statistics: bool) -> Any:
            return self._computed(
                x, *args, training=training, statistics=statistics, branch=branch,
                quantizer=quantizer, **kwargs,
            )  # fmt: skip

        thaws = self.controls.thaws() if statistics and self.takes_statistics else None
        if thaws is None:
            return computed(statistics)
        # Under mixed precision a bias that ships is added in float32.
        return ops.cond(
            thaws,
            lambda: ops.cast(computed(True), "float32"),
            lambda: ops.cast(computed(False), "float32"),
        )

    @property
    def takes_statistics(self) -> bool:
        """Whether a BatchNormalization of this wrapper takes the statistics of a batch."""
        affine = self._is_affine and isinstance(self.layer, keras.layers.BatchNormalization)
        return affine or self.normalization is not None

    def _computed(
        self,
        x: Any,
        *args: Any,
        training: bool | None,
        statistics: bool,
        branch: int,
        quantizer: "ActivationQuantizer | QuantizeWrapper | None",
        **kwargs: Any,
    ) -> Any:
        """What `call` returns; `statistics` says whether those of the batch normalize."""
        trains = bool(training)
        if self._takes_training:
            kwargs["training"] = statistics
        drops = bool(trains and self.between)
        scale = None
        if quantizer is not None:
            scale = _scale_of(quantizer)
            if trains and self.controls.rounds is not None:
                scale = scale * self.controls.rounds.value  # A step of zero rounds no bias.
        ships = scale is not None and self._ships_bias(statistics)
        if ships and not (drops or self._penalizes_outputs):
            return self._call_as_shipped(scale, branch, trains, x, *args, **kwargs)
        weights = {name: self._numbers(name, branch, trains) for name in self.weight_specs}
        error = None
        if scale is not None and self._ships_bias():
            error = self._bias_error(scale, branch, weights, trains)
        elif scale is None:
            error = self._shift(trains)
        if weights:
            rounded = {
                id(self._variable(name)): self._unfolded(on_grid, name, branch)
                for name, (on_grid, _) in weights.items()
            }
            bias = getattr(self.layer, "bias", None)
            if error is not None and bias is not None and self.normalization is None:
                rounded[id(bias)] = bias.value + ops.cast(error, bias.dtype)
            if scale is not None and kwargs.get("bias") is not None:
                rounded |= self._tied_bias(scale, kwargs["bias"], weights["kernel"])
            y = self._call_rounded(rounded, x, *args, **kwargs)
        elif self._is_normalization:
            return normalize(self.layer, x, statistics, error)
        else:
            y = self.layer(x, *args, **kwargs)
            if error is not None and self._is_affine:
                y = y + ops.cast(error, y.dtype)
        for part in self.between:
            y = part(y, training=training)
        norms = self.normalizations
        return normalize(norms[branch], y, statistics, error) if norms else y

    @property
    def _penalizes_outputs(self) -> bool:
        """Whether a penalty is of an output that no layer makes where all ships as one kernel."""
        folded = [self.layer, *self.normalizations] if self.normalizations else []
        layers = [self.layer] if self._is_affine else folded
        return any(getattr(one, "activity_regularizer", None) is not None for one in layers)

    @property
    def _is_normalization(self) -> bool:
        """Whether the layer is a BatchNormalization that ships on its own."""
        return self._is_affine and isinstance(self.layer, keras.layers.BatchNormalization)

    def _bias_error(
        self, input_scale: Any, branch: int, weights: Mapping[str, Any], trains: bool
    ) -> Any:
        """By how much the bias that ships is off the one that is trained, without a gradient.

        `weights` are the numbers of each weight, from `_numbers`.
        """
        if self._is_affine:
            rounded, exact = self._affine_as_shipped(input_scale)[1], affine_numbers(self.layer)[1]
        else:
            (numbers,), normalized = weights.values(), self._normalized(branch)
            exact = normalized[1]
            rounded = self._as_shipped(input_scale, branch, numbers, normalized, trains)[1]
        return ops.stop_gradient(rounded - exact)

    def _ships_bias(self, statistics: bool = False) -> bool:
        """Whether the file has a bias for the layer, which is known now.

        It is not where a BatchNormalization takes the `statistics` of a batch.
        """
        if self._is_affine:
            return not (self.ships_as_sum or (statistics and self._is_normalization))
        if self.normalization is not None:
            return not statistics and list(self.weight_specs) == ["kernel"]
        bias = getattr(self.layer, "bias", None)
        return bias is not None and list(self.weight_specs) == ["kernel"]

    def biases_on_grid(self, input_scale: Any) -> list[tuple[keras.Variable, Any]]:
        """Each bias of the layer, and its value on the grid that it has in the file.

        For who calls the layer itself, in a `StatelessScope`; a layer that takes more than weights
        and biases has none here.

        Args:
            input_scale: that of the layer's input; zero where it is not known, and then no bias is
                rounded.
        """
        if self.normalization is not None or self._is_affine:
            return []
        found = []
        for name in self.weight_specs:
            bias = getattr(self.layer, name.removesuffix("kernel") + "bias", None)
            if name.endswith("kernel") and isinstance(bias, keras.Variable):
                kernel, scale = self._numbers(name, 0)
                exact = ops.cast(bias.value, "float32")
                found.append((bias, self._rounded_bias(exact, kernel, input_scale * scale)))
        return found

    @property
    def _is_affine(self) -> bool:
        """Whether the layer ships as one weight per channel, 127 steps of a scale of its own."""
        return self.facts.affine and not self.weight_specs

    @property
    def ships_as_sum(self) -> bool:
        """Whether the layer is `x + c` or `c - x`, which ships as one ADD or SUB with a constant.

        Values of four axes keep the depthwise convolution: it is one operator as well, and an
        accelerator has more use for it.
        """
        layer: Any = self.layer
        if not self._is_affine or self._axes == 4 or not isinstance(layer, layers.Rescaling):
            return False
        scale, offset = np.ravel(layer.scale), np.ravel(layer.offset)
        alike = np.all(scale == scale[0]) and np.all(offset == offset[0])
        return bool(alike and abs(scale[0]) == 1.0 and offset[0] != 0.0)

    def bias_on_grid(self, branch: int = 0) -> np.ndarray | None:
        """The bias that ships, a normalization folded in: float32, of the bias's shape.

        `None` where the layer has none, or is called on values of several grids, each of which
        rounds it anew.
        """
        quantizers = self._quantizers.of(branch)
        if len(quantizers) != 1 or not self._ships_bias():
            return None
        (quantizer,) = quantizers
        if self._is_affine:
            return np.asarray(self._affine_as_shipped(_scale_now(quantizer))[1])
        factor, bias = self._normalized(branch)
        numbers = self._numbers("kernel", branch)
        kernel, scale, moved = self._kernel_as_shipped(branch, numbers, factor)
        step = _scale_now(quantizer) * scale
        return np.asarray(self._bias_as_shipped(step, bias, kernel, moved))

    def _call_as_shipped(
        self, input_scale: Any, branch: int, trains: bool, /, *args: Any, **kwargs: Any
    ) -> Any:
        """The layer with the weights and the bias that ship, a normalization folded into both."""
        if self._is_affine:
            factor, offset = self._affine_as_shipped(input_scale)
            y = ops.cast(args[0], "float32") * factor + offset
            return ops.cast(y, self.layer.compute_dtype)
        (name,) = self.weight_specs
        numbers, normalized = self._numbers(name, branch, trains), self._normalized(branch)
        kernel, rounded = self._as_shipped(input_scale, branch, numbers, normalized, trains)
        values, bias = {id(self._variable(name)): kernel}, getattr(self.layer, "bias", None)
        if bias is not None:
            values[id(bias)] = rounded
            return self._call_rounded(values, *args, **kwargs)
        y = self._call_rounded(values, *args, **kwargs)
        norm: Any = self.normalizations[branch]
        shape = [n if a == norm.axis % len(y.shape) else 1 for a, n in enumerate(y.shape)]
        return ops.cast(y, "float32") + ops.reshape(rounded, shape)

    def _affine_as_shipped(self, input_scale: Any) -> tuple[Any, Any]:
        factor, offset = affine_numbers(self.layer)
        step = ops.stop_gradient(input_scale * (ops.abs(factor) / 127.0))
        return factor, on_bias_grid(offset, step)

    def _as_shipped(
        self,
        input_scale: Any,
        branch: int,
        numbers: tuple[Any, Any],
        normalized: tuple[Any, Any],
        trains: bool = False,
    ) -> tuple[Any, Any]:
        """The kernel and the bias that ship, both as reals; `numbers` are the kernel's.

        Without what scales and shifts the input, which is done here before the layer is called.
        `normalized` is what `_normalized` returns. A caller that needs it as well computes it once,
        as TensorFlow does not see that two reads of a variable are alike.
        """
        factor, exact = normalized
        kernel, scale, moved = self._kernel_as_shipped(branch, numbers, factor)
        bias = self._bias_as_shipped(input_scale * scale, exact, kernel, moved, trains)
        return kernel, bias if moved is None else bias - moved

    def _kernel_as_shipped(
        self, branch: int, numbers: tuple[Any, Any], factor: Any
    ) -> tuple[Any, Any, Any]:
        """The kernel and its scale in the file, and the bias that an offset of the input makes.

        The kernel is that of the input as the layer gets it here; `factor` is the normalization's.
        """
        (name,) = self.weight_specs
        kernel, scale = numbers
        if self._quantizers.affines:
            kernel = kernel / self.input_fold(name)
        if factor is not None:
            fold = ops.reshape(factor, self.channel_shape(name))
            if self.folds_before(name):
                kernel = ops.where(fold == 0.0, 0.0, kernel)
                unfolded = self._unfolded(numbers[0], name, branch)
                kernel = arithmetic.straight_through(kernel, unfolded * fold)
            else:
                kernel, scale = kernel * fold, scale * ops.abs(fold)
        return kernel, scale, self._moved_by_inputs(kernel)

    def _bias_as_shipped(
        self, step: Any, bias: Any, kernel: Any, moved: Any, trains: bool = False
    ) -> Any:
        """The bias in the file, of a scale `step` in the shape of the kernel's.

        `bias` is what it is before it is moved and rounded, from `_normalized`.
        """
        for part in (self._shift(trains), moved):
            bias = bias if part is None else bias + part
        return self._rounded_bias(bias, kernel, step)

    def _moved_by_inputs(self, kernel: Any) -> Any:
        """What an offset of the input adds to each output, without a gradient, or `None`."""
        if not self._quantizers.affines:
            return None
        (name,) = self.weight_specs
        offset = ops.reshape(self._input_numbers()[1], self._input_shape(name))
        axes = {a % len(kernel.shape) for a in self.facts.channel_axes.get(name) or ()}
        others = [axis for axis in range(len(kernel.shape)) if axis not in axes]
        return ops.stop_gradient(ops.reshape(ops.sum(kernel * offset, axis=others), (-1,)))

    def moved_by_inputs(self, branch: int = 0) -> np.ndarray | None:
        """What an offset of the input adds to the bias in the file, `(outputs,)`, or `None`."""
        if not self._quantizers.affines:
            return None
        factor, _ = self._normalized(branch)
        numbers = self._numbers("kernel", branch)
        return np.asarray(self._kernel_as_shipped(branch, numbers, factor)[2])

    def _input_numbers(self) -> tuple[Any, Any]:
        """Factor and offset of all that scales and shifts the input, `(channels,)` or `(1,)`."""
        factor, offset = ops.ones((1,), "float32"), ops.zeros((1,), "float32")
        for affine in self._quantizers.affines:
            times, plus = affine_numbers(affine.layer)
            factor, offset = factor * times, offset * times + plus
        return factor, offset

    def _input_shape(self, name: str) -> list[int]:
        """The shape in which one number per input channel broadcasts over weight `name`."""
        shape = [1] * len(self._variable(name).shape)
        assert self.facts.input_axis is not None, "planning asked for it"
        shape[self.facts.input_axis] = -1
        return shape

    def input_fold(self, name: str) -> Any:
        """The factors of the input, shaped to broadcast over weight `name`, or `None`.

        A factor of zero, which cannot be unfolded, is replaced by one, see `idle_inputs`.
        """
        if not self._quantizers.affines:
            return None
        factor = self._input_numbers()[0]
        factor = ops.where(factor == 0.0, ops.ones_like(factor), factor)
        return ops.stop_gradient(ops.reshape(factor, self._input_shape(name)))

    def idle_inputs(self, name: str) -> np.ndarray | None:
        """Where the file has no weight, as a factor of zero takes its input away; or `None`."""
        if not self._quantizers.affines:
            return None
        factor = np.asarray(self._input_numbers()[0])
        return np.reshape(factor == 0.0, self._input_shape(name))

    def _tied_bias(self, input_scale: Any, number: int, numbers: tuple[Any, Any]) -> dict[int, Any]:
        """A bias of a tied weight on its grid, by its identity; `numbers` are the weight's."""
        bias = self.layer.bias_list[number]
        kernel, scale = numbers
        exact = ops.cast(bias.value, "float32")
        return {id(bias): self._rounded_bias(exact, kernel, input_scale * scale)}

    def tied_biases_on_grid(self) -> list[np.ndarray]:
        """The biases that ship of a tied weight, each rounded as its call rounds it."""
        found = []
        for number, bias in enumerate(self.layer.bias_list):
            quantizer = self._quantizers.of_bias.get(number)
            if quantizer is None:  # Its input is on a grid inside a recurrence.
                found.append(np.asarray(bias, np.float32))
                continue
            scale = _scale_now(quantizer)
            numbers = self._numbers("kernel", 0)
            (rounded,) = self._tied_bias(scale, number, numbers).values()
            found.append(np.asarray(rounded))
        return found

    def _normalized(self, branch: int) -> tuple[Any, Any]:
        """By what a normalization's moving statistics multiply the kernel, and the exact bias.

        That is the bias before it is rounded, with these statistics folded in. Both are float32, of
        shape `(channels,)`, or `None` where there is no normalization or no bias either.
        """
        bias: Any = getattr(self.layer, "bias", None)
        if self.normalization is None:
            return None, None if bias is None else ops.cast(bias.value, "float32")
        return normalization_numbers(self.normalizations[branch], bias)

    def _rounded_bias(self, bias: Any, kernel: Any, step: Any) -> Any:
        """`bias` on its grid, of the scale `step` in the shape of the kernel's scale.

        A channel without weights has no scale of its own, and in the file one that is fine enough.
        """
        if not getattr(self.weight_step, "fine_for_zeros", False):
            axes = [axis for axis, size in enumerate(step.shape) if size == 1]
            empty = ops.max(ops.abs(kernel), axis=axes, keepdims=True) == 0.0
            step = ops.where(empty, 0.0, step)
        step = ops.stop_gradient(step)
        channels = int(np.prod(bias.shape))
        if channels != 1 and int(np.prod(step.shape)) == channels:
            step = ops.reshape(step, bias.shape)
        elif int(np.prod(step.shape)) == 1:
            step = ops.reshape(step, ())
        else:  # Channels in another order: a custom layer's own.
            return bias
        return on_bias_grid(bias, step)

    def channel_shape(self, name: str) -> list[int]:
        """The shape in which one number per output channel broadcasts over weight `name`."""
        shape = self._variable(name).shape
        axes = {a % len(shape) for a in self.facts.channel_axes.get(name) or ()}
        return [s if i in axes else 1 for i, s in enumerate(shape)]

    def _call_rounded(self, rounded: Mapping[int, Any], *args: Any, **kwargs: Any) -> Any:
        """The layer with values in the place of some variables, by their identity."""
        variables = self.layer.variables
        mapping = [(v, rounded.get(id(v), v.value)) for v in variables]
        with keras.StatelessScope(state_mapping=mapping, collect_losses=True) as scope:
            y = self.layer(*args, **kwargs)
        for loss in scope.losses:
            self.add_loss(loss)
        for variable in variables:
            # A weight that is not trained was replaced too, and must not stay rounded.
            if variable.trainable or id(variable) in rounded:
                continue
            if (new := scope.get_current_value(variable)) is not None:
                variable.assign(new)
        return y

    @staticmethod
    def layer_options(kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Of the arguments of a call of the wrapper those that are the layer's."""
        own = ("training", "branch", "input_quantizer", "input_affines")
        return {k: v for k, v in kwargs.items() if k not in own}

    def _variable(self, name: str) -> keras.Variable:
        if getattr(self.layer, "lora_enabled", False):
            raise ModelError(
                f"Expected one kernel in layer '{self.layer.name}' of a QAT model. Received: LoRA "
                "adapters beside it, by enable_lora: the file has one kernel, and its integers are "
                "what is trained. Leave them out; freeze other layers to train fewer weights."
            )
        return getattr(self.layer, name)

    def rounded(self, name: str, branch: int = 0, *, training: bool = False) -> Any:
        """The rounded weight `name`, of the variable's shape: what the layer computes with."""
        return self._unfolded(self.on_grid(name, branch, training), name, branch)

    def _unfolded(self, on_grid: Any, name: str, branch: int) -> Any:
        fold = self._fold_before(name, branch)
        return on_grid if fold is None else on_grid / fold

    def on_grid(self, name: str, branch: int = 0, training: bool = False) -> Any:
        """The rounded weight times `fold(name)`, integers times `scale(name)`.

        In training it may be something else, as a callback or an estimator with noise has it.
        """
        return self._numbers(name, branch, training)[0]

    def scale(self, name: str, branch: int = 0) -> Any:
        """The scale of weight `name`: its shape, with the axes that share a scale of size 1."""
        return self._numbers(name, branch)[1]

    def _numbers(self, name: str, branch: int, training: bool = False) -> tuple[Any, Any]:
        """What `on_grid` and `scale` return, computed together."""
        kept = self._quantizers.kept
        if kept is None or training:
            return self._numbers_now(name, branch, training)
        if (name, branch) not in kept:
            kept[name, branch] = self._numbers_now(name, branch, False)
        return kept[name, branch]

    def _numbers_now(self, name: str, branch: int, training: bool) -> tuple[Any, Any]:
        folded, spec = self._folded(name, branch), self._step_spec(name)
        step = self._step(name, folded)
        on_grid = (self._trained if training else self._rounded_by)(folded, step, spec)
        scale = ops.stop_gradient(self._grid_scale(step, spec))
        kept = self.preserve.get(name)
        if kept and kept.clusters:
            # Clusters have one step; the file has one scale for each channel.
            scale = ops.broadcast_to(scale, self._scale_shape(name))
        return on_grid, scale

    def _scale_shape(self, name: str) -> tuple[int, ...]:
        variable = self._variable(name)
        shared = arithmetic.shared_axes(variable, self.weight_specs[name])
        return tuple(1 if a in shared else n for a, n in enumerate(variable.shape))

    def _trained(self, folded: Any, step: Any, spec: QuantSpec) -> Any:
        """What stands for the rounded weight in training."""
        controls, shaken = self.controls, folded
        if controls.random is not None:
            shaken = controls.shaken(folded, self._grid_scale(step, spec))
        if self.seeds is not None and not controls.still:
            return controls.if_rounding(self._with_noise(folded, step, spec), folded)
        return controls.if_rounding(self._rounded_by(shaken, step, spec), folded)

    def _rounded_by(self, folded: Any, step: Any, spec: QuantSpec) -> Any:
        if self.gradient is None:
            return self.weight_step.fake_quantize(folded, step, spec)
        rounded = self.weight_step.fake_quantize(ops.stop_gradient(folded), step, spec)
        most = self._grid_scale(step, spec) * float(spec.qmax)
        return rounded + estimated(self.gradient, folded, rounded, -most, most)

    def _with_noise(self, folded: Any, step: Any, spec: QuantSpec) -> Any:
        limit = float(spec.qmax)
        noise = keras.random.uniform(ops.shape(folded), -0.5, 0.5, seed=self.seeds)
        return (ops.clip(folded / step, -limit, limit) + noise) * step

    def oscillation_penalty(self, branch: int = 0) -> Any:
        """What `kqat.DampenOscillations` adds to the loss for these weights, a scalar."""
        weight, total = self.controls.dampening, 0.0
        for name in self.weight_specs:
            folded, spec = self._folded(name, branch), self._step_spec(name)
            step = ops.stop_gradient(self._step(name, folded))
            rounded = ops.stop_gradient(self._rounded_by(folded, step, spec))
            most = self._grid_scale(step, spec) * float(spec.qmax)
            clipped = ops.minimum(ops.maximum(folded, -most), most)
            total = total + ops.sum(ops.square(rounded - clipped))
        return total if weight is None else weight.value * total

    def _step(self, name: str, folded: Any) -> Any:
        spec, method = self._step_spec(name), self.weight_step
        if isinstance(method, LearnedMethod):
            learned = method.scale(self.steps[name].value, spec)
            if not self.asks_step_bits or self.step_bits is None:
                return learned
            return ops.cond(
                ops.round(self.step_bits.value[list(self.steps).index(name)]) == spec.bits,
                lambda: learned,
                lambda: ops.stop_gradient(method.step(folded, spec)),
            )
        return ops.stop_gradient(method.step(folded, spec))

    def _grid_scale(self, step: Any, spec: QuantSpec) -> Any:
        method = self.weight_step
        return method.grid_scale(step, spec) if isinstance(method, LearnedMethod) else step

    def folds_before(self, name: str) -> bool:
        """Whether the BatchNormalization is folded in before rounding.

        It is where weights have one scale per tensor, or scales that are powers of two.
        """
        if self.normalization is None:
            return False
        spec = self.weight_specs[name]
        powers = spec.power_of_two or isinstance(self.weight_step, TrainedThreshold)
        return spec.axis is None or powers

    def _fold_before(self, name: str, branch: int) -> Any:
        fold = self.input_fold(name)
        if self.folds_before(name):
            behind = ops.stop_gradient(self.fold_factor(name, branch))
            fold = behind if fold is None else fold * behind
        return fold

    def fold(self, name: str, branch: int = 0) -> Any:
        """What a weight is multiplied by before it is rounded, to broadcast over it.

        That is a BatchNormalization's factor where `folds_before(name)`, and what scales the input.
        """
        fold = self._fold_before(name, branch)
        return 1.0 if fold is None else fold

    def folded(self, name: str, branch: int = 0) -> Any:
        """The weight `name` before it is rounded, float32, times `fold(name)`."""
        return self._folded(name, branch)

    def _folded(self, name: str, branch: int = 0) -> Any:
        value = ops.cast(self._variable(name).value, "float32")
        if name in self.assignments:
            clusters = self.preserve[name].clusters
            value = cluster_means(value, self.assignments[name].value, clusters)
        if name in self.masks:
            value = value * ops.cast(self.masks[name].value, "float32")
        fold = self._fold_before(name, branch)
        return value if fold is None else value * fold

    def fold_factor(self, name: str = "kernel", branch: int = 0) -> Any:
        """`gamma / sqrt(moving_variance + epsilon)`, shaped to broadcast over weight `name`.

        A factor of zero, which cannot be unfolded, is replaced by one; the layer's output is
        multiplied by zero then in any case.
        """
        factor = normalization_factor(self.normalizations[branch])
        factor = ops.where(factor == 0.0, ops.ones_like(factor), factor)
        return ops.reshape(factor, self.channel_shape(name))

    def compute_output_shape(self, input_shape: Any) -> Any:
        """That of the layer."""
        return self.layer.compute_output_shape(input_shape)

    def compute_output_spec(
        self,
        x: Any,
        *args: Any,
        training: bool | None = None,
        branch: int = 0,
        input_quantizer: str | None = None,
        input_affines: Sequence[str] = (),
        **kwargs: Any,
    ) -> Any:
        """The layer's output shape and dtype."""
        if input_affines:
            self._quantizers.find_affines(x, input_affines)
        if input_quantizer is not None:
            self._quantizers.find(x, input_quantizer, branch, kwargs.get("bias"))
        if not self.computes_with_grids:
            # As Keras calls it, so that a layer which builds itself when it is called is built.
            made = self.layer(x, *args, **kwargs)
            return keras.tree.map_structure(lambda t: keras.KerasTensor(t.shape, t.dtype), made)
        shape = self.layer.compute_output_spec(x, *args, **kwargs).shape
        return keras.KerasTensor(shape, dtype=self.layer.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        """Plain JSON types and the serialized layers."""
        serialize = keras.saving.serialize_keras_object
        norm = self.normalization
        config = super().get_config()
        config.pop("autocast", None)
        if self.planned_specs != self.weight_specs:  # A callback's stage is not over.
            config["planned"] = {name: spec.to_dict() for name, spec in self.planned_specs.items()}
        return {
            **config,
            "layer": serialize(self.layer),
            "weights": {name: spec.to_dict() for name, spec in self.weight_specs.items()},
            "normalization": None if norm is None else serialize(norm),
            "weight_step": step_method_to_dict(self.weight_step),
            "freeze_statistics": self.freeze_statistics,
            "between": [serialize(part) for part in self.between],
            "branches": [serialize(part) for part in self.branches],
            "preserve": {name: dataclasses.asdict(kept) for name, kept in self.preserve.items()},
            "facts": self.facts.to_dict(),
            "gradient": gradient_to_dict(self.gradient),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "QuantizeWrapper":
        """The inverse of `get_config`."""
        restore = keras.saving.deserialize_keras_object
        norm = config.pop("normalization")
        layer = restore(config.pop("layer"))
        weights = _specs(config.pop("weights"))
        planned = _specs(config.pop("planned", {}))
        method = step_method_from_dict(config.pop("weight_step"))
        norm = None if norm is None else restore(norm)
        gradient = gradient_from_dict(config.pop("gradient", None))
        kept = {name: Preserved(**one) for name, one in config.pop("preserve", {}).items()}
        facts = config.pop("facts", None)
        facts = None if facts is None else LayerFacts.from_dict(facts)
        more: Any = {
            key: [restore(p) for p in config.pop(key, ())] for key in ("between", "branches")
        }
        more |= {"weight_step": method, "facts": facts, "gradient": gradient}
        more["preserve"] = kept
        wrapper = cls(layer, weights, norm, **more, **config)
        wrapper.planned_specs = planned or wrapper.planned_specs
        return wrapper


def _specs(config: dict[str, Any]) -> dict[str, QuantSpec]:
    return {name: QuantSpec(**spec) for name, spec in config.items()}
