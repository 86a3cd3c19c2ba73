"""`Entropy`: the range whose rounded values have the distribution closest to the original."""

import dataclasses

import numpy as np

from kqat.grids.histogram import Histogram
from kqat.grids.spec import QuantSpec

_SHARES = np.linspace(1.0, 0.05, 96)


@dataclasses.dataclass(frozen=True)
class Entropy:
    """Range with the least Kullback-Leibler divergence of the rounded from the clipped values.

    Both bounds are the same share of their extremes. Zeros are not counted, because they are exact.
    In training the range changes as described in `Anchor`.
    Reference: Migacz 2017, "8-bit inference with TensorRT", slides 19-22; Wu et al. 2020,
    "Calibration" in section 3 (https://arxiv.org/abs/2004.09602).
    """

    def calibrated(self, seen: Histogram, spec: QuantSpec) -> tuple[float, float]:
        """The range `(low, high)` for the values in calibration."""
        divergence = [self._divergence(seen, spec, share) for share in _SHARES]
        share = float(_SHARES[int(np.argmin(divergence))])
        return seen.low * share, seen.high * share

    def _divergence(self, seen: Histogram, spec: QuantSpec, share: float) -> float:
        width = 2.0**seen.exponent
        bins = np.arange(len(seen.counts)) + seen.first
        low, high = seen.low * share, seen.high * share
        if spec.symmetric:
            high = max(-low, high)
            low = -high
        first, last = np.floor(low / width), np.floor(high / width)
        inside = (bins >= first) & (bins <= last)
        kept = seen.counts[inside].astype(np.float64)
        clipped = kept.copy()  # Values outside are clipped to the end bins.
        clipped[0] += seen.counts[bins < first].sum()
        clipped[-1] += seen.counts[bins > last].sum()
        if not kept.sum():
            return float("inf")
        step = max((high - low) / (spec.qmax - spec.qmin), np.finfo(np.float64).tiny)
        level = np.floor((bins[inside] + 0.5) * width / step + 0.5).astype(np.int64)
        level -= level.min()
        some = kept > 0
        mass = np.bincount(level, kept) / np.maximum(np.bincount(level, some), 1)
        rounded = np.where(some, mass[level], 0.0)
        p, q = clipped / clipped.sum(), rounded / rounded.sum()
        shared = (p > 0) & (q > 0)
        lost = p[(p > 0) & (q == 0)].sum()  # Only end bins that had no value before clipping.
        return float(np.sum(p[shared] * np.log(p[shared] / q[shared])) + lost * np.log(1e12))
