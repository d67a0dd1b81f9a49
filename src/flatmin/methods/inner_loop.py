"""How many ascents, from where, on what?"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flatmin.methods.part import Ascend, Context, Eval, Gradients, Need, Offset, Points, check_choice, check_count


@dataclass(frozen=True, kw_only=True)
class One(Points):
    """One ascent, one descent gradient. Source: Foret et al., SAM, ICLR 2021, Alg. 1."""

    def __call__(self, ascend: Ascend, c: Context) -> Generator[Eval, Gradients, list[Gradients]]:
        return [(yield Eval("descent", (yield from ascend())))]


@dataclass(frozen=True, kw_only=True)
class NStep(Points):
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

    Cost of n-step: 4 gradient evaluations a step, 2 extra copies of the moved weights.

    Example:
        >>> import flatmin
        >>> print(flatmin.compose("n-step", n=2).points)
        NStep(n=2, step='split')
    """

    needs: ClassVar = frozenset({Need.PASS_1})
    withholds: ClassVar = {
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

    def __call__(self, ascend: Ascend, c: Context) -> Generator[Eval, Gradients, list[Gradients]]:
        total: dict[int, Tensor] = {}
        share = 1.0 / self.n if self.step == "split" else 1.0

        def here() -> Offset | None:
            return Offset.of(list(total), list(total.values()), c) if total else None

        for _ in range(self.n):
            offset = yield from ascend(here())
            if offset is None:
                continue
            for i, e in zip(offset.index, offset.tensors(), strict=True):
                total[i] = total[i].add(e, alpha=share) if i in total else e * share
            offset.direction = []
            if self.step == "full":
                reach = c.norm([total[i] / f for i, f in zip(offset.index, offset.factors, strict=True)])
                back = reach.clamp(min=1.0)
                total = {i: t / back.to(t.device, t.dtype) for i, t in total.items()}
        return [(yield Eval("descent", here()))]


@dataclass(frozen=True, kw_only=True)
class MicroBatches(Points):
    """mSAM: every micro-batch B_i climbs by its own gradient, and their descent gradients are averaged.

        eps_i = rho g_i / ||g_i||,   u = (1/m) sum_i grad L_{B_i}(w + eps_i)

    The micro-batches are the closures of `optimizer.step([closure, ...])`, or the chunks of `passes(chunks=m)`; each
    returns the mean loss of its own samples, and all count alike. With one of them it is SAM.

    Source: Foret et al., SAM, ICLR 2021, Section 4.1 (m-sharpness); Behdin et al., mSAM: Micro-Batch-Averaged
    Sharpness-Aware Minimization, 2023.

    Cost of micro-sam: 2 gradient evaluations a step, 2 extra copies of the moved weights.
    Needs: micro-batches (step([closure, closure, ...]) or passes(chunks=m)).

    Example:
        >>> import flatmin
        >>> print(flatmin.compose("micro-sam").points)
        MicroBatches()
    """

    needs: ClassVar = frozenset({Need.MICRO_BATCHES})
    withholds: ClassVar = {
        Need.WHOLE_BATCH: "each micro-batch has a gradient of its own",
        Need.GRADIENT_AT_W: "each micro-batch has a gradient of its own",
    }
    pooled: ClassVar[bool] = True
    copies: ClassVar[int] = 1

    def __call__(self, ascend: Ascend, c: Context) -> Generator[Eval, Gradients, list[Gradients]]:
        mean: Gradients = []
        for chunk in range(c.chunks):
            offset = yield from ascend(chunk=chunk)
            grads = yield Eval("descent", offset, chunk)
            mean = accumulate(mean, grads, 1.0 / c.chunks)
            del grads
        return [mean]


def accumulate(total: Gradients, new: Gradients, weight: float) -> Gradients:
    """Total + weight * new, where a tensor without gradient counts as zero; the gradients given are not changed."""
    added: Gradients = list(total) if total else [None] * len(new)
    known: list[tuple[int, Tensor, Tensor]] = []
    for i, (t, g) in enumerate(zip(added, new, strict=True)):
        if t is not None and g is not None:
            known.append((i, t, g))
        elif g is not None:
            added[i] = g * weight
    if known:
        sums = torch._foreach_add([t for _, t, _ in known], [g for _, _, g in known], alpha=weight)
        for (i, _, _), t in zip(known, sums, strict=True):
            added[i] = t
    return added


@dataclass(frozen=True, kw_only=True)
class OtherBatch(Points):
    """SAM-db, a probe: the ascent's gradient comes from another batch than the descent's.

        eps = rho g' / ||g'||,  g' = grad L_{B'}(w),   u = grad L_B(w + eps)

    `optimizer.step([closure_of_B', closure_of_B])`, or `passes(chunks=2)`: chunk 0 climbs, chunk 1 descends.

    Raises:
        ValueError: at the step, for another number of closures than two.

    Source: the different-batch probe of Li & Giannakis, VaSSO, NeurIPS 2023; the same idea is a switch
    (`--sam_use_prev_batch`) of Andriushchenko & Flammarion's code, ICML 2022.

    Cost of sam-db: 2 gradient evaluations a step, 1 extra copy of the moved weights.
    Needs: micro-batches (step([closure, closure, ...]) or passes(chunks=m)).

    Example:
        >>> import flatmin
        >>> print(flatmin.compose("sam-db").points)
        OtherBatch()
    """

    needs: ClassVar = frozenset({Need.MICRO_BATCHES, Need.PASS_1})
    withholds: ClassVar = {
        Need.GRADIENT_AT_W: "pass 1 sees another batch",
        Need.LOSSES_AT_W: "pass 1 sees another batch",
    }
    plain_chunk: ClassVar[int | None] = 1

    def __call__(self, ascend: Ascend, c: Context) -> Generator[Eval, Gradients, list[Gradients]]:
        if c.chunks != 2:
            raise ValueError(
                f"OtherBatch wants two closures, the batch that is climbed on and the one that is descended on; got "
                f"{c.chunks}."
            )
        offset = yield from ascend(chunk=0)
        return [(yield Eval("descent", offset, 1))]


@dataclass(frozen=True, kw_only=True)
class AtW(Points):
    """No ascent: one gradient, at w."""

    withholds: ClassVar = {Need.ASCENT: "it never leaves w"}
    leaves: ClassVar[bool] = False

    def evaluations(self, ascent: int) -> float:
        return 1.0

    def __call__(self, ascend: Ascend, c: Context) -> Generator[Eval, Gradients, list[Gradients]]:
        return [(yield Eval("descent"))]
