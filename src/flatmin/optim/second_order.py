"""Products with second derivatives, computed from the graph of a pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from flatmin.methods import Tensors
from flatmin.optim.criterion import Seen


@contextlib.contextmanager
def _second_derivatives() -> Iterator[None]:
    """Replace torch's error for operations without second derivatives by one that says what to do."""
    try:
        yield
    except RuntimeError as error:
        if "derivative" not in str(error) or "not implemented" not in str(error):
            raise
        raise RuntimeError(
            f"an operation of the model has no second derivative ({error}). For attention, run the forward under "
            "torch.nn.attention.sdpa_kernel(SDPBackend.MATH); for models of the transformers package, use "
            'attn_implementation="eager".'
        ) from error


def backward_with_graph(loss: Tensor, weights: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor | None]:
    """Add a loss's gradients to `.grad` of the weights, and keep their graph.

    Args:
        loss: scalar loss with graph.
        weights: the trained weights.
        others: further parameters that get gradients.

    Returns:
        The gradients of `weights` with graph; None where there is none.
    """
    targets = [w for w in (*weights, *others) if w.requires_grad]
    made = torch.autograd.grad(loss, targets, create_graph=True, allow_unused=True)
    for w, g in zip(targets, made, strict=True):
        if g is not None:
            w.grad = g.detach().clone() if w.grad is None else w.grad + g.detach()
    by_weight = dict(zip(targets, made, strict=True))
    return [by_weight.get(w) for w in weights]


class GraphProducts:
    """Products at the point of one backward pass whose graph is kept.

    Args:
        weights: the trained tensors.
        grads: the gradients with graph; None for tensors that the loss does not depend on.
        seen: what the criterion has recorded in this pass, with graph.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        seen: Sequence[Seen],
    ) -> None:
        self._weights, self._grads, self._calls = weights, grads, seen

    def _seen(self) -> Seen:
        if len(self._calls) != 1:
            raise RuntimeError(
                "call the flatmin.Criterion that was given to the optimizer exactly once before each "
                f"optimizer.backward(loss); it was called {len(self._calls)} times."
            )
        return self._calls[0]

    def _pick(self, index: Sequence[int]) -> Tensors:
        return [self._weights[i] for i in index]

    @_second_derivatives()
    @torch.enable_grad()
    def hessian(self, index: Sequence[int], vectors: Tensors) -> Tensors:
        """The product H v for these weights."""
        linked = [(g, v) for i, v in zip(index, vectors, strict=True) if (g := self._grads[i]) is not None]
        linked = [(g, v) for g, v in linked if g.requires_grad]
        if not linked:
            return [torch.zeros_like(w) for w in self._pick(index)]
        return _zeros_for_none(
            torch.autograd.grad(
                [g for g, _ in linked],
                self._pick(index),
                [v for _, v in linked],
                retain_graph=True,
                allow_unused=True,
            ),
            self._pick(index),
        )

    @_second_derivatives()
    @torch.enable_grad()
    def gauss_newton(self, index: Sequence[int], vectors: Tensors) -> Tensors:
        """J^T H_out J v for these weights: two backward passes for J v, and one for the rest."""
        seen, weights = self._seen(), self._pick(index)
        outputs = seen.outputs
        if not isinstance(outputs, Tensor) or seen.loss.ndim:
            raise TypeError(
                "the Gauss-Newton product needs outputs that are one tensor and a scalar loss; got "
                f"{type(outputs).__name__} and a loss of shape {tuple(seen.loss.shape)}."
            )
        (slope,) = torch.autograd.grad(seen.loss, outputs, create_graph=True)
        # J^T u is linear in u, so its derivative in the direction v is J v.
        u = torch.zeros_like(outputs, requires_grad=True)
        back = torch.autograd.grad(outputs, weights, u, create_graph=True, allow_unused=True)
        linked = [(b, v) for b, v in zip(back, vectors, strict=True) if b is not None]
        if not linked or not slope.requires_grad:
            return [torch.zeros_like(w) for w in weights]
        (jv,) = torch.autograd.grad([b for b, _ in linked], u, [v for _, v in linked], retain_graph=True)
        (curved,) = torch.autograd.grad(slope, outputs, jv, retain_graph=True)
        return _zeros_for_none(
            torch.autograd.grad(outputs, weights, curved, retain_graph=True, allow_unused=True), weights
        )

    def scores(self) -> Tensor:
        """Each sample's loss, with graph."""
        scores = self._seen().scores
        assert scores is not None, "only recipes that need per-sample losses ask for them"
        return scores

    @torch.enable_grad()
    def squared_gradients(self, index: Sequence[int], limit: int) -> Tensors:
        """Sum of the squared gradients of the first `limit` samples' losses; empty if the loss ignores all samples."""
        scores = self.scores()
        if not len(scores):
            return []
        weights = self._pick(index)
        total = [torch.zeros_like(w) for w in weights]
        for score in scores[:limit]:
            grads = torch.autograd.grad(score, weights, retain_graph=True, allow_unused=True)
            grads = tuple(_zeros_for_none(grads, weights))
            torch._foreach_addcmul_(total, list(grads), list(grads))
        return total


class PooledProducts:
    """The weighted sum of the products of several backward passes, with the weights of their gradients."""

    def __init__(self, parts: Sequence[tuple[float, GraphProducts]]) -> None:
        self._parts = list(parts)

    def _sum(self, terms: Sequence[Tensors]) -> Tensors:
        total = [t * self._parts[0][0] for t in terms[0]]
        for (weight, _), term in zip(self._parts[1:], terms[1:], strict=True):
            torch._foreach_add_(total, term, alpha=weight)
        return total

    def hessian(self, index: Sequence[int], vectors: Tensors) -> Tensors:
        return self._sum([p.hessian(index, vectors) for _, p in self._parts])

    def gauss_newton(self, index: Sequence[int], vectors: Tensors) -> Tensors:
        return self._sum([p.gauss_newton(index, vectors) for _, p in self._parts])

    def squared_gradients(self, index: Sequence[int], limit: int) -> Tensors:
        total: Tensors = []
        for _, part in self._parts:
            squares = part.squared_gradients(index, limit) if limit > 0 else []
            limit -= len(part.scores())
            if total and squares:
                torch._foreach_add_(total, squares)
            total = total or squares
        return total


def _zeros_for_none(grads: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensors:
    dense = [g.to_dense() if g is not None and g.is_sparse else g for g in grads]
    return [torch.zeros_like(w) if g is None else g.detach() for g, w in zip(dense, like, strict=True)]
