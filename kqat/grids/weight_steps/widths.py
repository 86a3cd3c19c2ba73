"""The check that a step method supports the bits of a grid."""

from kqat.base import SpecError
from kqat.grids.spec import QuantSpec


def check_bits(method: object, spec: QuantSpec, least: int, most: int) -> None:
    """Checks that the bits of a grid lie in `[least, most]`.

    Raises:
        SpecError: if they do not, naming the nearest width that the method takes, and a method that
            takes this width.
    """
    if not least <= spec.bits <= most:
        widths = f"{least}" if least == most else f"{least} to {most}"
        nearest = min(max(spec.bits, least), most)
        other = "kqat.Binary()" if spec.bits == 1 else "kqat.LearnedStep()"
        raise SpecError(
            f"Expected a grid of {widths} bits for {method}. Received: bits={spec.bits}. "
            f"Use bits={nearest}, or for {spec.bits} bits another weight_step such as {other}."
        )
