"""tfmot's pair of functions: `quantize_annotate_layer` and `quantize_apply`.

`quantize_annotate_layer` marks single layers while a model is built. `quantize_apply` quantizes
the marked layers and leaves the others float.
"""

import glob
import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import keras

from kqat.api import PolicyWarning, quantized_and_plan
from kqat.base import ModelError, PolicyError
from kqat.config import QuantizeConfig, QuantizePolicy, resolve_config
from kqat.graph import Node, check_as_many, duplicate, is_keras_2, rebuild, trace, unique_name

# A message lists so many names of layers at most.
_NAMES = 12


@keras.saving.register_keras_serializable("kqat")
class QuantizeAnnotate(keras.layers.Wrapper):
    """A layer marked for quantization, with its config; it computes what the layer computes."""

    # By this `kqat.api` knows it, which stands below.
    is_annotation = True

    def __init__(self, layer: keras.layers.Layer, config: Any = "int8", **kwargs: Any):
        kwargs.setdefault("name", f"annotate_{layer.name}")
        super().__init__(layer, **kwargs)
        self.config = resolve_config(config)
        self.supports_masking = layer.supports_masking

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's output, of one input: a tensor, or whatever holds tensors.

        Raises:
            PolicyError: if the layer is given anything else, which `call` has no argument for.
        """
        # `training` may stand in the second place.
        more = [
            f"argument {i}"
            for i, given in enumerate(args[1:], 2)
            if not (given is None or isinstance(given, bool))
        ]
        more += [f"{key}=" for key in kwargs if key not in ("inputs", "training", "mask")]
        if more:
            raise PolicyError(
                f"Expected one input of the annotated layer '{self.layer.name}' of type "
                f"{type(self.layer).__name__}, beside training= and mask=. Received: "
                f"{', '.join(more)} too. Leave the annotations out and name the layers in a policy "
                f"instead: kqat.quantize_model(model, kqat.QuantizePolicy(default=None, rules="
                f"{{'{self.layer.name}': ...}})), with the config of each."
            )
        return super().__call__(*args, **kwargs)

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """The layer's output."""
        return self.layer(inputs, **self._given(training, mask))

    def compute_mask(self, inputs: Any, previous_mask: Any) -> Any:
        """The mask that the layer hands on."""
        return self.layer.compute_mask(inputs, previous_mask)

    def compute_output_spec(
        self, inputs: Any, training: bool | None = None, mask: Any = None
    ) -> Any:
        """Those of the layer, which may have no `compute_output_shape` of its own."""
        return self.layer.compute_output_spec(inputs, **self._given(training, mask))

    def _given(self, training: bool | None, mask: Any) -> dict[str, Any]:
        """Of what Keras hands to whatever has the arguments, what the layer takes."""
        given = {"training": training} if _takes(self.layer, "training") else {}
        if _takes(self.layer, "mask") and any(one is not None for one in keras.tree.flatten(mask)):
            given["mask"] = mask
        return given

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The layer's output shape."""
        return self.layer.compute_output_shape(input_shape)

    def get_config(self) -> dict[str, Any]:
        """The layer and its quantization config.

        Raises:
            PolicyError: if the config is a tfmot object, which cannot be saved.
        """
        if not isinstance(self.config, QuantizeConfig):
            raise PolicyError(
                f"Expected a QuantizeConfig to save. Received: {type(self.config).__name__} for "
                f"layer '{self.layer.name}'. Save the model before annotating it, or after "
                "kqat.quantize_apply."
            )
        return {**super().get_config(), "config": self.config.to_dict()}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "QuantizeAnnotate":
        """The inverse of `get_config`."""
        wish = QuantizeConfig.from_dict(config.pop("config"))
        layer = keras.saving.deserialize_keras_object(config.pop("layer"), custom_objects)
        return cls(layer, wish, **config)


def _check_scheme(scheme: Any) -> None:
    kind = type(scheme).__name__
    per_tensor = getattr(scheme, "__dict__", {}).get("_disable_per_axis", False)
    if scheme is None or (kind == "Default8BitQuantizeScheme" and not per_tensor):
        return
    is_scheme = callable(getattr(scheme, "get_quantize_registry", None))
    asked = f"{kind}()" if is_scheme else repr(scheme)
    asked = f"{kind}(disable_per_axis=True)" if per_tensor else asked
    raise PolicyError(
        "Expected scheme=None or tfmot's Default8BitQuantizeScheme(), which is what annotated "
        f"layers get. Received: {asked}. For a scheme that keeps zeros or clusters give "
        "preserve='sparsity' or 'clusters', or both. What a layer is to have says "
        "quantize_annotate_layer(layer, config=…): a preset such as 'w4a8' or a "
        "kqat.QuantizeConfig; weights per tensor are QuantizeConfig(weights=QuantSpec("
        "symmetric=True, narrow_range=True))."
    )


def _takes(layer: Any, argument: str) -> bool:
    """Whether the layer's call has an argument of this name."""
    return argument in inspect.signature(layer.call).parameters


def quantize_annotate_layer(
    layer: keras.layers.Layer, config: Any = "int8", *, quantize_config: Any = None
) -> Any:
    """`layer`, marked for `quantize_apply`; use it in place of the layer.

    Args:
        layer: a Keras layer, not yet called.
        config: a preset's name, a `QuantizeConfig`, or a tfmot `QuantizeConfig`.
        quantize_config: tfmot's name of `config`; in its place where it is given.

    Raises:
        PolicyError: if `layer` is not a layer, or `config` is not a config.
    """
    if not isinstance(layer, keras.layers.Layer) or isinstance(layer, keras.Model):
        what = type(layer).__name__
        if is_keras_2(layer):
            raise PolicyError(
                f"Expected a layer of Keras 3 to annotate. Received: the Keras 2 (tf_keras) layer "
                f"{what}. Make it with keras.layers.{what}; kqat.load_model(model) brings a whole "
                "tf_keras model over."
            )
        raise PolicyError(
            f"Expected a Keras layer to annotate. Received: {what}. Annotate the layers of a model "
            "one by one, or use kqat.quantize_model."
        )
    config = config if quantize_config is None else quantize_config
    if isinstance(config, type):
        raise PolicyError(
            f"Expected a config for layer '{layer.name}'. Received: the class {config.__name__}. "
            f"Give an instance of it: {config.__name__}()."
        )
    if config is None:
        raise PolicyError(
            "Expected a config. Received: None. Do not annotate a layer that stays float."
        )
    return QuantizeAnnotate(layer, config)


def quantize_apply(
    model: keras.Model,
    scheme: Any = None,
    *,
    calibration_data: Any = None,
    preserve: str | Sequence[str] | None = None,
) -> keras.Model:
    """A QAT copy of `model` in which the annotated layers are quantized and the rest is float.

    Args:
        model: a built model, some of whose layers went through `quantize_annotate_layer`.
        scheme: `None`, or tfmot's `Default8BitQuantizeScheme`, which asks for what annotated layers
            get by default: 8 bits, weights per channel.
        calibration_data: as for `kqat.quantize_model`.
        preserve: as for `kqat.quantize_model`, in place of tfmot's schemes that keep zeros or
            clusters.

    Raises:
        PolicyError: if `scheme` is anything else.
        ModelError: if no layer is annotated; other errors are those of `kqat.quantize_model`.

    Warns:
        kqat.PolicyWarning: of the layers that stay float, if any do.
    """
    _check_scheme(scheme)
    graph = trace(model)
    copies: dict[int, Any] = {}
    taken: set[str] = set()
    rules: list[tuple[str, Any]] = []

    def call(node: Node, *args: Any, **kwargs: Any) -> Any:
        if id(node.layer) not in copies:
            copies[id(node.layer)] = plain_copy(node)
        copy = copies[id(node.layer)]
        if isinstance(node.layer, QuantizeAnnotate) and not _takes(node.layer.layer, "mask"):
            kwargs.pop("mask", None)
        return copy(*args, **kwargs)

    def plain_copy(node: Node) -> Any:
        layer = node.layer
        if not isinstance(layer, QuantizeAnnotate):
            return duplicate(layer, unique_name(node.name, taken))
        name = unique_name(node.name.removesuffix(layer.name) + layer.layer.name, taken)
        rules.append((glob.escape(name), layer.config))
        return duplicate(layer.layer, name)

    # An output whose mask a layer of its own hands on bears that layer's name.
    names = graph.output_names if any(graph.output_masks) else ()
    plain = rebuild(graph, call, model.name, names, graph.output_masks)
    if not rules:
        raise ModelError(
            f"Expected annotated layers. Received: '{model.name}', which has none. Use "
            "kqat.quantize_annotate_layer, or kqat.quantize_model for the whole model."
        )
    check_as_many(
        model, plain, "Use kqat.quantize_model on the model without annotations, with a policy."
    )
    policy = QuantizePolicy(default=None, rules=tuple(rules))
    qat, plan = quantized_and_plan(plain, policy, calibration_data, preserve=preserve)
    left = plan.float_layers()
    if left:
        more = f" and {len(left) - _NAMES} more" if len(left) > _NAMES else ""
        warnings.warn(
            f"Layers of '{model.name}' stay float, as they are not annotated: "
            f"{', '.join(left[:_NAMES])}{more}. The file will have float operators for them; "
            "kqat.quantize_model quantizes the whole model.",
            PolicyWarning,
            stacklevel=2,
        )
    return qat
