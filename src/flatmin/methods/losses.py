"""Losses of the papers, as pure functions of logits and class indices.

`bisam_log` and `bisam_tanh` are BiSAM's lower bounds of the 0-1 loss, which its ascent maximises. They take the
arguments `weight`, `ignore_index` and `reduction` of `torch.nn.functional.cross_entropy`. `smoothed_cross_entropy` is
cross-entropy with label smoothing in two common forms. `trajectory` is the term that MESA and SAF add to the loss.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

# exp(mu * (phi - 1)) must not underflow at the true class, where phi = 0.
_DIRECT_EXP_LIMIT = 60.0
_BLOCK = 1 << 19  # elements
_SOFT = "soft targets are not supported, because they have no true class"
Reduction = Literal["mean", "sum", "none"]
# phi(0) = 0 for phi(x) = 1 - log(1 + exp(gamma - x)).
GAMMA = math.log(math.e - 1.0)


def check_logits(logits: Tensor, target: Tensor) -> None:
    """Raise an error unless these are logits (N, K) and class indices (N,). Reads shapes and dtypes only."""
    for name, x in (("logits", logits), ("class indices", target)):
        if not isinstance(x, Tensor):
            raise TypeError(f"expected a tensor of {name}, got {type(x).__name__}.")
    if logits.ndim > 2 and target.shape == logits.shape:
        raise ValueError(f"expected class indices, got targets of the logits' shape {tuple(target.shape)}; {_SOFT}.")
    if logits.ndim != 2:
        raise ValueError(
            f"expected logits of shape (N, K), got {tuple(logits.shape)}; flatten all other dimensions into N first."
        )
    if target.ndim != 1 or target.shape[0] != logits.shape[0]:
        raise ValueError(f"expected class indices of shape ({logits.shape[0]},), got {tuple(target.shape)}; {_SOFT}.")
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"expected integer class indices, got {target.dtype}.")


def margins(logits: Tensor, target: Tensor) -> Tensor:
    """The margins F_j = f_j - f_y of all classes j, with F_y = 0 for the true class y. Shape (N, K)."""
    check_logits(logits, target)
    return logits - logits.gather(1, target[:, None].long())


def bisam_log(
    logits: Tensor,
    target: Tensor,
    mu: float = 1.0,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    """BiSAM's smooth lower bound of the 0-1 loss with phi(x) = 1 - log(1 + exp(gamma - x)).

    Q = (1/N) sum_i (1/mu) log sum_j exp(mu phi(F_ij)) with the margins F_ij = f_ij - f_{i,y_i} and gamma = log(e - 1),
    so that phi(0) = 0 and phi < 1. It is computed as 1 + (1/mu) log sum_j sigmoid(F_ij - gamma)^mu, which is finite for
    all finite logits, since the true class always contributes sigmoid(-gamma) = 1/e.

    Args:
        logits: shape (N, K), (N, K, d1, ...) or (N, d1, ..., K), any floating dtype.
        target: class indices, shape (N,) or (N, d1, ...).
        mu: sharpness of the soft maximum over classes, > 0. Default 1 (original code, `loss_fnc.py`).
        weight: shape (K,), a weight for each class; the mean is then sum_i weight[y_i] Q_i / sum_i weight[y_i].
            Default None: equal weights.
        ignore_index: targets with this value are ignored. Default -100.
        reduction: "mean" (default) or "sum" over the targets that are not ignored, or "none": one value for each
            target, in the shape of `target`, 0 for ignored ones.

    Returns:
        A scalar, or the Q_i if reduction is "none". max_j phi(F_j) <= Q_i <= max_j phi(F_j) + log(K)/mu. The mean over
        no targets is NaN, as in torch's cross-entropy.

    Raises:
        ValueError, TypeError: other shapes or dtypes.

    Source: Xie et al., Improving SAM Requires Rethinking its Optimization Formulation, ICML 2024, Eq. 11.
    """
    rows = partial(_log_sum_log, mu=mu)
    return _over_batch(rows, logits, target, weight, ignore_index, reduction) / mu


def _log_sum_log(margin: Tensor, mu: float) -> Tensor:
    """The logarithm of sum_j exp(mu phi(F_j)) of each row, with phi of BiSAM(-log). Overwrites `margin`."""
    # The margin is computed before the shift, so that F_y is exactly 0.
    shifted = margin.sub_(GAMMA)
    if mu == 1.0:
        return mu + shifted.sigmoid_().sum(1).log()
    if 0.0 < mu <= _DIRECT_EXP_LIMIT:
        return mu + shifted.sigmoid_().pow(mu).sum(1).log()
    return mu + torch.logsumexp(mu * F.logsigmoid(shifted), 1)


def bisam_tanh(
    logits: Tensor,
    target: Tensor,
    mu: float = 10.0,
    alpha: float = 0.1,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    """BiSAM's smooth lower bound of the 0-1 loss with phi(x) = tanh(alpha x).

    Q = (1/N) sum_i (1/mu) log sum_j exp(mu phi(F_ij)).

    Args:
        logits: see `bisam_log`.
        target: see `bisam_log`.
        mu: sharpness of the soft maximum over classes, > 0. Default 10 (the original function's default; the
            original command line passes 1).
        alpha: slope of phi at 0, > 0. Default 0.1 (original code).
        weight: see `bisam_log`.
        ignore_index: see `bisam_log`.
        reduction: see `bisam_log`.

    Returns:
        A scalar, or the Q_i if reduction is "none". max_j phi(F_j) <= Q_i <= max_j phi(F_j) + log(K)/mu.

    Raises:
        ValueError, TypeError: other shapes or dtypes.

    Source: Xie et al., ICML 2024, Eq. 11.
    """
    rows = partial(_log_sum_tanh, mu=mu, alpha=alpha)
    return _over_batch(rows, logits, target, weight, ignore_index, reduction) / mu


def _log_sum_tanh(margin: Tensor, mu: float, alpha: float) -> Tensor:
    """The logarithm of sum_j exp(mu tanh(alpha F_j)) of each row. Overwrites `margin`."""
    # tanh(a) = 2 sigmoid(2a) - 1, and sigmoid is several times faster than tanh on a CPU.
    s = margin.mul_(2.0 * alpha).sigmoid_()
    if 0.0 < mu <= _DIRECT_EXP_LIMIT:
        # phi <= 1, so the shifted exponent never overflows, and phi_y = 0 keeps the sum above exp(-mu).
        return mu + torch.add(s.new_full((), -2.0 * mu), s, alpha=2.0 * mu).exp_().sum(1).log()
    return torch.logsumexp(2.0 * mu * s - mu, 1)


def _over_batch(
    rows: Callable[[Tensor], Tensor],
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: Reduction,
) -> Tensor:
    """`rows` of the margins, reduced as in `torch.nn.functional.cross_entropy`."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}.")
    logits, flat = _in_rows(logits, target)
    counted = flat != ignore_index
    flat = flat.where(counted, 0)
    share = None if weight is None else weight[flat]
    q = _by_blocks(rows, logits, flat)
    q = (q if share is None else q * share).where(counted, 0)
    if reduction == "none":
        return q.reshape(target.shape)
    # A sum over many pixels can exceed the range of float16.
    total = q.sum(dtype=torch.promote_types(q.dtype, torch.float32))
    if reduction == "mean":
        total = total / (counted if share is None else share.where(counted, 0)).sum()
    return total.to(q.dtype)


def _in_rows(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Reshape logits to (M, K), class indices to (M,). Classes are dimension 1, as in torch's losses, or the last."""
    if isinstance(logits, Tensor) and isinstance(target, Tensor) and target.ndim == logits.ndim - 1 >= 2:
        for dim in (1, -1):
            last = logits.movedim(dim, -1)
            if last.shape[:-1] == target.shape:
                logits, target = last.reshape(-1, last.shape[-1]), target.reshape(-1)
                break
        else:
            raise ValueError(
                f"expected class indices of shape (N, d1, ...) with logits of shape (N, K, d1, ...) or "
                f"(N, d1, ..., K), got {tuple(target.shape)} and {tuple(logits.shape)}."
            )
    check_logits(logits, target)
    return logits, target.long()


def _by_blocks(rows: Callable[[Tensor], Tensor], logits: Tensor, target: Tensor) -> Tensor:
    """`rows` of the margins; on a CPU in blocks whose temporaries fit into the cache."""
    if logits.device.type != "cpu" or logits.numel() <= 2 * _BLOCK:
        return rows(margins(logits, target))
    size = max(1, _BLOCK // logits.shape[1])
    return torch.cat([rows(margins(f, y)) for f, y in zip(logits.split(size), target.split(size), strict=True)])


def smoothed_cross_entropy(
    logits: Tensor,
    target: Tensor,
    smoothing: float = 0.1,
    form: Literal["torch", "others"] = "others",
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """Cross-entropy with label smoothing.

    `form="others"`: the target is 1 - s for the true class and s/(K-1) for each other class, and the loss is a KL
    divergence (cross-entropy minus the entropy of the target, so that its minimum is 0), as in the code of BiSAM and
    davda54. `form="torch"`: s/K is spread over all classes, as in
    `torch.nn.functional.cross_entropy(label_smoothing=s)`.

    Args:
        logits: shape (N, K).
        target: class indices, shape (N,).
        smoothing: s, in [0, 1). Default 0.1.
        form: "others" (default) or "torch", see above.
        reduction: "mean" (default) over the batch, or "none": one loss for each sample, shape (N,).

    Raises:
        ValueError: s outside [0, 1), an unknown form, or K = 1 with form "others".
    """
    if not 0.0 <= smoothing < 1.0:
        raise ValueError(f"smoothing must be in [0, 1), got {smoothing}.")
    if form == "torch":
        return F.cross_entropy(logits, target, label_smoothing=smoothing, reduction=reduction)
    if form != "others":
        raise ValueError(f"unknown form {form!r}; choose 'torch' (s/K on all classes) or 'others' (s/(K-1)).")
    check_logits(logits, target)
    num_classes = logits.shape[1]
    if num_classes < 2:
        raise ValueError("form 'others' needs at least two classes.")
    rest = smoothing / (num_classes - 1)
    logp = F.log_softmax(logits, 1)
    at_true = logp.gather(1, target[:, None].long()).squeeze(1)
    cross = -(1.0 - smoothing - rest) * at_true - rest * logp.sum(1)
    entropy = -(1.0 - smoothing) * math.log(1.0 - smoothing)
    if smoothing > 0.0:
        entropy -= smoothing * math.log(rest)
    return (cross.mean() if reduction == "mean" else cross) - entropy


def trajectory(
    logits: Tensor,
    reference: Tensor,
    tau: float = 5.0,
    *,
    known: Tensor | None = None,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """The trajectory loss of MESA and SAF: how far the outputs have moved away from earlier outputs.

        tau^2 mean_i KL(softmax(r_i / tau) || softmax(z_i / tau))

    r is a constant, so the gradient in z_i is (tau / B)(softmax(z_i / tau) - softmax(r_i / tau)). The loss to train
    with is CE + lam * trajectory. For MESA, r are the outputs of averaged weights (`flatmin.optim.WeightAverage`); for
    SAF, recorded logits (`flatmin.optim.RecordedLogits`). Computed in float32 or better, also under autocast.

    Args:
        logits: z, shape (B, K), or (B, ..., K) with the classes in the last dimension. Must be finite.
        reference: r, in the shape of `logits`, on any device.
        tau: temperature, > 0 and finite. Default 5 (the official code of both).
        known: booleans of shape (B, ...), True where there is a reference. The others contribute 0 and are counted in
            B. Default None: all have a reference.
        reduction: "mean" (default) over all dimensions but the classes, or "none": shape (B, ...).

    Raises:
        ValueError, TypeError: other shapes or dtypes, tau out of range, or an unknown reduction.

    Source: Du, Zhou, Feng, Tan & Zhou, Sharpness-Aware Training for Free, NeurIPS 2022. The official code uses
    lam = 0.3 (MESA) and 0.16 (SAF), while 5 < epoch < 360 (MESA) or 300 (SAF), counted from 0.
    """
    if not 0 < tau < math.inf:
        raise ValueError(f"tau must be a finite number above 0, got {tau!r}.")
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}.")
    for name, x in (("logits", logits), ("reference logits", reference)):
        if not isinstance(x, Tensor):
            raise TypeError(f"expected a tensor of {name}, got {type(x).__name__}; pass its logits.")
    if logits.ndim < 2 or reference.shape != logits.shape:
        raise ValueError(
            f"expected logits of shape (B, ..., K) and a reference of the same shape, got {tuple(logits.shape)} and "
            f"{tuple(reference.shape)}."
        )
    if known is not None and (not isinstance(known, Tensor) or known.dtype != torch.bool):
        got = known.dtype if isinstance(known, Tensor) else type(known).__name__
        raise TypeError(f"expected known as a tensor of booleans, got {got}.")
    if known is not None and known.shape != logits.shape[:-1]:
        raise ValueError(f"expected known of shape {tuple(logits.shape[:-1])}, got {tuple(known.shape)}.")
    dtype = torch.promote_types(logits.dtype, torch.float32)
    reference = reference.detach().to(logits.device, dtype)
    if known is not None:
        known = known.to(logits.device)
        reference = reference.where(known[..., None], 0)  # a NaN there would reach the gradient
    past = F.log_softmax(reference / tau, -1)
    present = F.log_softmax(logits.to(dtype) / tau, -1)
    terms = tau * tau * F.kl_div(present, past, reduction="none", log_target=True).sum(-1)
    if known is not None:
        terms = terms.where(known, 0)
    return terms.mean() if reduction == "mean" else terms
