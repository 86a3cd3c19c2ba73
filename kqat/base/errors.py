"""Every error that kqat and tflite_export raise on purpose.

    KqatError
    ├── ModelError             the argument is not a model that can be quantized
    ├── UnsupportedLayerError  a layer, dtype or option has no integer form
    ├── SpecError              bits, symmetry, axis or range that no grid can have
    ├── PolicyError            a policy or config that cannot be applied
    ├── CalibrationError       calibration data missing, empty, misshapen or not finite
    ├── FreezeError            a trained model cannot be converted to integers
    └── ExportError            the flatbuffer could not be made, read or run
        ├── LoweringError      the converter's output lacks a marked value
        ├── TargetError        the target's runtime lacks a kernel that the model needs
        └── RuntimeUnavailableError  a runtime is not installed, or refused the file

Messages say what was expected, what was received, where, and what to do.
"""


class KqatError(Exception):
    """Base of every error raised on purpose by this project."""


class ModelError(KqatError, ValueError):
    """The argument is not a model that can be quantized."""


class UnsupportedLayerError(KqatError, ValueError):
    """A layer, dtype or option has no integer form; the message says what to do instead."""


class SpecError(KqatError, ValueError):
    """No integer grid can have these bits, symmetry, axis or range."""


class PolicyError(KqatError, ValueError):
    """A policy or config cannot be applied to the layer that it was given for."""


class CalibrationError(KqatError, ValueError):
    """Calibration data are missing, empty, misshapen or not finite."""


class FreezeError(KqatError, ValueError):
    """A trained model cannot be converted to integers."""


class ExportError(KqatError, RuntimeError):
    """The flatbuffer could not be made, read or run."""


class LoweringError(ExportError):
    """The converter's output lacks a value that the frozen model marked."""


class TargetError(ExportError):
    """The target's runtime lacks a kernel that the model needs."""


class RuntimeUnavailableError(ExportError):
    """A runtime is not installed, or it refused the file."""


class TrainerWarning(UserWarning):
    """The model's own training step, or what it does with a mask, is not part of the QAT model.

    Or what a callback changes is not part of a training step that was compiled before. Or what it
    changed for a stage of training would ship.
    """
