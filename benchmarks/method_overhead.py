"""What each method of recovery adds to a training step, over the float model's.

    python -m benchmarks.method_overhead --out benchmarks/method_overhead.json

ResNet-8 at batches of 32. All models start from the same weights, see the same batches and take
turns in one process with one thread. A ratio is taken within a round; a round's time is the median
step of a short `fit`, with what the method's callbacks do in it. `--out` also writes the table
beside the JSON, as Markdown.
"""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

import kqat
from benchmarks.networks import NETWORKS, SMOKE
from benchmarks.training_step import batches_of, step_of_fit
from kqat.base import write_file
from recipes.timing import as_json, print_table, ratio, take_turns, write_json

# Three, so that the median leaves out a step in which a callback compiles something.
STEPS = 3
WARMUP_ROUNDS = 6
BATCH_SIZE = 32
FLOAT = "float"
HEADER = ("method", "wall", "processor")


def _config(bits: int, step: str, **options: Any) -> kqat.QuantizeConfig:
    spec = kqat.QuantSpec(bits=bits, symmetric=True, narrow_range=bits > 1, axis="channel")
    return kqat.QuantizeConfig(weights=spec, weight_step=step, **options)


# Policy, and the callbacks that `fit` gets.
Case = tuple[Any, Callable[[], Sequence[keras.callbacks.Callback]]]


def _none() -> Sequence[keras.callbacks.Callback]:
    return ()


QUANTIZED: dict[str, Case] = {
    "int8 (default)": ("int8", _none),
    "int8, finetune's callbacks": ("int8", lambda: kqat.finetune_callbacks(1)),
    "w4a8 (default: LSQ)": ("w4a8", _none),
    "ternary (default: TWN)": ("ternary", _none),
    "binary (default: XNOR)": ("binary", _none),
    "LSQ, LSQ+ activations": (_config(4, "lsq", activation_range="lsq_plus"), _none),
    "LSQ, PACT activations": (_config(4, "lsq", activation_range="pact"), _none),
    "TQT, weights and activations": (_config(4, "tqt", activation_range="tqt"), _none),
    "TTQ": (_config(2, "ttq"), _none),
    "least squares": (_config(4, "mse"), _none),
    "element-wise gradient scaling": (_config(4, "lsq", weight_gradient="ewgs"), _none),
    "additive noise": (_config(4, "lsq", weight_gradient="noise"), _none),
    "LSQ, stochastic rounding": ("w4a8", lambda: [kqat.StochasticRounding()]),
    "LSQ, dampening": ("w4a8", lambda: [kqat.DampenOscillations()]),
    "LSQ, freezing oscillations": ("w4a8", lambda: [kqat.FreezeOscillations()]),
}
PRESERVED = {"int8, sparsity": ("sparsity",), "int8, clusters": ("clusters",)}
DISTILLED = "LSQ, distillation"
CASES = (*QUANTIZED, *PRESERVED, DISTILLED)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints a table and writes JSON."""
    options = _parser().parse_args(arguments)
    if not options.smoke:
        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(1)
    rounds, warmup = (1, 0) if options.smoke else (options.rounds, WARMUP_ROUNDS)
    resnet8 = dataclasses.replace(NETWORKS["resnet8"], batch_size=BATCH_SIZE)
    ((trained, network),) = (SMOKE if options.smoke else {"resnet8": resnet8}).items()
    keras.utils.set_random_seed(0)
    batches = batches_of(network, STEPS)
    model = network.build(keras)
    cases = {FLOAT: step_of_fit(keras, _compiled(model), batches)}
    for name in options.cases:
        qat, callbacks = _model(name, model, batches)
        cases[name] = step_of_fit(keras, _compiled(qat), batches, callbacks)
    measured = take_turns(cases, rounds, warmup)
    rows = [
        (name, str(ratio(measured, name, FLOAT)), str(ratio(measured, name, FLOAT, "processor")))
        for name in options.cases
    ]
    print_table(HEADER, rows)
    if options.out:
        pairs = [(name, FLOAT) for name in options.cases]
        write_json(options.out, {"rounds": rounds, trained: as_json(measured, pairs)})
        write_file(options.out.with_suffix(".md"), _page(rows, rounds).encode())


def _model(
    name: str, model: keras.Model, batches: tf.data.Dataset
) -> tuple[keras.Model, Sequence[keras.callbacks.Callback]]:
    """The model of a case, not compiled, and its callbacks."""
    x = next(iter(batches))[0].numpy()
    if name in PRESERVED:
        start = kqat.cluster(kqat.prune(model), 16)
        return kqat.quantize_model(start, calibration_data=x, preserve=PRESERVED[name]), ()
    if name == DISTILLED:
        teacher = keras.models.clone_model(model)
        teacher.set_weights(model.get_weights())
        student = kqat.quantize_model(model, "w4a8", calibration_data=x)
        return kqat.Distiller(student, teacher, kind="probabilities"), ()
    policy, callbacks = QUANTIZED[name]
    return kqat.quantize_model(model, policy, calibration_data=x), callbacks()


def _compiled(model: keras.Model) -> keras.Model:
    model.compile(keras.optimizers.Adam(1e-4), "sparse_categorical_crossentropy")
    return model


def _page(rows: Sequence[Sequence[str]], rounds: int) -> str:
    lines = [" | ".join(("", *cells, "")).strip() for cells in (HEADER, ("---",) * 3, *rows)]
    return "\n".join(
        [
            "# A training step of each method, divided by the float model's",
            "",
            f"`python -m benchmarks.method_overhead` writes this file. ResNet-8, batches of "
            f"{BATCH_SIZE}, one thread, {rounds} rounds in turns: median and quartiles, by wall "
            "clock and by the processor's.",
            "",
            *lines,
            "",
        ]
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10, help="runs of each model")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--out", type=Path, help="where to write JSON")
    parser.add_argument("--smoke", action="store_true", help="a tiny network, one round")
    return parser


if __name__ == "__main__":
    main()
