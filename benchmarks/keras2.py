"""tf_keras and tfmot, with which benchmarks compare; without the extra, a message names it."""

try:
    import tf_keras
    from tensorflow_model_optimization.quantization.keras import (
        quantize_model as tfmot_quantize_model,
    )
except ImportError as error:
    raise SystemExit(
        f"Expected the packages of the extra 'tfmot'. Received: {error}. "
        "pip install 'kqat[tfmot]', or from a checkout pip install -e '.[tfmot]'."
    ) from error

__all__ = ["tf_keras", "tfmot_quantize_model"]
