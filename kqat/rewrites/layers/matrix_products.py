"""Rewrites einsum-like products as matrix products: Dense for a constant factor, else Matmul."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers

from kqat.base import UnsupportedLayerError, spelled_out
from kqat.graph import Part, config_of
from kqat.parts import Matmul, Slice, total
from kqat.rewrites.layers.basic import Decomposed, activated
from kqat.rewrites.operations.weights import computed, emitted

_LETTERS = "abcdefghijkl"


def einsum(
    subscripts: str, a: Any, b: Any, name: str, options: dict[str, Any] | None = None
) -> Any:
    """`einsum` of two tensors, or of a tensor and a constant or variable.

    A letter of both factors that the output lacks is contracted. A letter of one factor only that
    the output lacks is summed before the product. Of a letter that one factor has more than once
    the diagonal is taken first. A constant becomes the kernel of a `Dense`, which gets `options`;
    by default it is trainable if it was a trainable variable.

    Raises:
        UnsupportedLayerError: if the equation is not a matrix product for each sample.
    """
    (first, second), output = spelled_out(subscripts, [len(a.shape), len(b.shape)])
    if not isinstance(a, keras.KerasTensor):
        a, b, first, second = b, a, second, first
    a, first = _diagonal(a, first, f"{name}_left")
    b, second = _diagonal(b, second, f"{name}_right")
    a, b, first, second = _without_ones(a, b, first, second, name)
    if not isinstance(b, keras.KerasTensor):
        if options is None and not _is_dense(first, second, output):
            return _with_value((first, second, output), a, b, name)
        return _with_constant((first, second, output), a, b, name, options)
    if first[0] != second[0] or output[:1] != first[0]:
        raise _no_product(subscripts, name)
    a, first = _summed(a, first, second + output, f"{name}_left")
    b, second = _summed(b, second, first + output, f"{name}_right")
    shared = "".join(c for c in first if c in second and c in output)
    gone = "".join(c for c in first if c in second and c not in output)
    left, right = (
        "".join(c for c in letters if c not in shared + gone) for letters in (first, second)
    )
    if not gone:
        return _by_element((a, first), (b, second), output, name)
    sizes = {**dict(zip(first, a.shape, strict=True)), **dict(zip(second, b.shape, strict=True))}
    matrix = [_matrix(a, first, (shared, left, gone), sizes, f"{name}_left")]
    matrix.append(_matrix(b, second, (shared, gone, right), sizes, f"{name}_right"))
    product = Matmul(name=f"{name}_product")(matrix)
    return _taken_apart(product, shared + left + right, sizes, output, name)


def _taken_apart(
    product: Any, letters: str, sizes: Mapping[str, Any], output: str, name: str
) -> Any:
    """A product of matrices with an axis for each letter, in the order of `output`."""
    shape = tuple(sizes[c] for c in letters[1:])
    if tuple(product.shape[1:]) != shape:
        product = layers.Reshape(shape, name=f"{name}_shape")(product)
    return _permuted(product, letters, output, name) if letters != output else product


def contraction(subscripts: str, operands: Sequence[Any], name: str) -> Any:
    """`einsum` of any number of operands, two at a time from the left.

    Raises:
        UnsupportedLayerError: as for `einsum`.
    """
    terms, output = spelled_out(subscripts, [len(x.shape) for x in operands])
    factors = list(operands)
    if len(terms) == 1:
        return _rearranged(factors[0], terms[0], output, name)
    while len(terms) > 2:
        later = "".join(terms[2:]) + output
        # A tensor's first letter is that of the batch, which comes first in what is made too.
        ahead = terms[:2] if isinstance(factors[0], keras.KerasTensor) else terms[1::-1]
        made = "".join(c for c in dict.fromkeys("".join(ahead)) if c in later)
        equation = f"{terms[0]},{terms[1]}->{made}"
        if any(isinstance(factor, keras.KerasTensor) for factor in factors[:2]):
            label = f"{name}_first" if len(factors) == len(operands) else f"{name}_{len(factors)}"
            joined = einsum(equation, factors[0], factors[1], label)
        else:
            joined = np.einsum(equation, *(np.asarray(factor) for factor in factors[:2]))
        terms, factors = [made, *terms[2:]], [joined, *factors[2:]]
    return einsum(f"{terms[0]},{terms[1]}->{output}", factors[0], factors[1], name)


def _rearranged(x: Any, letters: str, output: str, name: str) -> Any:
    """`einsum` of one tensor: diagonals, sums over axes, and another order of the others."""
    if output[:1] != letters[0] or set(output) - set(letters):
        raise _no_product(f"{letters}->{output}", name)
    x, letters = _diagonal(x, letters, name)
    moved = "".join(c for c in letters if c in output) != output
    x, letters = _summed(x, letters, output, f"{name}_unordered" if moved else name)
    return _permuted(x, letters, output, name)


def _diagonal(x: Any, letters: str, name: str) -> tuple[Any, str]:
    """A factor with each of its letters once, and these.

    The diagonal of axes of equal size is every (size + 1)-th of their numbers in a row.
    """
    own = "".join(dict.fromkeys(letters))
    if own == letters:
        return x, letters
    if not isinstance(x, keras.KerasTensor):
        trained = isinstance(x, keras.Variable) and x.trainable
        return keras.Variable(np.einsum(f"{letters}->{own}", np.asarray(x)), trainable=trained), own
    if letters.count(letters[0]) > 1:
        raise _no_product(f"{letters}->{own}", name)
    for c in own:
        count = letters.count(c)
        if count == 1:
            continue
        axes = [i for i, one in enumerate(letters) if one == c]
        size, others = x.shape[axes[0]], [i for i in range(len(letters)) if i not in axes]
        order, label = [*others[1:], *axes], f"{name}_{c}"
        if order != [*range(1, len(letters))]:
            x = layers.Permute(order, name=f"{label}_moved")(x)
        kept = x.shape[1 : len(others)]
        x = layers.Reshape((*kept, size**count), name=f"{label}_row")(x)
        step = sum(size**power for power in range(count))
        ends, ones = [*kept, size**count], [1] * len(kept)
        x = Slice([0] * len(ends), ends, [*ones, step], name=f"{label}_diagonal")(x)
        letters = "".join(letters[i] for i in others) + c
    return x, letters


def _by_element(left: tuple[Any, str], right: tuple[Any, str], output: str, name: str) -> Any:
    """The product of two tensors of which no axis is summed; each may lack axes of the other."""
    factors = []
    for side, (x, letters) in (("left", left), ("right", right)):
        own = "".join(c for c in output if c in letters)
        x = _permuted(x, letters, own, f"{name}_{side}_moved")
        sizes = iter(x.shape)
        shape = [next(sizes) if c in letters else 1 for c in output][1:]
        if len(own) < len(output):
            x = layers.Reshape(shape, name=f"{name}_{side}_shape")(x)
        factors.append(x)
    return layers.Multiply(name=name)(factors)


def _is_dense(first: str, second: str, output: str) -> bool:
    """Whether a product with a constant is a Dense over some axes."""
    gone = "".join(c for c in second if c in first and c not in output)
    made = "".join(c for c in second if c not in gone)
    kept = "".join(c for c in first if c not in gone)
    whole = set(output) == set(kept + made) and not set(made) & set(first)
    return bool(gone) and whole and first[:1] not in gone and output[:1] == first[:1]


def _with_value(letters: tuple[str, str, str], x: Any, constant: Any, name: str) -> Any:
    """`einsum` of a tensor and a constant that is another for each of their common axes."""
    first, second, output = letters
    array = np.asarray(constant, np.float32)
    if first[0] not in second:
        array, second = array[None], first[0] + second
    if second[0] != first[0] or array.shape[0] != 1 or output[:1] != first[0]:
        raise _no_product(f"{first},{second}->{output}", name)
    trained = isinstance(constant, keras.Variable) and constant.trainable
    x, first = _summed(x, first, second + output, f"{name}_left")
    lasting = "".join(c for c in second if c in first + output)
    shared = "".join(c for c in first if c in lasting and c in output)
    gone = "".join(c for c in first if c in lasting and c not in output)
    left = "".join(c for c in first if c not in shared + gone)
    right = "".join(c for c in lasting if c not in first)
    if not gone:
        value = keras.Variable(array, trainable=trained)
        value = computed(value, x, len(second), f"{name}_constant")
        return einsum(f"{first},{second}->{output}", x, value, name)
    sizes = {
        **dict(zip(second, array.shape, strict=True)),
        **dict(zip(first, x.shape, strict=True)),
    }
    # The constant ships as the matrices that the kernel reads, on the side that saves a transpose.
    ahead = output == shared + right + left
    theirs = (shared, right, gone) if ahead else (shared, gone, right)
    ours = (shared, gone, left) if ahead else (shared, left, gone)
    array = np.einsum(f"{second}->{''.join(theirs)}", array)
    shape = _matrix_shape(theirs, sizes)
    value = keras.Variable(array.reshape(1, *shape), trainable=trained)
    value = emitted(value, x, len(shape) + 1, f"{name}_constant")
    factors = [_matrix(x, first, ours, sizes, f"{name}_left"), value]
    product = Matmul(name=f"{name}_product")(factors[::-1] if ahead else factors)
    made = shared + (right + left if ahead else left + right)
    return _taken_apart(product, made, sizes, output, name)


def with_weight(x: Any, weight: Any, name: str, *, weight_first: bool) -> Any:
    """`matmul` of a tensor and a weight, whose leading axes broadcast against each other.

    Raises:
        UnsupportedLayerError: if they do not, or the weight has more axes or the batch's size.
    """
    letters = _LETTERS[: len(x.shape)]
    lead, outer, inner = letters[:-2], letters[-2], letters[-1]
    if weight_first:
        outer, inner = inner, outer
    theirs = lead[len(lead) - (len(weight.shape) - 2) :] if len(weight.shape) > 2 else ""
    sizes = dict(zip(letters, x.shape, strict=True))
    # Axes of one that the weight repeats: they become axes of the weight alone.
    alone = [c for c, n in zip(theirs, weight.shape, strict=False) if n != 1 and sizes[c] == 1]
    wrong = [
        c
        for c, n in zip(theirs, weight.shape, strict=False)
        if c not in alone and n not in (sizes[c] or 1,)
    ]
    if len(weight.shape) > len(x.shape) or wrong:
        raise UnsupportedLayerError(
            f"Expected a weight whose leading axes are those of the tensor in operation '{name}'. "
            f"Received: a weight of shape {tuple(weight.shape)} and a tensor of shape "
            f"{tuple(x.shape)}. Reshape so that they are equal."
        )
    if alone:
        shape = [n for c, n in zip(letters[1:], x.shape[1:], strict=True) if c not in alone]
        x = layers.Reshape(tuple(shape), name=f"{name}_without_ones")(x)
    mine = f"{theirs}z{inner}" if weight_first else f"{theirs}{inner}z"
    made = f"{lead}z{outer}" if weight_first else f"{lead}{outer}z"
    given = "".join(c for c in letters if c not in alone)
    return einsum(f"{given},{mine}->{made}", x, weight, name)


def _no_product(subscripts: str, name: str) -> UnsupportedLayerError:
    return UnsupportedLayerError(
        f"Expected an equation that is a matrix product for each sample in '{name}', such as "
        f"'bij,bjk->bik'. Received: {subscripts!r}. Permute and reshape its inputs, or use Dense."
    )


def _with_constant(
    letters: tuple[str, str, str], x: Any, constant: Any, name: str, options: dict[str, Any] | None
) -> Any:
    """`einsum` of a tensor and a constant, as a Dense over the last axes."""
    first, second, output = letters
    trained = isinstance(constant, keras.Variable) and constant.trainable
    gone = "".join(c for c in second if c in first and c not in output)
    made = "".join(c for c in second if c not in gone)
    kept = "".join(c for c in first if c not in gone)
    if not _is_dense(first, second, output):
        raise _no_product(f"{first},{second}->{output}", name)
    kernel = np.einsum(f"{second}->{gone}{made}", np.asarray(constant, np.float32))
    x = _permuted(x, first, kept + gone, f"{name}_moved")
    final = kept + made == output
    product_name = name if final and made else f"{name}_product"
    y = dense(kernel, None, len(gone), product_name, options or {"trainable": trained})(x)
    if not made:
        last = name if final else f"{name}_squeezed"
        y = layers.Reshape(tuple(y.shape[1:-1]), name=last)(y)
    return y if final else _permuted(y, kept + made, output, name)


def _without_ones(a: Any, b: Any, first: str, second: str, name: str) -> tuple[Any, Any, str, str]:
    """The factors without axes of one that the other factor repeats, and their terms."""
    sizes = dict(zip(first, a.shape, strict=True)), dict(zip(second, b.shape, strict=True))
    a, first = _without_repeated(a, first, sizes[1], f"{name}_left_without_ones")
    b, second = _without_repeated(b, second, sizes[0], f"{name}_right_without_ones")
    return a, b, first, second


def _without_repeated(x: Any, letters: str, sizes: Mapping[str, Any], name: str) -> tuple[Any, str]:
    symbolic = isinstance(x, keras.KerasTensor)
    # The batch, which comes first in a tensor, is repeated by nothing.
    ones = [n == 1 and not (symbolic and i == 0) for i, n in enumerate(x.shape)]
    kept = [i for i, c in enumerate(letters) if not (ones[i] and (sizes.get(c) or 1) > 1)]
    if len(kept) == len(letters):
        return x, letters
    shape = [x.shape[i] for i in kept]
    if symbolic:
        made = layers.Reshape(shape[1:], name=name)(x)
    else:
        trained = isinstance(x, keras.Variable) and x.trainable
        made = keras.Variable(np.reshape(np.asarray(x), shape), trainable=trained)
    return made, "".join(letters[i] for i in kept)


def _summed(x: Any, letters: str, others: str, name: str) -> tuple[Any, str]:
    axes = [i for i, c in enumerate(letters) if c not in others]
    if axes:
        x = total(x, axes, False, f"{name}_sum")
    return x, "".join(c for c in letters if c in others)


def _permuted(x: Any, letters: str, wanted: str, name: str) -> Any:
    if letters == wanted:
        return x
    return layers.Permute([letters.index(c) for c in wanted[1:]], name=name)(x)


def _matrix(x: Any, letters: str, parts: Sequence[str], sizes: dict[str, Any], name: str) -> Any:
    """`x` permuted and reshaped so that each of `parts`, a group of letters, is one axis."""
    x = _permuted(x, letters, "".join(parts), f"{name}_moved")
    shape = _matrix_shape(parts, sizes)
    if tuple(x.shape[1:]) != tuple(shape):
        x = layers.Reshape(shape, name=f"{name}_matrix")(x)
    return x


def _matrix_shape(parts: Sequence[str], sizes: Mapping[str, Any]) -> list[int]:
    """The shape behind the batch: the axes that two factors share as one, rows, columns."""
    shape = [int(np.prod([sizes[c] for c in part])) for part in parts[1:]]
    more = [sizes[c] for c in parts[0][1:]]
    return [*([int(np.prod(more))] if more else []), *shape]


def dot(layer: Any, name: str) -> Decomposed:
    """`Dot` as a matrix product for each sample; `normalize=True` divides by the norms first."""

    def call(inputs: Any) -> Any:
        a, b = inputs
        ranks = len(a.shape), len(b.shape)
        axes = (layer.axes,) * 2 if isinstance(layer.axes, int) else tuple(layer.axes)
        ours, theirs = (axis % rank for axis, rank in zip(axes, ranks, strict=True))
        if layer.normalize:
            unit = layers.UnitNormalization
            last = ours - ranks[0], theirs - ranks[1]
            a = unit(axis=last[0], name=f"{name}_left_unit")(a)
            b = unit(axis=last[1], name=f"{name}_right_unit")(b)
        first = "zabcdefgh"[: ranks[0]]
        second = list("zijklmnop"[: ranks[1]])
        second[theirs] = first[ours]
        rest = "".join(c for c in [*first[1:], *second[1:]] if c != first[ours])
        result = einsum(f"{first},{''.join(second)}->z{rest}", a, b, name)
        if rest:
            return result
        return layers.Reshape((1,), name=f"{name}_column")(result)

    return call


def einsum_dense(layer: Any, name: str) -> Decomposed:
    """`EinsumDense` as `Dense`, where its equation is a matrix product over some axes."""
    ranks = [len(layer.input.shape), len(layer.kernel.shape)]
    (inputs, kernel), output = spelled_out(layer.equation, ranks)
    count = len([c for c in kernel if c in inputs and c not in output])
    gone, made = kernel[:count], kernel[count:]
    fits = (
        not set(made) & set(inputs)
        and inputs.endswith(gone)
        and output == inputs[: len(inputs) - count] + made
        and (layer.bias is None or tuple(layer.bias.shape) == tuple(layer.kernel.shape[count:]))
    )
    if fits and count:
        bias = None if layer.bias is None else np.asarray(layer.bias)
        product = dense(np.asarray(layer.kernel), bias, count, name, options(layer, name))
    else:
        product = _permuted_dense(layer, name)
    return activated(layer, name, product)


def _permuted_dense(layer: Any, name: str) -> Decomposed:
    given, bias = options(layer, name), layer.bias
    if given["bias_regularizer"]:
        raise UnsupportedLayerError(
            f"Expected no bias_regularizer in layer '{name}': for its equation {layer.equation!r} "
            "the bias is added by another layer. Remove the regularizer, or permute the axes."
        )

    def call(x: Any) -> Any:
        product_name = name if bias is None else f"{name}_unbiased"
        y = einsum(layer.equation, x, layer.kernel, product_name, given)
        return y if bias is None else keras.ops.add(y, bias)

    return call


def options(layer: Any, name: str) -> dict[str, Any]:
    """The arguments (trainable, regularizers) that the parts of a layer take over from it.

    Raises:
        UnsupportedLayerError: if the layer has a constraint: the parts' kernels have other shapes.
    """
    config = config_of(layer)
    constrained = [k for k in ("kernel_constraint", "bias_constraint") if config.get(k)]
    if constrained:
        raise UnsupportedLayerError(
            f"Expected no {' or '.join(constrained)} in layer '{name}': kqat splits it into layers "
            "whose kernels have other shapes. Use a regularizer, or remove the constraint."
        )
    kept = ("kernel_regularizer", "bias_regularizer")
    return {"trainable": layer.trainable, **{k: config.get(k) for k in kept}}


def dense(
    kernel: np.ndarray, bias: np.ndarray | None, count: int, name: str, options: dict[str, Any]
) -> Decomposed:
    """A product over the last `count` axes of a tensor, as a `Dense` between reshapes.

    Args:
        kernel: shape (sizes of the last `count` axes, sizes of the axes that replace them).
        bias: shape of the axes that replace them, or `None`.
        count: number of axes that are contracted.
        name: name of the last part.
        options: further arguments of `Dense`.
    """
    made = kernel.shape[count:]
    matrix = kernel.reshape(int(np.prod(kernel.shape[:count])), -1)
    weights = [matrix] if bias is None else [matrix, bias.reshape(-1)]
    reshaped = len(made) > 1
    dense_name = f"{name}_product" if reshaped else name
    units = matrix.shape[1]
    layer = layers.Dense(units, use_bias=bias is not None, name=dense_name, **options)
    part = Part(layer, weights)

    def call(x: Any) -> Any:
        kept = tuple(x.shape[1 : len(x.shape) - count])
        if count > 1:
            x = layers.Reshape((*kept, matrix.shape[0]), name=f"{name}_joined")(x)
        y = part(x)
        return layers.Reshape((*kept, *made), name=name)(y) if reshaped else y

    return call
