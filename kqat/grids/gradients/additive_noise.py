"""`AdditiveNoise`: training adds noise in the place of rounding."""

import dataclasses

from kqat.grids.gradients.clipped import Clipped


@dataclasses.dataclass(frozen=True)
class AdditiveNoise(Clipped):
    """In training values are not rounded: uniform noise of one step's width is added to them,

        output    = clip(x, low, high) + s * u    with u uniform in [-1/2, 1/2)
        d out/d x = 1 where low <= x <= high, else 0

    In inference they are rounded. The noise has the variance of rounding, `s**2 / 12`, and its
    gradient is exact. Training never meets the rounded values then, and what it reaches with noise
    may differ from what the file gives; `evaluate` shows the latter.

    Reference: the pseudo quantization noise of Défossez et al. 2022
    (https://arxiv.org/abs/2104.09987), with a number of bits that is given, not learned.
    """

    ADDS_NOISE = True
