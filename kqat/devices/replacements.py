"""**Table**: for each activation function, similar functions that may replace it on a device."""

# Function -> similar functions, the most similar first. `adapt` takes the first one that the target
# runs fast. The order is a judgement by eye: the network has to be trained on after a change.
NEAREST: dict[str, tuple[str, ...]] = {
    "silu": ("hard_silu", "relu6"),
    "mish": ("hard_silu", "relu6"),
    "hard_silu": ("relu6",),
    "gelu": ("relu6",),
    "elu": ("leaky_relu", "relu"),
    "celu": ("leaky_relu", "relu"),
    "selu": ("leaky_relu", "relu"),
    "leaky_relu": ("relu",),
    "softplus": ("relu",),
    "squareplus": ("relu",),
    "sparse_plus": ("relu",),
    "softsign": ("tanh",),
    "hard_tanh": ("tanh",),
    "hard_sigmoid": ("sigmoid",),
    "sparse_sigmoid": ("sigmoid",),
}
