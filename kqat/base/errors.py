"""Every error that kqat and tflite_export raise on purpose.

    KqatError
    ├── ModelError             the thing given is not a model that can be quantized
    ├── UnsupportedLayerError  a layer, dtype or option with no integer form
    ├── SpecError              bits, symmetry, axis or range outside what a grid allows
    ├── PolicyError            a policy or config that cannot be carried out
    ├── CalibrationError       calibration data missing, empty, misshapen or not finite
    ├── FreezeError            a trained model that cannot become integers
    └── ExportError            the flatbuffer could not be made, read or run
        ├── LoweringError      the converter's output is not what was marked
        ├── TargetError        the target's runtime lacks a kernel that the model needs
        └── RuntimeUnavailableError  a runtime is not installed, or refused the file

Messages say what was expected, what was received, where, and what to do.
"""


class KqatError(Exception):
    """Base of every error raised on purpose by this project."""


class ModelError(KqatError, ValueError):
    """The thing given is not a model that can be quantized."""


class UnsupportedLayerError(KqatError, ValueError):
    """A layer, dtype or option has no integer form; the message names the way out."""


class SpecError(KqatError, ValueError):
    """Bits, symmetry, axis or range lie outside what an integer grid allows."""


class PolicyError(KqatError, ValueError):
    """A policy or config cannot be carried out for the layer it was given for."""


class CalibrationError(KqatError, ValueError):
    """Calibration data are missing, empty, misshapen or not finite."""


class FreezeError(KqatError, ValueError):
    """A trained model cannot become integers."""


class ExportError(KqatError, RuntimeError):
    """The flatbuffer could not be made, read or run."""


class LoweringError(ExportError):
    """The converter's output does not carry what the frozen model marked."""


class TargetError(ExportError):
    """The target's runtime lacks a kernel that the model needs."""


class RuntimeUnavailableError(ExportError):
    """A runtime is not installed, or it refused the file."""
