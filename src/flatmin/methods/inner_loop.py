"""How many ascents? From where, and on what?"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flatmin.methods.context import Ascend, GradientRequest, Gradients, NewState, Perturbation, State, StepContext
from flatmin.methods.part import Need, Part, check_choice, check_count

__all__ = ["DifferentBatch", "InnerLoop", "MicroBatches", "NStep", "NoAscent", "OneStep", "Passes", "accumulate"]

Passes = Generator[GradientRequest, Gradients, tuple[list[Gradients], NewState]]


@dataclass(frozen=True, kw_only=True)
class InnerLoop(Part):
    """How many ascents, from where, on what?

    Attributes:
        ascends: whether the weights leave w at all. Default True.
        loops: whether it is anything but one ascent and one descent gradient; true where `__call__` is defined.
        one_ascent: whether it is one ascent from w and one descent gradient at w + eps on the whole batch, so that
            manual loops of two passes serve it. Default False.
        two_batches: whether it climbs on one batch and descends on another: micro-batches 0 and 1. A loop
            that trains on single batches gives the batch before as the first. Default False.
        uses_gradient: whether it looks at `Perturbation.gradients`, which are kept for it only. Default False.
        copies: of the moved weights that it holds during the last pass. Default 0.
    """

    kind: ClassVar[str] = "inner_loop"
    question: ClassVar[str] = "how many ascents?"
    declared_by: ClassVar = {"loops": "__call__"}
    loops: ClassVar[bool] = False
    one_ascent: ClassVar[bool] = False
    two_batches: ClassVar[bool] = False
    uses_gradient: ClassVar[bool] = False
    copies: ClassVar[int] = 0

    def conflict(self, need: Need) -> str | None:
        if need is Need.ASCENT and not self.ascends:
            return "it never leaves w"
        if need is Need.STAYS and self.ascends:
            return "it leaves w"
        return super().conflict(need)

    def evaluations(self, ascent: int) -> float:
        """Gradients a step, if one ascent costs `ascent`."""
        return ascent + 1

    def plain(self, c: StepContext) -> Generator[GradientRequest, Gradients, Gradients]:
        """The gradients of a step without ascent: by default those of the whole batch at w."""
        return (yield GradientRequest("descent"))

    def __call__(self, ascend: Ascend, state: State, c: StepContext) -> Passes:
        """Ask for gradients; return the descent gradients, one list for each point, and the new state."""
        return [(yield GradientRequest("descent", (yield from ascend())))], {}


@dataclass(frozen=True, kw_only=True)
class OneStep(InnerLoop):
    """One ascent, one descent gradient. Source: Foret et al., SAM, ICLR 2021, Alg. 1."""

    one_ascent: ClassVar[bool] = True

    former_names: ClassVar = ("One",)


@dataclass(frozen=True, kw_only=True)
class NStep(InnerLoop):
    """n ascents: w_{j+1} = w_j + step_j, and the descent gradient at w_n.

    step="split": each moves by rho / n along geometry(d(w_j)). step="full": each moves by rho, and the sum is then
    brought back to length rho if it is longer (with several groups: to sum_i ||eps_i||^2 / rho_i^2 <= 1).

    Parts that remember learn from the first ascent only; the geometry's own scale (ASAM's |w|) stays that of w.

    Args:
        n: ascents, >= 1. Default 3; 1 is one ascent.
        step: "split" (default) or "full" (the code of Andriushchenko & Flammarion, ICML 2022).

    Raises:
        ValueError: n < 1, or another word.

    Source: Foret et al., SAM, ICLR 2021, Appendix (several inner steps).

    Example:
        >>> import flatmin
        >>> print(flatmin.compose("n-step", n=2).inner_loop)
        NStep(n=2, step='split')
    """

    needs: ClassVar = frozenset({Need.PASS_1})
    conflicts: ClassVar = {
        Need.LOSSES_AT_W: "only the first of its ascent passes is at w",
        Need.ONE_ASCENT: "it takes several",
        Need.FREE_START: "each of its ascent passes starts where the last one ended",
    }
    copies: ClassVar[int] = 1
    n: int = 3
    step: str = "split"

    def __post_init__(self) -> None:
        check_count(self, "n", 1)
        check_choice(self, "step", ("split", "full"))

    def evaluations(self, ascent: int) -> float:
        return self.n * ascent + 1

    def __call__(self, ascend: Ascend, state: State, c: StepContext) -> Passes:
        total: dict[int, Tensor] = {}
        share = 1.0 / self.n if self.step == "split" else 1.0

        def here() -> Perturbation | None:
            return Perturbation.of(list(total), list(total.values()), c) if total else None

        for _ in range(self.n):
            eps = yield from ascend(here())
            if eps is None:
                continue
            for i, e in zip(eps.index, eps.tensors(), strict=True):
                total[i] = total[i].add(e, alpha=share) if i in total else e * share
            eps.direction = []
            if self.step == "full":
                reach = c.norm([total[i] / f for i, f in zip(eps.index, eps.factors, strict=True)])
                back = reach.clamp(min=1.0)
                total = {i: t / back.to(t.device, t.dtype) for i, t in total.items()}
        return [(yield GradientRequest("descent", here()))], {}


@dataclass(frozen=True, kw_only=True)
class MicroBatches(InnerLoop):
    """mSAM: every micro-batch B_i climbs by its own gradient, and their descent gradients are averaged.

        eps_i = rho g_i / ||g_i||,   u = (1/m) sum_i grad L_{B_i}(w + eps_i)

    The micro-batches are the closures of `optimizer.step([closure, ...])`, or the chunks of `passes(chunks=m)`; each
    returns the mean loss of its own samples, and all count alike. With one of them it is SAM.

    Source: Foret et al., SAM, ICLR 2021, Section 4.1 (m-sharpness); Behdin et al., mSAM: Micro-Batch-Averaged
    Sharpness-Aware Minimization, 2023.

    Example:
        >>> import flatmin
        >>> print(flatmin.compose("micro-sam").inner_loop)
        MicroBatches()
    """

    needs: ClassVar = frozenset({Need.MICRO_BATCHES})
    conflicts: ClassVar = {
        Need.WHOLE_BATCH: "each micro-batch has a gradient of its own",
        Need.GRADIENT_AT_W: "each micro-batch has a gradient of its own",
    }
    copies: ClassVar[int] = 1

    def __call__(self, ascend: Ascend, state: State, c: StepContext) -> Passes:
        mean: Gradients = []
        for chunk in range(c.chunks):
            eps = yield from ascend(chunk=chunk)
            grads = yield GradientRequest("descent", eps, chunk, share=1.0 / c.chunks)
            mean = accumulate(mean, grads, 1.0 / c.chunks)
            del grads
        return [mean], {}


def accumulate(total: Gradients, new: Gradients, weight: float) -> Gradients:
    """Total + weight * new, where a tensor without gradient counts as zero; the gradients given are not changed."""
    added: Gradients = list(total) if total else [None] * len(new)
    both: list[tuple[int, Tensor, Tensor]] = []
    for i, (t, g) in enumerate(zip(added, new, strict=True)):
        if t is not None and g is not None:
            both.append((i, t, g))
        elif g is not None:
            added[i] = g * weight
    if both:
        sums = torch._foreach_add([t for _, t, _ in both], [g for _, _, g in both], alpha=weight)
        for (i, _, _), t in zip(both, sums, strict=True):
            added[i] = t
    return added


@dataclass(frozen=True, kw_only=True)
class DifferentBatch(InnerLoop):
    """SAM-db, a probe: the ascent's gradient comes from another batch than the descent's.

        eps = rho g' / ||g'||,  g' = grad L_{B'}(w),   u = grad L_B(w + eps)

    `optimizer.step([closure_of_B', closure_of_B])`, or `passes(chunks=2)`: chunk 0 climbs, chunk 1 descends.

    Raises:
        ValueError: at the step, for another number of closures than two.

    Source: the different-batch probe of Li & Giannakis, VaSSO, NeurIPS 2023; the same idea is a switch
    (`--sam_use_prev_batch`) of Andriushchenko & Flammarion's code, ICML 2022.

    Example:
        >>> import flatmin
        >>> print(flatmin.compose("sam-db").inner_loop)
        DifferentBatch()
    """

    former_names: ClassVar = ("OtherBatch",)
    needs: ClassVar = frozenset({Need.MICRO_BATCHES, Need.PASS_1})
    conflicts: ClassVar = {
        Need.GRADIENT_AT_W: "pass 1 sees another batch",
        Need.LOSSES_AT_W: "pass 1 sees another batch",
    }
    two_batches: ClassVar[bool] = True

    def plain(self, c: StepContext) -> Generator[GradientRequest, Gradients, Gradients]:
        return (yield GradientRequest("descent", chunk=1))

    def __call__(self, ascend: Ascend, state: State, c: StepContext) -> Passes:
        if c.chunks != 2:
            raise ValueError(
                f"DifferentBatch wants two closures, for the batch to climb and the one to descend; got {c.chunks}."
            )
        eps = yield from ascend(chunk=0)
        return [(yield GradientRequest("descent", eps, 1))], {}


@dataclass(frozen=True, kw_only=True)
class NoAscent(InnerLoop):
    """No ascent: one gradient, at w."""

    former_names: ClassVar = ("AtW",)
    ascends: ClassVar[bool] = False

    def evaluations(self, ascent: int) -> float:
        return 1.0

    def __call__(self, ascend: Ascend, state: State, c: StepContext) -> Passes:
        return [(yield GradientRequest("descent"))], {}
