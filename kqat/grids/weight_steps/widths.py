"""The check that a step method supports the bits of a grid."""

from kqat.base import SpecError
from kqat.grids.spec import QuantSpec


def check_bits(method: object, spec: QuantSpec, least: int, most: int) -> None:
    """Checks that the bits of a grid lie in `[least, most]`.

    Raises:
        SpecError: if they do not.
    """
    if not least <= spec.bits <= most:
        widths = f"{least}" if least == most else f"{least} to {most}"
        raise SpecError(
            f"Expected a grid of {widths} bits for {method}. Received: bits={spec.bits}. "
            "Use another weight_step, or another grid."
        )
