"""Which loss is climbed?"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from flatmin.methods import losses as objectives
from flatmin.methods.part import Need, Objective, check_range

_OTHER_LOSS = "pass 1 climbs another loss"


@dataclass(frozen=True, kw_only=True)
class SameLoss(Objective):
    """The ascent climbs the loss that is descended. Source: Foret et al., SAM, ICLR 2021, Eq. 2."""


@dataclass(frozen=True, kw_only=True)
class BiSAMLog(Objective):
    """BiSAM(-log): climbs Q = (1/mu) log sum_j exp(mu phi(F_j)), phi(x) = 1 - log(1 + exp(log(e-1) - x)).

    Args:
        mu: sharpness of the soft maximum over classes. Default 1.0 (original code).

    Raises:
        ValueError: mu <= 0.

    Targets count as in the loss: by its `ignore_index`, class `weight` and `reduction`. Label smoothing has no place in
    a bound of the 0-1 loss and acts in the descent loss only; soft targets are refused.

    Source: Xie et al., ICML 2024, Eq. 11; see `flatmin.methods.losses.bisam_log`.

    Cost of bisam-log: 2 gradient evaluations a step, 1 extra copy of the moved weights.
    Needs: the loss object (pass criterion=flatmin.Criterion(loss)).

    Example:
        >>> import flatmin
        >>> print(flatmin.compose("bisam-log", mu=2.0).objective)
        BiSAMLog(mu=2.0)
    """

    needs: ClassVar = frozenset({Need.CRITERION, Need.PASS_1})
    withholds: ClassVar = {Need.GRADIENT_AT_W: _OTHER_LOSS}
    by_class: ClassVar[bool] = True
    mu: float = 1.0

    def __post_init__(self) -> None:
        check_range(self, "mu", 0.0, math.inf, open_low=True)

    def ascent(self, outputs: Tensor, target: Tensor, **counting: Any) -> Tensor:
        return objectives.bisam_log(outputs, target, self.mu, **counting)


@dataclass(frozen=True, kw_only=True)
class BiSAMTanh(Objective):
    """BiSAM(tanh): climbs Q = (1/mu) log sum_j exp(mu tanh(alpha F_j)).

    Args:
        mu: sharpness of the soft maximum over classes. Default 10.0 (original function; its command line passes 1).
        alpha: slope of phi at 0. Default 0.1 (original code).

    Raises:
        ValueError: mu <= 0 or alpha <= 0.

    Targets count as in the loss: by its `ignore_index`, class `weight` and `reduction`. Label smoothing has no place in
    a bound of the 0-1 loss and acts in the descent loss only; soft targets are refused.

    Source: Xie et al., ICML 2024, Eq. 11; see `flatmin.methods.losses.bisam_tanh`.

    Cost of bisam-tanh: 2 gradient evaluations a step, 1 extra copy of the moved weights.
    Needs: the loss object (pass criterion=flatmin.Criterion(loss)).

    Example:
        >>> import flatmin
        >>> print(flatmin.compose("bisam-tanh", mu=5.0).objective)
        BiSAMTanh(mu=5.0, alpha=0.1)
    """

    needs: ClassVar = frozenset({Need.CRITERION, Need.PASS_1})
    withholds: ClassVar = {Need.GRADIENT_AT_W: _OTHER_LOSS}
    by_class: ClassVar[bool] = True
    mu: float = 10.0
    alpha: float = 0.1

    def __post_init__(self) -> None:
        check_range(self, "mu", 0.0, math.inf, open_low=True)
        check_range(self, "alpha", 0.0, math.inf, open_low=True)

    def ascent(self, outputs: Tensor, target: Tensor, **counting: Any) -> Tensor:
        return objectives.bisam_tanh(outputs, target, self.mu, self.alpha, **counting)
