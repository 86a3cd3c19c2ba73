"""Names that TensorFlow takes for the scope of a layer: `scope_name`, `is_scope_name`."""

import re

# As in tensorflow/python/framework/ops.py. Keras has more names: all but those with a slash.
_REFUSED = re.compile(r"[^A-Za-z0-9_.\\/>-]")


def is_scope_name(name: str) -> bool:
    """Whether a layer of this name can run in a `tf.function`, as it does in `fit`."""
    return _REFUSED.search(name) is None


def scope_name(name: str) -> str:
    """`name` with `_` for each character that no scope has."""
    return _REFUSED.sub("_", name)
