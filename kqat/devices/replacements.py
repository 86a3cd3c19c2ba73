"""**Table**: a function that a device does not run fast, and the nearest that it does."""

# Function -> those nearest to it, best first; `adapt` takes the first that the target's fast path
# has. Distances are by eye: the network is to be trained on after a change.
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
