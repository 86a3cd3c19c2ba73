"""Why a runtime did not run a file: it is not installed, or has no kernel for an operator."""

from ai_edge_litert import schema_py_generated as schema

from kqat.base import RuntimeUnavailableError
from kqat.devices import runtimes_with
from tflite_export import flatbuffer
from tflite_export.flatbuffer import ModelT
from tflite_export.kernels import OP_TABLE
from tflite_export.runtimes import supports, wide_softmax
from tflite_export.verification.report import RuntimeReport


def did_not_run(runtime: str, model: ModelT, error: RuntimeUnavailableError) -> RuntimeReport:
    """The report of a runtime that raised `error` instead of running a file."""
    installed = supports(runtime)
    lacks = lacking_kernels(model, runtime) if installed else ()
    problem = str(error)
    width = wide_softmax(model)
    if width is not None and "SIGABRT" in problem:
        problem += (
            f" The file has a SOFTMAX over {width} values: this runtime's kernel aborts where so "
            "many of them are nearly equal, as before training. Compare on data whose classes the "
            "model tells apart, or end the model at its logits."
        )
    return RuntimeReport(runtime=runtime, problem=problem, lacks=lacks, installed=installed)


def lacking_kernels(model: ModelT, runtime: str) -> tuple[str, ...]:
    """The operators of a file for which a runtime has no kernel, sorted by name.

    Only operators in `OP_TABLE` are checked, at the width of their activations.
    """
    kinds, lacking = schema.TensorType, set()
    for graph in model.subgraphs:
        for operator in graph.operators:
            name = flatbuffer.op_name(model, operator)
            tensors = [graph.tensors[t] for t in (*operator.inputs, *operator.outputs) if t >= 0]
            types = {tensor.type for tensor in tensors}
            if name not in OP_TABLE or kinds.FLOAT32 in types:
                continue
            bits = 16 if kinds.INT16 in types else 8
            if runtime not in runtimes_with(name, bits):
                lacking.add(name)
    return tuple(sorted(lacking))
