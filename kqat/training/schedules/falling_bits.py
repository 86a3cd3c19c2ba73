"""`FallingBits`: weights train on wider grids first."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from kqat.base import ModelError, SpecError
from kqat.graph import average_anew
from kqat.grids import LearnedMethod, QuantSpec
from kqat.training.callbacks import QatCallback
from kqat.training.weight_wrapper import QuantizeWrapper


class FallingBits(QatCallback):
    """Rounds weights to wider grids first, from stage to stage narrower, to the planned one last.

    `FallingBits((8, 6), epochs=2)` trains two epochs with weights of 8 bits, two with 6, and the
    rest with what the policy asks for. A weight whose own grid is as wide as a stage or wider keeps
    it. Learned steps start anew in each stage, where they lose least. The end of `fit` puts the
    planned grids back in any case: they are what ships. A model that was saved in an earlier stage,
    or whose `fit` was interrupted there, has the wider grid, and `convert` warns of it.
    `keras.callbacks.EarlyStopping(restore_best_weights=True)` may restore the weights
    of an earlier stage into the planned grids; learned steps start anew there. Such weights were
    never trained on the grids that ship: let it begin with the last stage (`start_from_epoch`).

    Each stage traces the training step anew, since widths are constants of it.

    Args:
        bits: the widths of the stages, from wide to narrow, 2 to 8.
        epochs: epochs of each stage.

    Raises:
        ModelError: if the widths do not fall, there are no epochs, or the model in `fit` is not a
            QAT model, has weights whose step method does not take the widths, or has none whose
            grid is narrower than the first stage.

    Reference: Zhuang et al. 2018, "Progressive quantization" in the section on methods
    (https://arxiv.org/abs/1711.00205).
    """

    def __init__(self, bits: Sequence[int] = (8, 6), *, epochs: int = 1):
        super().__init__()
        self.bits = tuple(bits)
        falling = all(a > b for a, b in zip(self.bits, self.bits[1:], strict=False))
        if not self.bits or not falling or not all(2 <= b <= 8 for b in self.bits):
            raise ModelError(
                f"Expected widths from 8 to 2 bits that fall. Received: bits={bits!r}. Use (8, 6)."
            )
        if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
            raise ModelError(f"Expected one epoch or more. Received: epochs={epochs!r}.")
        self.epochs = epochs
        self._planned: dict[QuantizeWrapper, dict[str, QuantSpec]] = {}

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Notes the planned grids, and checks that wider ones can take their place."""
        super().on_train_begin(logs)
        # A fit that was interrupted has put nothing back.
        self._planned = {w: dict(w.planned_specs) for w in self.wrappers()}
        for wrapper, specs in self._planned.items():
            for name, spec in specs.items():
                self._check(wrapper, name, spec)
        planned = [spec.bits for specs in self._planned.values() for spec in specs.values()]
        if min(planned, default=8) >= self.bits[0]:
            found = " and ".join(str(bits) for bits in sorted(set(planned)))
            raise ModelError(
                f"Expected weights on grids narrower than {self.bits[0]} bits, the first stage of "
                f"FallingBits. Received: {found or 'no'} bits in '{self.model.name}', so that "
                "nothing would fall. Use a policy of fewer bits, such as 'w4a8', or leave the "
                "callback out."
            )

    def _check(self, wrapper: QuantizeWrapper, name: str, spec: QuantSpec) -> None:
        method = wrapper.weight_step
        wide = [_widened(spec, bits) for bits in self.bits]
        try:
            for one in wide:
                method.check(one)
        except SpecError as error:
            raise ModelError(
                f"Expected weights whose step method takes wider grids. Received: '{name}' of "
                f"'{wrapper.layer.name}': {error}"
            ) from error
        if isinstance(method, LearnedMethod) and any(
            method.variable_shape((1,), one) != method.variable_shape((1,), spec) for one in wide
        ):
            raise ModelError(
                f"Expected a step method with the same numbers on every grid. Received: {method} "
                f"for '{wrapper.layer.name}'. Use kqat.LearnedStep()."
            )

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Narrows the grids at the first epoch of a stage."""
        stage = epoch // self.epochs
        self._set(self.bits[stage] if stage < len(self.bits) else None)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Puts the planned grids back."""
        self._set(None)

    def _set(self, bits: int | None) -> None:
        """Gives all weights grids of `bits` where their own are narrower; `None`: their own."""
        changed = []
        for wrapper, planned in self._planned.items():
            specs = {
                name: spec if bits is None else _widened(spec, bits)
                for name, spec in planned.items()
            }
            if specs != wrapper.weight_specs:
                changed.append(wrapper)
            average_anew(getattr(self.model, "optimizer", None), wrapper.take_grids(specs))
        if changed:
            self.trace_again(changed)


def _widened(spec: QuantSpec, bits: int) -> QuantSpec:
    return dataclasses.replace(spec, bits=max(spec.bits, bits))
