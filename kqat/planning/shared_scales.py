"""Values that share one scale."""

from kqat.graph import Ref


class Joined:
    """Disjoint sets of values; each has a root, the first value that others were joined to."""

    def __init__(self) -> None:
        self._above: dict[Ref, Ref] = {}

    def root(self, ref: Ref) -> Ref:
        """The root of the set of `ref`."""
        while ref in self._above:
            ref = self._above[ref]
        return ref

    def join(self, a: Ref, b: Ref) -> None:
        """Makes one set of those of `a` and `b`; the root is that of `a`."""
        a, b = self.root(a), self.root(b)
        if a is not b:
            self._above[b] = a
