"""What a step method asks of a grid's width."""

from kqat.base import SpecError
from kqat.grids.spec import QuantSpec


def check_bits(method: object, spec: QuantSpec, least: int, most: int) -> None:
    """Lets a grid pass whose width lies in `[least, most]`.

    Raises:
        SpecError: if it does not.
    """
    if not least <= spec.bits <= most:
        widths = f"{least}" if least == most else f"{least} to {most}"
        raise SpecError(
            f"Expected a grid of {widths} bits for {method}. Received: bits={spec.bits}. "
            "Use another weight_step, or another grid."
        )
