"""What tests use of Keras that the oldest supported Keras lacks: there they are skipped."""

import re
import traceback
from collections.abc import Iterator
from pathlib import Path

import keras
import pytest

# Names in keras.layers and keras.ops, and options of layers, with the Keras that brought them.
NEWER = {
    "RMSNormalization": "3.9", "rms_normalization": "3.9", "signbit": "3.9",
    "sparse_sigmoid": "3.10", "cbrt": "3.11", "deg2rad": "3.11", "ReversibleEmbedding": "3.12",
    "logaddexp2": "3.12", "view": "3.12", "AdaptiveAveragePooling1D": "3.13",
    "AdaptiveAveragePooling2D": "3.13", "AdaptiveAveragePooling3D": "3.13",
    "AdaptiveMaxPooling1D": "3.13", "AdaptiveMaxPooling2D": "3.13",
    "AdaptiveMaxPooling3D": "3.13", "adaptive_average_pool": "3.13",
    "adaptive_max_pool": "3.13", "array_split": "3.13", "depth_to_space": "3.14",
    "dstack": "3.14", "fliplr": "3.14", "fmod": "3.14", "hsplit": "3.14", "i0": "3.14",
    "nextafter": "3.14", "ptp": "3.14", "rad2deg": "3.14", "sinc": "3.14",
    "sliding_window": "3.14", "space_to_depth": "3.14", "use_gate": "3.14", "dsplit": "3.15",
    "erfc": "3.15", "fabs": "3.15", "fmax": "3.15", "fmin": "3.15", "percentile": "3.15",
    "sobel_edges": "3.15", "unique": "3.15",
}  # fmt: skip
TESTS = Path(__file__).parent


def missing(error: BaseException) -> str | None:
    """The name in `NEWER` that a test asked of a Keras without it; `None` for any other error.

    Where kqat itself asks for the name, the fault is kqat's.
    """
    for cause in _causes(error):
        name = _name(cause)
        if name not in NEWER or _number(keras.__version__) >= _number(NEWER[name]):
            continue
        files = [Path(frame.filename) for frame in traceback.extract_tb(cause.__traceback__)]
        ours = [path for path in files if path.is_relative_to(TESTS.parent)]
        ours = [path for path in ours if "site-packages" not in path.parts]
        if ours and ours[-1].is_relative_to(TESTS):
            return name
    return None


def skip_if_missing(error: BaseException) -> None:
    """Skips the test that failed with `error` if this Keras lacks what the test itself uses."""
    name = missing(error)
    if name is not None:
        pytest.skip(f"{name} came with Keras {NEWER[name]}; this is {keras.__version__}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _name(error: BaseException) -> str | None:
    if isinstance(error, AttributeError):
        return error.name if getattr(error.obj, "__name__", "").startswith("keras") else None
    found = re.search(r"unexpected keyword argument '(\w+)'", str(error)) or re.search(
        r"Unrecognized keyword arguments passed to \w+: \{'(\w+)'", str(error)
    )
    return found.group(1) if found else None


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def needs_keras(version: str, what: str) -> None:
    """Skips the test under an older Keras than `version`, which does not compute `what`."""
    if _number(keras.__version__) < _number(version):
        pytest.skip(f"{what} needs Keras {version}; this is {keras.__version__}")
