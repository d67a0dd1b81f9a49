"""Inner loops: how many ascents does a step take, from where, and on which batches?"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from flatmin.methods.context import Ascend, GradientRequest, Gradients, NewState, Perturbation, State, StepContext
from flatmin.methods.part import Need, Part, check_choice, check_count, check_range, learning_rate

__all__ = [
    "BothSides",
    "DifferentBatch",
    "Extrapolation",
    "GradientNormAscent",
    "HeadAndTail",
    "InnerLoop",
    "MicroBatches",
    "NStep",
    "NoAscent",
    "OneStep",
    "Passes",
    "accumulate",
]

Passes = Generator[GradientRequest, Gradients, tuple[list[Gradients], NewState]]


@dataclass(frozen=True, kw_only=True)
class InnerLoop(Part):
    """Base class of inner loops: how many ascents does a step take, from where, and on which batches?

    Attributes:
        ascends: whether the weights are perturbed at all. Default True.
        loops: whether it differs from one ascent and one descent gradient. True if `__call__` or `plain` is defined.
        one_ascent: whether it is one ascent from w and one descent gradient at w + eps on the whole batch, so that
            manual loops with two passes can run it. Default False.
        two_batches: whether it ascends on one batch (micro-batch 0) and descends on another (micro-batch 1). A loop
            that trains on single batches gives the previous batch as micro-batch 0. Default False.
        uses_gradient: whether it reads `Perturbation.gradients`, which are stored only for such inner loops. Default
            False.
        copies: copies of the perturbed weights that it holds during the last pass. Default 0.
        closures_for: what its closures stand for if they are not equal parts of a batch, such as "the head and the
            tail". Loops that split batches themselves raise an error then. Default "": parts of a batch.
        descents: number of descent gradients that it returns. Default 1.
        plain_evaluations: number of gradients in a step without ascent, see `plain`. Default 1.
    """

    kind: ClassVar[str] = "inner_loop"
    question: ClassVar[str] = "how many ascents?"
    declared_by: ClassVar = {"loops": ("__call__", "plain")}
    loops: ClassVar[bool] = False
    one_ascent: ClassVar[bool] = False
    two_batches: ClassVar[bool] = False
    uses_gradient: ClassVar[bool] = False
    copies: ClassVar[int] = 0
    closures_for: ClassVar[str] = ""
    descents: ClassVar[int] = 1
    plain_evaluations: ClassVar[float] = 1.0

    def conflict(self, need: Need) -> str | None:
        if need is Need.ASCENT and not self.ascends:
            return "it never perturbs the weights"
        if need is Need.STAYS and self.ascends:
            return "it perturbs the weights"
        return super().conflict(need)

    def evaluations(self, ascent: int) -> float:
        """The number of gradients in a step, where one ascent takes `ascent` gradients (0 or 1)."""
        return ascent + 1

    def plain(self, c: StepContext) -> Generator[GradientRequest, Gradients, Gradients]:
        """Request the gradients of a step without ascent. Default: those of the whole batch at w."""
        return (yield GradientRequest("descent"))

    def __call__(self, ascend: Ascend, state: State, c: StepContext) -> Passes:
        """Request gradients; return the descent gradients, one list for each point, and the new state.

        Args:
            ascend: computes one perturbation, as `yield from ascend(...)`.
            state: what the part remembers.
            c: the context.
        """
        return [(yield GradientRequest("descent", (yield from ascend())))], {}


@dataclass(frozen=True, kw_only=True)
class OneStep(InnerLoop):
    """SAM: one ascent and one descent gradient. Source: Foret et al., SAM, ICLR 2021, Alg. 1."""

    entrywise: ClassVar = True
    one_ascent: ClassVar[bool] = True

    former_names: ClassVar = ("One",)


@dataclass(frozen=True, kw_only=True)
class NStep(InnerLoop):
    """n ascent steps w_{j+1} = w_j + step_j, and the descent gradient at w_n.

    step="split": each step has length rho / n along geometry(d(w_j)). step="full": each step has length rho, and the
    sum is projected back to length rho if it is longer (with several groups: to sum_i ||eps_i||^2 / rho_i^2 <= 1).

    The memories of other parts are updated at the first ascent only. The scale of the geometry (ASAM's |w|) is that of
    w throughout.

    Args:
        n: number of ascent steps, >= 1. Default 3. 1 is SAM.
        step: length of the steps: "split" (default) or "full" (the code of Andriushchenko & Flammarion, ICML 2022).

    Raises:
        ValueError: n < 1, or an unknown step.

    Source: Foret et al., SAM, ICLR 2021, Appendix (several inner steps).

    Examples:
        >>> import flatmin
        >>> print(flatmin.compose("n-step", n=2).inner_loop)
        NStep(n=2, step='split')
    """

    needs: ClassVar = frozenset({Need.PASS_1})
    conflicts: ClassVar = {
        Need.LOSSES_AT_W: "only the first of its ascent passes is at w",
        Need.ONE_ASCENT: "it takes several ascents",
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
    """mSAM: each micro-batch B_i has its own perturbation, and the descent gradients are averaged.

        eps_i = rho g_i / ||g_i||,   u = (1/m) sum_i grad L_{B_i}(w + eps_i)

    The micro-batches are the closures of `optimizer.step([closure, ...])`, or the chunks of `passes(chunks=m)`. Each
    one returns the mean loss of its own samples, and all have equal weight. With one micro-batch the method is SAM.

    Source: Foret et al., SAM, ICLR 2021, Section 4.1 (m-sharpness); Behdin et al., mSAM: Micro-Batch-Averaged
    Sharpness-Aware Minimization, 2023.

    Examples:
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
    """Return total + weight * new, with missing gradients as zeros. Does not change its arguments."""
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
    """SAM-db, an experiment: the perturbation comes from another batch B' than the descent gradient.

        eps = rho g' / ||g'||,  g' = grad L_{B'}(w),   u = grad L_B(w + eps)

    Call `optimizer.step([closure_of_B', closure_of_B])`, or use `passes(chunks=2)`, where chunk 0 is B' and chunk 1 is
    B.

    Raises:
        ValueError: at the step, if the number of closures is not two.

    Source: the different-batch experiment of Li & Giannakis, VaSSO, NeurIPS 2023. The code of Andriushchenko &
    Flammarion, ICML 2022, has an option for the same idea (`--sam_use_prev_batch`).

    Examples:
        >>> import flatmin
        >>> print(flatmin.compose("sam-db").inner_loop)
        DifferentBatch()
    """

    former_names: ClassVar = ("OtherBatch",)
    needs: ClassVar = frozenset({Need.MICRO_BATCHES, Need.PASS_1})
    conflicts: ClassVar = {
        Need.OWN_LOSS: "pass 1 sees another batch",
        Need.GRADIENT_AT_W: "pass 1 sees another batch",
        Need.LOSSES_AT_W: "pass 1 sees another batch",
    }
    two_batches: ClassVar[bool] = True

    def plain(self, c: StepContext) -> Generator[GradientRequest, Gradients, Gradients]:
        _, descended = _two_batches(self, c)
        return (yield GradientRequest("descent", chunk=descended))

    def __call__(self, ascend: Ascend, state: State, c: StepContext) -> Passes:
        climbed, descended = _two_batches(self, c)
        eps = yield from ascend(chunk=climbed)
        return [(yield GradientRequest("descent", eps, descended))], {}


def _two_batches(owner: InnerLoop, c: StepContext) -> tuple[int, int]:
    """The micro-batches of the ascent and of the descent."""
    if c.chunks != 2:
        raise ValueError(
            f"{type(owner).__name__} needs two closures, for the batch of the ascent and that of the descent; got "
            f"{c.chunks}."
        )
    return 0, 1


@dataclass(frozen=True, kw_only=True)
class HeadAndTail(InnerLoop):
    """ImbSAM: SAM for the rare classes (the tail T), and the gradient at w for the frequent classes (the head H).

        eps = rho g_T / ||g_T||,  g_T = grad L_T(w),   u = grad L_H(w) + grad L_T(w + eps)

    Call `optimizer.step([closure_of_L_H, closure_of_L_T])`, or use `passes(chunks=2)`, where chunk 0 is the head and
    chunk 1 is the tail. The two gradients are added, so both closures divide by the size B of the whole batch:

        L_H = 1/B sum of the losses of head samples,   L_T = weight/B sum of the losses of tail samples

    The official code has weight = 2; its tail is the classes with fewer than 20 training samples. With weight = 1 the
    sum is the mean loss of the batch. A closure must return a loss with a graph even if the batch has no sample of its
    part, so compute the outputs of the whole batch and then select the samples; this is also right for BatchNorm.
    `step` returns the mean of the two losses.

    Raises:
        ValueError: at the step, if the number of closures is not two.

    Source: Zhou, Qu, Xu & Shen, ImbSAM: A Closer Look at Sharpness-Aware Minimization in Class-Imbalanced Recognition,
    ICCV 2023, and the authors' code.

    Examples:
        >>> import flatmin
        >>> print(flatmin.compose("imbsam").inner_loop)
        HeadAndTail()
    """

    needs: ClassVar = frozenset({Need.MICRO_BATCHES, Need.PASS_1, Need.DESCENT_LOSS})
    conflicts: ClassVar = {
        Need.OWN_LOSS: "pass 1 runs on the tail alone",
        Need.GRADIENT_AT_W: "pass 1 runs on the tail alone",
        Need.LOSSES_AT_W: "the head has no pass 1",
    }
    copies: ClassVar[int] = 1
    plain_evaluations: ClassVar[float] = 2.0
    closures_for: ClassVar[str] = "the head and the tail of the classes"

    def evaluations(self, ascent: int) -> float:
        return ascent + 2

    def _head(self, c: StepContext) -> Generator[GradientRequest, Gradients, Gradients]:
        if c.chunks != 2:
            raise ValueError(f"HeadAndTail needs two closures, for {self.closures_for}; got {c.chunks}.")
        return accumulate([], (yield GradientRequest("descent", chunk=0)), 1.0)

    def plain(self, c: StepContext) -> Generator[GradientRequest, Gradients, Gradients]:
        head = yield from self._head(c)
        return accumulate(head, (yield GradientRequest("descent", chunk=1)), 1.0)

    def __call__(self, ascend: Ascend, state: State, c: StepContext) -> Passes:
        head = yield from self._head(c)
        eps = yield from ascend(chunk=1)
        return [accumulate(head, (yield GradientRequest("descent", eps, 1)), 1.0)], {}


@dataclass(frozen=True, kw_only=True)
class BothSides(InnerLoop):
    """CR-SAM: one ascent, then the descent gradients at w - eps and at w + eps, in this order.

    The last pass, at w + eps, is SAM's own. The pass at w - eps is ignored by diagnostics and by the weights of other
    optimizers.

    Source: Wu, Luo & Wunsch, CR-SAM: Curvature Regularized Sharpness-Aware Minimization, AAAI 2024.

    Examples:
        >>> import flatmin
        >>> print(flatmin.compose("cr-sam").inner_loop)
        BothSides()
    """

    needs: ClassVar = frozenset({Need.DESCENT_LOSS})
    copies: ClassVar[int] = 1
    descents: ClassVar[int] = 2

    def evaluations(self, ascent: int) -> float:
        return ascent + 2

    def __call__(self, ascend: Ascend, state: State, c: StepContext) -> Passes:
        eps = yield from ascend()
        if eps is None:
            at_w = yield GradientRequest("descent")
            return [at_w, at_w], {}
        back = Perturbation.of(eps.index, list(torch._foreach_neg(eps.tensors())), c)
        below = yield GradientRequest("descent", back, share=0.0)
        return [below, (yield GradientRequest("descent", eps))], {}


@dataclass(frozen=True, kw_only=True)
class NoAscent(InnerLoop):
    """No perturbation: one gradient, at w."""

    entrywise: ClassVar = True
    former_names: ClassVar = ("AtW",)
    ascends: ClassVar[bool] = False

    def evaluations(self, ascent: int) -> float:
        return 1.0

    def __call__(self, ascend: Ascend, state: State, c: StepContext) -> Passes:
        return [(yield GradientRequest("descent"))], {}


@dataclass(frozen=True, kw_only=True)
class GradientNormAscent(InnerLoop):
    """GAM, C-Flat: the gradients after an ascent of the loss, of the gradient norm, and of both in turn.

        g_1 = grad L(w + eps(g)),   eps(g) = rho g / ||g||
        e   = ratio rho (g_1 - g) / ||g_1 - g||
        g_2 = grad L(w + e),   g_3 = grad L(w + e + eps(g_2))

    (g_1 - g) / rho is the gradient of ||g|| to first order. The descent gradients are g_1, g_2 and g_3. eps is the
    recipe's perturbation, so the recipe's direction, mask and geometry apply to it.

    Args:
        ratio: length of e, as a multiple of rho, > 0. Default 10 (GAM's code: radii 0.02 and 0.2).

    Raises:
        ValueError: ratio <= 0.

    Source: the official code of Zhang et al., GAM, CVPR 2023 (`gam/gam.py`).

    Examples:
        >>> import flatmin
        >>> print(flatmin.compose("c-flat").inner_loop)
        GradientNormAscent(ratio=1.0)
    """

    needs: ClassVar = frozenset({Need.PASS_1, Need.GRADIENT_AT_W})
    conflicts: ClassVar = {
        Need.LOSSES_AT_W: "it takes two ascents, and the second does not start at w",
        Need.ONE_ASCENT: "it takes two ascents",
    }
    uses_gradient: ClassVar = True
    copies: ClassVar = 2
    descents: ClassVar = 3
    ratio: float = 10.0

    def __post_init__(self) -> None:
        check_range(self, "ratio", 0.0, 1e6, open_low=True)

    def evaluations(self, ascent: int) -> float:
        return 2 * (ascent + 1)

    def __call__(self, ascend: Ascend, state: State, c: StepContext) -> Passes:
        up = yield from ascend()
        if up is None:
            here = yield GradientRequest("descent")
            return [here] * 3, {}
        g, index, factors, eps = up.gradients, up.index, [self.ratio * f for f in up.factors], up.eps
        first = yield GradientRequest("descent", up, share=0.0)
        away = _along_the_difference(g, first, index, factors, eps, c)
        del g, up  # frees memory before the last pass
        up = yield from ascend(Perturbation.of(list(away), list(away.values()), c) if away else None)
        if up is None:
            return [first] * 3, {}
        second = up.gradients
        for i, x in zip(up.index, up.tensors(), strict=True):
            away[i] = away[i] + x if i in away else x
        at = Perturbation.of(list(away), list(away.values()), c)
        del up, away, x
        third = yield GradientRequest("descent", at)
        return [first, second, third], {}


def _dense(gradient: Tensor | None) -> Tensor | None:
    return gradient.to_dense() if gradient is not None and gradient.is_sparse else gradient


def _along_the_difference(
    before: Gradients,
    after: Gradients,
    index: Sequence[int],
    factors: Sequence[float | Tensor],
    eps: float,
    c: StepContext,
) -> dict[int, Tensor]:
    """The displacement along after - before, in Euclidean norm, for tensors that have both; position -> tensor."""
    both = [i for i in index if before[i] is not None and after[i] is not None]
    if not both:
        return {}
    new: Any = [_dense(after[i]) for i in both]
    old: Any = [_dense(before[i]) for i in both]
    rise = list(torch._foreach_sub(new, old))
    norm, reach = c.norm(rise), dict(zip(index, factors, strict=True))
    up = Perturbation(both, rise, norm, norm, [reach[i] for i in both], eps)
    return dict(zip(both, up.tensors(), strict=True))


@dataclass(frozen=True, kw_only=True)
class Extrapolation(InnerLoop):
    """SAMPa: two gradients that do not depend on each other, at w + eps and at the extrapolated point y.

        eps = rho v / ||v||,   y = w - lr (v + weight_decay w + momentum b)

    v is the gradient at the last step's y, and b is the base optimizer's momentum if there is one. The first step is
    the base optimizer's own, and v is its gradient. Two devices could compute the two gradients at once; here they are
    computed one after the other, so that a step costs as much as SAM's.

    Args:
        batch: batch of the gradient at w + eps: "same" (default, as in the paper) or "previous" (official code). With
            "previous" a step takes two closures, for the previous batch and for this one.

    Raises:
        ValueError: an unknown batch; when the optimizer is built, a base other than SGD.

    Source: Xie, Pethick & Cevher, SAMPa: Sharpness-aware Minimization Parallelized, NeurIPS 2024, Alg. 1 and its code
    (`train.py`), which adds the base's decay and momentum to y.

    Examples:
        >>> import flatmin
        >>> print(flatmin.compose("sampa").inner_loop)
        Extrapolation(batch='same')
    """

    needs: ClassVar = frozenset({Need.SGD, Need.LR})
    conflicts: ClassVar = {Need.ONE_ASCENT: "it takes a second gradient besides the ascent"}
    reads: ClassVar = {"gradient": "direction.gradient"}
    copies: ClassVar = 1
    descents: ClassVar = 2
    batch: str = "same"

    def __post_init__(self) -> None:
        check_choice(self, "batch", ("same", "previous"))

    @property
    def two_batches(self) -> bool:  # type: ignore[override]
        return self.batch == "previous"

    def demands(self) -> frozenset[Need]:
        return self.needs | {Need.MICRO_BATCHES} if self.two_batches else self.needs

    def evaluations(self, ascent: int) -> float:
        return ascent + 2

    def _batches(self, c: StepContext) -> tuple[int, int] | tuple[None, None]:
        return _two_batches(self, c) if self.two_batches else (None, None)

    def plain(self, c: StepContext) -> Generator[GradientRequest, Gradients, Gradients]:
        _, now = self._batches(c)
        return (yield GradientRequest("descent", chunk=now))

    def __call__(self, ascend: Ascend, state: State, c: StepContext) -> Passes:
        before, now = self._batches(c)
        eps = yield from ascend()
        if eps is None:
            return [(yield GradientRequest("descent", chunk=now))], {}
        index = list(eps.index)
        above = yield GradientRequest("descent", eps, before)
        ahead = Perturbation.of(index, self._ahead(state["gradient"], c), c)
        return [above, (yield GradientRequest("descent", ahead, now, share=0.0))], {}

    def _ahead(self, gradients: Gradients, c: StepContext) -> list[Tensor]:
        """The displacement from w to the extrapolated point y."""
        moved: list[Tensor] = []
        momenta = c.momentum if any(group["momentum"] for group in c.options) else [None] * len(c.w)
        for g, w, group, buffer in zip(gradients, c.w, c.options, momenta, strict=True):
            step = torch.zeros_like(w) if g is None else g.add(w, alpha=group["weight_decay"])
            if buffer is not None:
                step = step.add(buffer, alpha=group["momentum"])
            moved.append(step * -learning_rate(group, self))
        return moved
