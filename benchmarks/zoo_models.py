"""Architectures that others wrote on Keras 3, each at a small legal size with random weights.

A row is a function that makes a Functional model of fixed input shape. Imports are inside the
functions, so that a collection that is not installed fails its own rows alone.
"""

import importlib
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from benchmarks import written_models

IMAGE = (64, 64, 3)
TOKENS, VOCABULARY = 16, 100
TRANSFORMER = {"num_layers": 2, "num_heads": 2, "hidden_dim": 32, "intermediate_dim": 64}
DECODER = {
    "vocabulary_size": VOCABULARY, "num_layers": 2, "num_query_heads": 4,
    "num_key_value_heads": 2, "hidden_dim": 32, "intermediate_dim": 64,
}  # fmt: skip

Build = Callable[[], keras.Model]


def _hub(name: str, **options: Any) -> Any:
    return getattr(importlib.import_module("keras_hub").models, name)(**options)


def _tokens(name: str, **options: Any) -> Build:
    """A text backbone of KerasHub on sequences of fixed length."""

    def build() -> keras.Model:
        backbone = _hub(name, **options)
        keys = list(backbone.input)
        inputs = {key: keras.Input((TOKENS,), dtype="int32", name=key) for key in keys}
        return keras.Model(inputs, _first(backbone(inputs)), name=name.lower())

    return build


def _fixed(build: Build) -> Build:
    """A backbone or task of KerasHub, its inputs of fixed length where it leaves that open."""

    def build_fixed() -> keras.Model:
        model = build()
        inputs = {
            key: keras.Input(
                tuple(TOKENS if size is None else size for size in t.shape[1:]),
                dtype=t.dtype, name=key,
            )
            for key, t in model.input.items()
        }  # fmt: skip
        return keras.Model(inputs, model(inputs), name=model.name)

    return build_fixed


def _task(name: str, backbone: str, options: dict[str, Any], **more: Any) -> Build:
    """A task of KerasHub on a backbone of tokens."""
    return _fixed(lambda: _hub(name, backbone=_hub(backbone, **options), **more))


def _efficientnet() -> keras.Model:
    return _hub(
        "EfficientNetBackbone", stackwise_kernel_sizes=[3, 3], stackwise_num_repeats=[1, 2],
        stackwise_input_filters=[16, 16], stackwise_output_filters=[16, 24],
        stackwise_expansion_ratios=[1, 4], stackwise_squeeze_and_excite_ratios=[0.0, 0.25],
        stackwise_strides=[1, 2], stackwise_block_types=["fused", "v1"],
        stackwise_width_coefficients=[1.0, 1.0], stackwise_depth_coefficients=[1.0, 1.0],
        stackwise_force_input_filters=[0, 0], stackwise_nores_option=[False, False],
        num_features=64, input_shape=IMAGE,
    )  # fmt: skip


def _segmenter() -> keras.Model:
    backbone = _hub("SegFormerBackbone", image_encoder=_mit(), projection_filters=16)
    return _hub("SegFormerImageSegmenter", backbone=backbone, num_classes=5)


def _vision(name: str, shape: tuple[int, int, int] = IMAGE, **options: Any) -> Build:
    """An image backbone of KerasHub, which takes its shape as `image_shape`."""

    def build() -> keras.Model:
        model = _hub(name, image_shape=shape, **options)
        x = keras.Input(shape, name="image")
        return keras.Model(x, _first(model(x)), name=name.lower())

    return build


def _first(outputs: Any) -> Any:
    """A backbone's main output: the sequence, or the last of a pyramid."""
    if isinstance(outputs, dict):
        return outputs.get("sequence_output", list(outputs.values())[-1])
    return outputs


def _application(name: str, size: int = 32) -> Build:
    def build() -> keras.Model:
        made = getattr(keras.applications, name)
        return made(input_shape=(size, size, 3), weights=None, classes=10)

    return build


def _densenet() -> keras.Model:
    made = importlib.import_module(keras.applications.DenseNet121.__module__).DenseNet
    return made([3, 4, 6, 4], input_shape=(32, 32, 3), weights=None, classes=10)


def _convnext() -> keras.Model:
    made = importlib.import_module(keras.applications.ConvNeXtTiny.__module__).ConvNeXt
    return made(
        [1, 1, 3, 1], [32, 64, 128, 256], layer_scale_init_value=1.0, input_shape=(32, 32, 3),
        weights=None, classes=10,
    )  # fmt: skip


def _convmixer() -> keras.Model:
    made = importlib.import_module("kimm._src.models.convmixer").ConvMixer
    return made(
        depth=6, hidden_channels=128, input_shape=(64, 64, 3), weights=None, classes=10,
        name="convmixer",
    )  # fmt: skip


def _kimm(name: str, size: int = 64) -> Build:
    def build() -> keras.Model:
        made = getattr(importlib.import_module("kimm.models"), name)
        return made(input_shape=(size, size, 3), weights=None, classes=10)

    return build


def _hgnet_v2() -> keras.Model:
    """HGNetV2B0, its learnable factors and offsets as training leaves them: not 1 and 0.

    The converter folds those away, and what ships after training would have more operators.
    """
    model = _kimm("HGNetV2B0")()
    rng = np.random.default_rng(0)
    for layer in model.layers:
        if type(layer).__name__ == "LearnableAffine":
            for weight in layer.weights:
                weight.assign(weight + 0.2 * rng.normal(size=weight.shape))
    return model


def _k3im(module: str, name: str, **options: Any) -> Build:
    return lambda: getattr(importlib.import_module(f"k3im.{module}"), name)(**options)


def _medical(name: str, **options: Any) -> Build:
    return lambda: getattr(importlib.import_module("medicai.models"), name)(
        input_shape=(32, 32, 3), num_classes=4, **options
    )


def _keras_vision(name: str, **options: Any) -> Build:
    def build() -> keras.Model:
        made = getattr(importlib.import_module(f"keras_vision.{name}"), f"build_{name}")
        model = made(pretrained=False, input_shape=IMAGE, num_classes=10, **options)
        x = keras.Input(IMAGE, name="image")
        return keras.Model(x, model(x), name=name.lower())

    return build


def _tcn() -> keras.Model:
    tcn = importlib.import_module("tcn")
    x = keras.Input((32, 4), name="sequence")
    features = tcn.TCN(nb_filters=8, dilations=(1, 2, 4), use_batch_norm=True)(x)
    return keras.Model(x, keras.layers.Dense(5)(features), name="tcn")


def _tcn_sequences() -> keras.Model:
    tcn = importlib.import_module("tcn")
    x = keras.Input((32, 4), name="sequence")
    features = tcn.TCN(nb_filters=8, dilations=(1, 2), use_layer_norm=True, return_sequences=True)(
        x
    )
    return keras.Model(x, keras.layers.Dense(5)(features), name="tcn_sequences")


def _yolo(name: str) -> Build:
    def build() -> keras.Model:
        return getattr(importlib.import_module("kyolo"), name)(nc=4, input_shape=IMAGE)

    return build


def _image_side(module: str, name: str) -> Build:
    """The image encoder of a model of images and texts, which KerasHub does not export."""

    def build() -> keras.Model:
        made = getattr(importlib.import_module(f"keras_hub.src.models.{module}"), name)
        encoder = made(
            patch_size=16, hidden_dim=32, num_layers=2, num_heads=2, intermediate_dim=64,
            image_shape=IMAGE,
        )  # fmt: skip
        x = keras.Input(IMAGE, name="images")
        return keras.Model(x, _first(encoder({"images": x})), name=name.lower())

    return build


def _whisper_encoder() -> keras.Model:
    backbone = _hub(
        "WhisperBackbone", vocabulary_size=VOCABULARY, num_mels=16,
        max_encoder_sequence_length=32, max_decoder_sequence_length=8, **TRANSFORMER,
    )  # fmt: skip
    features = next(x for x in backbone.inputs if x.name == "encoder_features")
    sequence = backbone.output["encoder_sequence_output"]
    encoder = keras.Model(features, sequence)
    x = keras.Input((32, 16), name="encoder_features")
    return keras.Model(x, encoder(x), name="whisper_encoder")


def _segformer() -> keras.Model:
    encoder = _mit()
    segmenter = _hub("SegFormerBackbone", image_encoder=encoder, projection_filters=16)
    x = keras.Input(IMAGE, name="image")
    return keras.Model(x, _first(segmenter(x)), name="segformer")


def _mit() -> Any:
    return _hub(
        "MiTBackbone", layerwise_depths=[1, 1], num_layers=2, layerwise_num_heads=[1, 2],
        layerwise_sr_ratios=[4, 2], max_drop_path_rate=0.1, layerwise_patch_sizes=[7, 3],
        layerwise_strides=[4, 2], hidden_dims=[16, 32], image_shape=IMAGE,
    )  # fmt: skip


def _mit_alone() -> keras.Model:
    x = keras.Input(IMAGE, name="image")
    return keras.Model(x, _first(_mit()(x)), name="mit")


_RESNET = {
    "input_conv_filters": [64], "input_conv_kernel_sizes": [7],
    "stackwise_num_filters": [64, 32], "stackwise_num_blocks": [1, 1],
    "stackwise_num_strides": [1, 2],
}  # fmt: skip
_VIT = {"patch_size": 16, "num_layers": 2, "num_heads": 2, "hidden_dim": 32}


def _pyramid(name: str, **options: Any) -> Build:
    """A network that is built on a ResNet of two stages."""

    def build() -> keras.Model:
        encoder = _hub(
            "ResNetBackbone", block_type="basic_block", image_shape=IMAGE,
            **{
                **_RESNET, "stackwise_num_filters": [64, 32, 32, 32],
                "stackwise_num_blocks": [1] * 4, "stackwise_num_strides": [1, 2, 2, 2],
            },
        )  # fmt: skip
        model = _hub(name, image_encoder=encoder, image_shape=IMAGE, **options)
        x = keras.Input(IMAGE, name="image")
        return keras.Model(x, _first(model(x)), name=name.lower())

    return build


# Collection -> architecture -> what makes it.
MODELS: dict[str, dict[str, Build]] = {
    "keras.applications": {
        **{
            name: _application(name, size)
            for name, size in (
                ("MobileNet", 32), ("MobileNetV2", 32), ("MobileNetV3Small", 32),
                ("EfficientNetB0", 32), ("EfficientNetV2B0", 32), ("ResNet50V2", 32),
                ("Xception", 71),
            )
        },
        # Fewer blocks and channels than DenseNet121 and ConvNeXtTiny; the same layers.
        "DenseNet, 17 blocks": _densenet,
        "ConvNeXt, 6 blocks": _convnext,
    },
    "keras_hub vision": {
        "ResNet": _vision("ResNetBackbone", block_type="basic_block", **_RESNET),
        "ResNetV2": _vision(
            "ResNetBackbone", block_type="bottleneck_block", use_pre_activation=True, **_RESNET
        ),
        "ResNetVD": _vision(
            "ResNetBackbone", block_type="basic_block_vd",
            **{**_RESNET, "input_conv_filters": [8, 8, 64], "input_conv_kernel_sizes": [3, 3, 3]},
        ),
        "DenseNet": _vision("DenseNetBackbone", stackwise_num_repeats=[2, 2, 2], growth_rate=8),
        "VGG": _vision(
            "VGGBackbone", stackwise_num_repeats=[1, 1], stackwise_num_filters=[8, 16]
        ),
        "CSPDarkNet": _vision(
            "CSPNetBackbone", stem_filters=8, stem_kernel_size=3, stem_strides=1,
            stackwise_depth=[1, 2], stackwise_strides=[2, 2], stackwise_num_filters=[16, 32],
            stage_type="dark", block_type="dark_block",
        ),
        "MobileNetV3": _vision(
            "MobileNetBackbone",
            stackwise_expansion=[[16], [24, 24]], stackwise_num_blocks=[1, 2],
            stackwise_num_filters=[[8], [16, 16]], stackwise_kernel_size=[[3], [5, 5]],
            stackwise_num_strides=[[2], [2, 1]], stackwise_se_ratio=[[0.25], [None, 0.25]],
            stackwise_activation=[["relu"], ["hard_swish", "hard_swish"]],
            stackwise_padding=[[1], [2, 2]], output_num_filters=32, depthwise_filters=8,
            depthwise_stride=2, depthwise_residual=False, last_layer_filter=32,
            squeeze_and_excite=0.5, input_num_filters=8,
        ),
        "MobileNetV5": _vision(
            "MobileNetV5Backbone",
            stackwise_block_types=[["er"], ["uir", "uir"]], stackwise_num_blocks=[1, 2],
            stackwise_num_filters=[[16], [24, 24]], stackwise_strides=[[2], [2, 1]],
            stackwise_act_layers=[["relu"], ["relu", "relu"]],
            stackwise_exp_ratios=[[4.0], [6.0, 6.0]], stackwise_se_ratios=[[0.0], [0.0, 0.0]],
            stackwise_dw_kernel_sizes=[[0], [5, 5]], stackwise_dw_start_kernel_sizes=[[0], [0, 0]],
            stackwise_dw_end_kernel_sizes=[[0], [0, 0]], stackwise_exp_kernel_sizes=[[3], [0, 0]],
            stackwise_pw_kernel_sizes=[[1], [0, 0]], stackwise_num_heads=[[0], [0, 0]],
            stackwise_key_dims=[[0], [0, 0]], stackwise_value_dims=[[0], [0, 0]],
            stackwise_kv_strides=[[0], [0, 0]], stackwise_use_cpe=[[False], [False, False]],
            use_msfa=False,
        ),
        "HGNetV2": _vision(
            "HGNetV2Backbone", depths=[1, 1], embedding_size=8, hidden_sizes=[16, 32],
            stem_channels=[3, 8, 8], hidden_act="relu", use_learnable_affine_block=True,
            stackwise_stage_filters=[(8, 8, 16, 1, 1, 3), (16, 8, 32, 1, 1, 3)],
            apply_downsample=[False, True], use_lightweight_conv_block=[False, True],
        ),
        "ViT": _vision("ViTBackbone", mlp_dim=64, **_VIT),
        "DeiT": _vision("DeiTBackbone", intermediate_dim=64, **_VIT),
        "DINOv2": _vision(
            "DINOV2Backbone", intermediate_dim=64, use_mask_token=False,
            position_embedding_shape=IMAGE, **_VIT,
        ),
        "DINOv3": _vision("DINOV3Backbone", intermediate_dim=64, use_mask_token=False, **_VIT),
        "Swin": _vision(
            "SwinTransformerBackbone", embed_dim=16, depths=(1, 1), num_heads=(2, 2),
            window_size=4,
        ),
        "MiT": _mit_alone,
        "SegFormer": _segformer,
        "RetinaNet": _pyramid("RetinaNetBackbone", min_level=3, max_level=4, use_p5=False),
        "DeepLabV3": _pyramid(
            "DeepLabV3Backbone", spatial_pyramid_pooling_key="P4", upsampling_size=4,
            dilation_rates=[2, 4], low_level_feature_key="P2", projection_filters=8,
        ),
        "CLIP vision": _image_side("clip.clip_vision_encoder", "CLIPVisionEncoder"),
        "SigLIP vision": _image_side("siglip.siglip_vision_encoder", "SigLIPVisionEncoder"),
        "EfficientNet": _efficientnet,
        "ViTDet": _vision(
            "ViTDetBackbone", hidden_size=32, num_layers=2, intermediate_dim=64, num_heads=2,
            global_attention_layer_indices=[1], patch_size=16, num_output_channels=16,
            window_size=2,
        ),
        "SegFormer, segmenter": _segmenter,
    },
    "keras_hub text": {
        "BERT": _tokens(
            "BertBackbone", vocabulary_size=VOCABULARY,
            max_sequence_length=TOKENS, **TRANSFORMER,
        ),
        "DistilBERT": _tokens(
            "DistilBertBackbone", vocabulary_size=VOCABULARY, max_sequence_length=TOKENS,
            **TRANSFORMER,
        ),
        "ALBERT": _tokens(
            "AlbertBackbone", vocabulary_size=VOCABULARY, embedding_dim=16,
            max_sequence_length=TOKENS, **TRANSFORMER,
        ),
        "ELECTRA": _tokens(
            "ElectraBackbone", vocab_size=VOCABULARY, embedding_dim=16,
            max_sequence_length=TOKENS, **TRANSFORMER,
        ),
        "RoBERTa": _tokens(
            "RobertaBackbone", vocabulary_size=VOCABULARY, max_sequence_length=TOKENS,
            **TRANSFORMER,
        ),
        "XLM-RoBERTa": _tokens(
            "XLMRobertaBackbone", vocabulary_size=VOCABULARY, max_sequence_length=TOKENS,
            **TRANSFORMER,
        ),
        "DeBERTa V3": _tokens(
            "DebertaV3Backbone", vocabulary_size=VOCABULARY, max_sequence_length=TOKENS,
            bucket_size=8, **TRANSFORMER,
        ),
        "FNet": _tokens(
            "FNetBackbone", vocabulary_size=VOCABULARY, num_layers=2,
            hidden_dim=32, intermediate_dim=64, max_sequence_length=TOKENS,
        ),
        "GPT-2": _tokens(
            "GPT2Backbone", vocabulary_size=VOCABULARY, max_sequence_length=TOKENS, **TRANSFORMER
        ),
        "GPT-NeoX": _tokens(
            "GPTNeoXBackbone", vocabulary_size=VOCABULARY, max_sequence_length=TOKENS,
            **TRANSFORMER,
        ),
        "OPT": _tokens(
            "OPTBackbone", vocabulary_size=VOCABULARY, max_sequence_length=TOKENS, **TRANSFORMER
        ),
        "BLOOM": _tokens("BloomBackbone", vocabulary_size=VOCABULARY, **TRANSFORMER),
        "Llama": _tokens("LlamaBackbone", **DECODER),
        "Llama 3": _tokens("Llama3Backbone", **DECODER),
        "Mistral": _tokens("MistralBackbone", sliding_window=8, **DECODER),
        "Gemma": _tokens("GemmaBackbone", head_dim=8, **DECODER),
        "Qwen2": _tokens("Qwen2Backbone", **DECODER),
        "Qwen3": _tokens("Qwen3Backbone", head_dim=8, sliding_window_size=None, **DECODER),
        "Phi-3": _tokens(
            "Phi3Backbone", max_sequence_length=TOKENS, pretraining_sequence_length=TOKENS,
            **DECODER,
        ),
        "BART": _fixed(
            lambda: _hub(
                "BartBackbone", vocabulary_size=VOCABULARY, max_sequence_length=TOKENS,
                **TRANSFORMER,
            )
        ),
        "T5": _fixed(lambda: _hub("T5Backbone", vocabulary_size=VOCABULARY, **TRANSFORMER)),
        "RoFormer V2": _tokens(
            "RoformerV2Backbone", vocabulary_size=VOCABULARY, head_size=16, **TRANSFORMER
        ),
        "ESM": _fixed(lambda: _hub("ESMBackbone", vocabulary_size=VOCABULARY, **TRANSFORMER)),
        "Gemma 3": _tokens("Gemma3Backbone", image_size=16, head_dim=8, **DECODER),
        "SmolLM3": _tokens(
            "SmolLM3Backbone", vocabulary_size=VOCABULARY, hidden_dim=32, intermediate_dim=64,
            num_layers=2, num_attention_heads=4, num_key_value_heads=2, attention_bias=False,
            attention_dropout=0.0, rope_layer_enabled_list=[True, False],
            layer_types=["full_attention"] * 2, mlp_bias=False, layer_norm_epsilon=1e-5,
            max_position_embeddings=TOKENS, rope_theta=10000.0, partial_rotary_factor=1.0,
        ),
        "BERT, classifier": _task(
            "BertTextClassifier", "BertBackbone",
            {"vocabulary_size": VOCABULARY, "max_sequence_length": TOKENS, **TRANSFORMER},
            num_classes=3,
        ),
        "FNet, classifier": _task(
            "FNetTextClassifier", "FNetBackbone",
            {
                "vocabulary_size": VOCABULARY, "max_sequence_length": TOKENS, "num_layers": 2,
                "hidden_dim": 32, "intermediate_dim": 64,
            },
            num_classes=3,
        ),
        "Llama, causal LM": _task("LlamaCausalLM", "LlamaBackbone", DECODER),
        # Their tables are read backwards as well.
        "GPT-2, causal LM": _task(
            "GPT2CausalLM", "GPT2Backbone",
            {"vocabulary_size": VOCABULARY, "max_sequence_length": TOKENS, **TRANSFORMER},
        ),
        "Gemma, causal LM": _task(
            "GemmaCausalLM", "GemmaBackbone", {"head_dim": 8, **DECODER}
        ),
        "BERT, masked LM": _task(
            "BertMaskedLM", "BertBackbone",
            {"vocabulary_size": VOCABULARY, "max_sequence_length": TOKENS, **TRANSFORMER},
        ),
    },
    "keras_hub audio": {"Whisper encoder": _whisper_encoder},
    "kimm": {
        "ConvMixer, 6 blocks": _convmixer,
        "HGNetV2B0": _hgnet_v2,
        **{
            name: _kimm(name)
            for name in (
                "ConvNeXtAtto", "EfficientNetLiteB0", "GhostNetW050", "GhostNetV2W100",
                "GhostNetV3W050", "HGNetTiny", "LCNet035", "MobileNetV3W050Small",
                "MobileOneS0", "MobileViTXXS", "MobileViTV2W050", "RegNetX002", "RegNetY002",
                "RepVGGA0",
            )
        },
    },
    "keras-tcn": {"TCN": _tcn, "TCN, sequences": _tcn_sequences},
    "k3im": {
        "CaiT": _k3im(
            "cait", "CaiTModel", image_size=(32, 32), patch_size=(8, 8), num_classes=4, dim=16,
            depth=2, heads=2, mlp_dim=32, cls_depth=1, dim_head=8,
        ),
        "gMLP": _k3im(
            "gmlp", "gMLPModel", image_size=(32, 32), patch_size=(8, 8), embedding_dim=16,
            num_blocks=2, dropout_rate=0.1, num_classes=4,
        ),
        "FNet, image": _k3im(
            "fnet", "FNetModel", image_size=(32, 32), patch_size=(8, 8), embedding_dim=16,
            num_blocks=2, dropout_rate=0.1, num_classes=4,
        ),
        "ViT, 1-D": _k3im(
            "vit_1d", "ViT1DModel", seq_len=64, patch_size=8, num_classes=4, dim=16, depth=2,
            heads=2, mlp_dim=32, dim_head=8,
        ),
    },
    "kyolo": {"YOLOv8n": _yolo("yolov8n"), "YOLO11n": _yolo("yolo11n")},
    "medicai": {
        "UNet": _medical("UNet", encoder_name="resnet18", decoder_filters=(32, 16, 16, 8, 8)),
        "SegFormer B0": _medical("SegFormer", encoder_name="mit_b0"),
    },
    "keras_vision": {
        "MobileViT v1": _keras_vision("MobileViT_v1", model_type="XXS"),
        "MobileViT v2": _keras_vision("MobileViT_v2", width_multiplier=0.5),
    },
    "written by hand": written_models.MODELS,
}  # fmt: skip
