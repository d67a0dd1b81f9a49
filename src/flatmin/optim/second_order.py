"""Products with second derivatives, from the graph of a pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from flatmin.methods import Tensors
from flatmin.optim.criterion import Seen


@contextlib.contextmanager
def _second_derivatives() -> Iterator[None]:
    """Say what to do where an operation of the model has no second derivative."""
    try:
        yield
    except RuntimeError as error:
        if "derivative" not in str(error) or "not implemented" not in str(error):
            raise
        raise RuntimeError(
            f"an operation of the model has no second derivative ({error}). Attention has one where the forward runs "
            "under torch.nn.attention.sdpa_kernel(SDPBackend.MATH); models of transformers take "
            'attn_implementation="eager".'
        ) from error


def backward_with_graph(loss: Tensor, weights: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor | None]:
    """Add a loss's gradients to those of the weights, keeping their graph.

    Args:
        loss: scalar, with graph.
        weights: the trained ones; their gradients are returned with graph, None where there is none.
        others: further weights that take gradients.
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
        weights: trained tensors.
        grads: its gradients, with graph; None for tensors it does not depend on.
        seen: what the criterion saw on the way to the loss, with graph.
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
                "call the flatmin.Criterion given to the optimizer once for each optimizer.backward(loss); it was "
                f"called {len(self._calls)} times."
            )
        return self._calls[0]

    def _pick(self, index: Sequence[int]) -> Tensors:
        return [self._weights[i] for i in index]

    @_second_derivatives()
    @torch.enable_grad()
    def hessian(self, index: Sequence[int], vectors: Tensors) -> Tensors:
        """H v over these weights."""
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
        """J^T H_out J v over these weights, by two backward passes for J v and one for the rest."""
        seen, weights = self._seen(), self._pick(index)
        outputs = seen.outputs
        if not isinstance(outputs, Tensor) or seen.loss.ndim:
            raise TypeError(
                "the Gauss-Newton product needs a criterion of (outputs, target) with a tensor as outputs and a scalar "
                f"as result; got {type(outputs).__name__} and a loss of shape {tuple(seen.loss.shape)}."
            )
        (slope,) = torch.autograd.grad(seen.loss, outputs, create_graph=True)
        # J^T u is linear in u, so that its derivative in the direction v is J v.
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
        """Sum of the squared gradients of the first `limit` samples' losses; empty if the loss counts no sample."""
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
    """The products of several backward passes whose gradients were averaged with these weights."""

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
            found = part.squared_gradients(index, limit) if limit > 0 else []
            limit -= len(part.scores())
            if total and found:
                torch._foreach_add_(total, found)
            total = total or found
        return total


def _zeros_for_none(grads: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensors:
    dense = [g.to_dense() if g is not None and g.is_sparse else g for g in grads]
    return [torch.zeros_like(w) if g is None else g.detach() for g, w in zip(dense, like, strict=True)]
