"""SHA-256 of the files of some twenty models: what a change of structure must leave as it was.

    python -m benchmarks.fingerprints --out out/fingerprints.json [--keras-dir FOLDER]

Run it before and after, and compare the two tables. Models: ten of the contract's cases, the five
of MLPerf Tiny (where the shared data are), and MobileNetV2 0.35 at 96 x 96 in int8, w4a8 and
int16x8. Weights and calibration data are seeded.

With --keras-dir the QAT models are saved there; files that lie there already are loaded and
converted instead, so that a folder written by an older tree shows whether its files still ship.
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

import kqat
import tflite_export
from benchmarks import networks
from recipes import data

CONTRACT = (
    "dense_relu_bn", "conv1d_causal", "conv2d_dilated_bn", "separable2d_bn", "attention",
    "layer_norm", "lstm", "bidirectional_fused", "activation_mish", "residual",
)  # fmt: skip
CALIBRATION_SAMPLES = 64


def main(argv: Sequence[str] | None = None) -> dict[str, str]:
    """Prints and returns name -> SHA-256 of the `.tflite`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where to write the table as JSON")
    parser.add_argument("--keras-dir", type=Path, help="folder of saved QAT models, see above")
    options = parser.parse_args(argv)
    table = {}
    for name, build in _models():
        keras.utils.clear_session()
        keras.utils.set_random_seed(0)
        blob = tflite_export.convert(_qat(name, build, options.keras_dir))
        table[name] = hashlib.sha256(blob).hexdigest()
        print(f"{name:32} {len(blob):9,} {table[name]}", flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(table, indent=1) + "\n")
    return table


def _qat(name: str, build: Callable[[], keras.Model], folder: Path | None) -> keras.Model:
    path = None if folder is None else folder / f"{name.replace('/', '_')}.keras"
    if path is not None and path.exists():
        return keras.models.load_model(path)
    qat = build()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        qat.save(path)
    return qat


def _quantized(model: keras.Model, policy: Any, inputs: Any) -> keras.Model:
    return kqat.quantize_model(model, policy, calibration_data=inputs)


def _models() -> Iterator[tuple[str, Callable[[], keras.Model]]]:
    from tests.coverage import test_contract
    from tests.coverage.cases import inputs_of

    cases = {case.name: case for case in test_contract.CASES}
    for name in CONTRACT:
        case = cases[name]

        def contract(case: Any = case) -> keras.Model:
            model = case.model()
            return _quantized(model, case.policy, inputs_of(model, CALIBRATION_SAMPLES))

        yield f"contract/{name}", contract
    for name in ("ic", "kws", "vww", "ad", "sww") if data.available() else ():

        def tiny(name: str = name) -> keras.Model:
            model = data.pretrained(f"mlperf_tiny/{name}")
            return _quantized(model, "int8", _noise(model))

        yield f"mlperf_tiny/{name}", tiny
    for policy in ("int8", "w4a8", "int16x8"):

        def mobilenet(policy: str = policy) -> keras.Model:
            model = networks.mobilenet_v2(keras)
            # With Keras's initial statistics the last layers would be dead: those of one batch.
            for layer in model.layers:
                if isinstance(layer, keras.layers.BatchNormalization):
                    layer.momentum = 0.0
            model(_noise(model), training=True)
            return _quantized(model, policy, _noise(model))

        yield f"mobilenet_v2/{policy}", mobilenet


def _noise(model: keras.Model) -> np.ndarray:
    shape = (CALIBRATION_SAMPLES, *model.inputs[0].shape[1:])
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


if __name__ == "__main__":
    main()
