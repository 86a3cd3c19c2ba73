"""k-means of the weights of one tensor, in one dimension."""

import numpy as np

ROUNDS = 100


def clustered(weights: np.ndarray, clusters: int) -> np.ndarray:
    """`weights` on at most `clusters` values, float32; zeros stay zero."""
    flat = np.asarray(weights, np.float64).reshape(-1)
    shown = flat != 0.0
    count = clusters - int(not shown.all())
    values = np.sort(flat[shown])
    if np.unique(values).size <= count:
        return np.asarray(weights, np.float32)
    centers = np.linspace(values[0], values[-1], count)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    for _ in range(ROUNDS):
        # In one dimension a cluster is an interval between two middles.
        edges = np.searchsorted(values, (centers[1:] + centers[:-1]) / 2)
        bounds = np.concatenate([[0], edges, [len(values)]])
        sizes = np.diff(bounds)
        moved = np.where(sizes, np.diff(sums[bounds]) / np.maximum(sizes, 1), centers)
        if np.array_equal(moved, centers):
            break
        centers = np.sort(moved)
    nearest = np.searchsorted((centers[1:] + centers[:-1]) / 2, flat)
    found = np.where(shown, centers[nearest].astype(np.float32), np.float32(0.0))
    return found.astype(np.float32).reshape(weights.shape)
