"""Curvature matrices as matrix-free operators: Hessian, Gauss-Newton and Fisher."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flatmin.measure.derivatives import (
    PROBED,
    against_differences,
    outputs_against_differences,
    padding_of,
    suspects,
    without_padding,
)
from flatmin.measure.nested import first_tensor
from flatmin.measure.problem import Conventions, Problem, WeightedBatch, some_of

Form = Literal["reverse", "forward", "finite"]
Progress = Callable[[int], None]
_FORMS: tuple[Form, ...] = ("reverse", "forward")


class Operator(Protocol):
    """Interface of a symmetric matrix that is given by its products with vectors."""

    @property
    def size(self) -> int:
        """Number of rows."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the vectors."""

    @property
    def device(self) -> torch.device:
        """Device of the vectors."""

    def matvec(self, vector: Tensor) -> Tensor:
        """Return the product with a vector of shape (size,)."""


class Curvature:
    """Base class of the operators on a `Problem`: loops over batches, stores graphs, and sums over processes.

    Args:
        problem: the function.
        memory: memory for stored autograd graphs, in bytes. A product costs about two gradients for a batch whose graph
            is stored, and three for another batch. 0 stores none. Default None: 1 GiB on the CPU, half of the free
            memory on an accelerator.

    Attributes:
        products: number of products so far.
        stored_graphs: number of batches whose graph is stored.
    """

    name = ""

    def __init__(self, problem: Problem, *, memory: int | None = None) -> None:
        self.problem = problem
        self.size, self.dtype, self.device = problem.size, problem.dtype, problem.device
        self.products = self.stored_graphs = 0
        self._budget = _free_memory(self.device) if memory is None else memory
        self._graphs: dict[int, Any] = {}
        self._full = self._budget <= 0

    @property
    def conventions(self) -> Conventions:
        """Conventions of the problem."""
        return self.problem.conventions

    def matvec(self, vector: Tensor) -> Tensor:
        """Return the product with a vector of shape (size,), in the dtype of the problem.

        Raises:
            ValueError: the vector has another shape.
            ArithmeticError: the product is not finite. The message names the first batch without a finite loss, if
                any.
        """
        v = self.problem.shaped(vector.detach().to(self.dtype))
        total = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        with self.problem.guard():
            for i, batch in enumerate(self.problem.batches):
                total += self._batch_product(i, batch, v)
        total = self.problem.reduced(total)
        if not torch.isfinite(total).all():
            where = self.problem.not_finite()
            raise ArithmeticError(f"a product with the {self.name} is not finite, so it cannot be measured.{where}")
        self.products += 1
        return total + self._decay() * vector.to(self.dtype)

    def _decay(self) -> float:
        return 0.0

    def _batch_product(self, i: int, batch: WeightedBatch, v: list[Tensor]) -> Tensor:
        raise AttributeError(f"{type(self).__name__} does not define _batch_product().")

    def _graph(self, i: int, build: Callable[[], Any]) -> tuple[Any, bool]:
        """The result of `build` for batch i, and whether it is stored (its graph must then be retained)."""
        if i in self._graphs:
            return self._graphs[i], True
        if self._full:
            return build(), False
        built, size = _counting(build)
        if size > self._budget:
            self._full = True
            return built, False
        self._budget -= size
        self._graphs[i] = built
        self.stored_graphs += 1
        return built, True

    def _elsewhere(self, problem: Problem, at: Sequence[Tensor]) -> Self:
        """The operator of `problem` at the weights `at`, for a trial."""
        clone = copy.copy(self)
        clone.problem, clone.dtype, clone._graphs, clone._full = copy.copy(problem), problem.dtype, {}, True
        clone.problem.weights = [w.detach().requires_grad_() for w in at]
        return clone

    def close(self) -> None:
        """Release the stored graphs."""
        self._graphs.clear()
        self._full = True


class Hessian(Curvature):
    """The Hessian of a `Problem`, including weight decay.

        H = d^2 L / d w^2

    A product with a vector is computed by double backward (Pearlmutter, Neural Computation 1994), with the graph of the
    gradient stored within the memory budget. If the network does not support this, the product is the forward-mode
    derivative of the gradient. Central differences are used only on request: on networks with kinks (ReLU, max pooling)
    they are wrong by tens of percent for any step size. The row `padding_idx` of an embedding is a constant, as in
    training.

    Args:
        problem: the function.
        form: "reverse" (double backward), "forward" (forward over reverse), "finite" (central differences), or "auto":
            "reverse" or else "forward", whichever is correct for this network in a test on a few examples. Default
            "auto".
        memory: see `Curvature`. Default None.

    Raises:
        ValueError: `form` is unknown, or "auto" finds neither form to be correct.
    """

    name = "Hessian"

    def __init__(self, problem: Problem, *, form: Form | Literal["auto"] = "auto", memory: int | None = None) -> None:
        super().__init__(problem, memory=memory)
        if form not in ("auto", "finite", *_FORMS):
            raise ValueError(f"form must be 'auto', 'reverse', 'forward' or 'finite', got {form!r}.")
        if form == "finite":
            warnings.warn(
                "Hessian products by finite differences are wrong by tens of percent on networks with kinks (ReLU, max "
                "pooling); use them on smooth networks only.",
                stacklevel=2,
            )
        self.form: Form = "reverse"
        self._padding: list[tuple[int, int]] | None = None
        with problem.together():
            self.form = self._probe() if form == "auto" else form

    def _probe(self) -> Form:
        """The first form whose products, on a few examples, agree with differences of the gradient."""
        if not self.problem.batches:
            return "reverse"
        failures = []
        keep, self._full = self._full, True
        batch = some_of(self.problem, PROBED)
        for form in _FORMS:
            self.form = form
            try:
                with self.problem.guard():
                    flaw = self._flaw(batch)
            except torch.OutOfMemoryError:
                raise  # not an error of the form
            except (RuntimeError, NotImplementedError) as error:
                flaw = str(error).splitlines()[0]
            if flaw is None:
                self._full = keep
                return form
            failures.append(f"{form}: {flaw}")
        raise ValueError(
            f"the second derivatives of this network are wrong or unavailable{suspects(self.problem, batch)}. For a "
            "smooth loss, use form='finite' (differences of the gradient). form='reverse' skips this test. params= "
            "excludes weights. " + " ".join(failures)
        )

    def _flaw(self, batch: WeightedBatch) -> str | None:
        """What is wrong with the products (compared with differences, then tested for symmetry); None if nothing is."""

        def product(problem: Problem, at: Sequence[Tensor], piece: WeightedBatch, v: Tensor) -> Tensor:
            return self._elsewhere(problem, at)._batch_product(0, piece, problem.shaped(v))

        flaw = against_differences(self.problem, batch, product)
        if flaw is not None:
            return flaw
        # Test symmetry too: in the problem's own precision, and for cases in which differences decide nothing.
        generator = torch.Generator().manual_seed(0)
        u, v = (
            torch.randn(self.size, generator=generator, dtype=torch.float64).to(self.device, self.dtype)
            for _ in range(2)
        )
        hu, hv = (self._batch_product(0, batch, self.problem.shaped(x)) for x in (u, v))
        left, right = torch.dot(u.double(), hv.double()), torch.dot(v.double(), hu.double())
        size = float(hu.double().norm() * v.double().norm() + hv.double().norm() * u.double().norm())
        if size and abs(float(left - right)) > 1e-2 * size:
            return "the products do not belong to a symmetric matrix."
        return None

    def _decay(self) -> float:
        return self.problem.weight_decay

    def _batch_product(self, i: int, batch: WeightedBatch, v: list[Tensor]) -> Tensor:
        if self.form == "reverse":
            grads, stored = self._graph(i, lambda: self._gradients(batch))
            reached = [(g, u) for g, u in zip(grads, v, strict=True) if g.requires_grad]
            if not reached:
                return torch.zeros(self.size, dtype=self.dtype, device=self.device)
            outputs, seeds = zip(*reached, strict=True)
            rows = torch.autograd.grad(
                outputs, self.problem.weights, seeds, retain_graph=stored, materialize_grads=True
            )
            return self.problem.flat(rows)
        if self._padding is None:
            self._padding = padding_of(self.problem, batch)
        v = without_padding(v, self._padding)  # these forms would differentiate the padding rows
        if self.form == "forward":
            weights = tuple(w.detach() for w in self.problem.weights)
            with warnings.catch_warnings():
                # torch compiles some of its forward-mode rules with a deprecated module.
                warnings.simplefilter("ignore", DeprecationWarning)
                product = torch.func.jvp(torch.func.grad(self._value(batch)), (weights,), (tuple(v),))[1]
            return self.problem.flat(product)
        return self._difference(batch, v)

    def _value(self, batch: WeightedBatch) -> Callable[[tuple[Tensor, ...]], Tensor]:
        return lambda weights: self.problem.value_of(batch, self.problem.outputs(batch, weights), weights)

    def _gradients(self, batch: WeightedBatch) -> list[Tensor]:
        weights = self.problem.weights
        value = self._value(batch)(tuple(weights))
        return list(torch.autograd.grad(value, weights, create_graph=True, materialize_grads=True))

    def _difference(self, batch: WeightedBatch, v: list[Tensor]) -> Tensor:
        norm = torch.sqrt(sum((u.double().square().sum() for u in v), torch.zeros((), dtype=torch.float64)))
        if not norm:
            return torch.zeros(self.size, dtype=self.dtype, device=self.device)
        step = (1e-4 if self.dtype == torch.float64 else 5e-3) / float(norm)
        ends = []
        for sign in (1.0, -1.0):
            at = [(w.detach() + sign * step * u).requires_grad_() for w, u in zip(self.problem.weights, v, strict=True)]
            value = self._value(batch)(tuple(at))
            ends.append(self.problem.flat(torch.autograd.grad(value, at, materialize_grads=True)))
        return (ends[0] - ends[1]) / (2.0 * step)


class GaussNewton(Curvature):
    """The generalised Gauss-Newton matrix of a `Problem`, without weight decay.

        G = (1 / T) sum_i J_i^T (d^2 l_i / d f^2) J_i

    J_i is the Jacobian of the outputs f with respect to the weights. G is the Hessian without the second derivatives of
    the outputs, and is positive semi-definite for a loss that is convex in the outputs. Products are exact: J v and the
    Hessian of the loss in the outputs by double backward, J^T u by backward.

    Args:
        problem: the function. Its outputs must be one tensor.
        memory: see `Curvature`. Default None.

    Raises:
        ValueError: the outputs are not one tensor, or their derivative is wrong in a test on a few examples.

    Source: Schraudolph, Neural Computation 2002.
    """

    name = "GaussNewton"

    def __init__(self, problem: Problem, *, memory: int | None = None) -> None:
        super().__init__(problem, memory=memory)
        with problem.together():
            self._try()

    def _try(self) -> None:
        """Raise ValueError if the Jacobian from autograd is not the derivative of the outputs."""
        if not self.problem.batches:
            return
        batch = some_of(self.problem, PROBED)

        def outputs(problem: Problem, at: Sequence[Tensor], piece: WeightedBatch) -> Tensor:
            return self._elsewhere(problem, at)._tried(piece)

        def push(problem: Problem, at: Sequence[Tensor], piece: WeightedBatch, v: Tensor) -> Tensor:
            clone = self._elsewhere(problem, at)
            rows, pulled, seed = clone._pullback(clone._tried(piece))
            return _push(pulled, seed, problem.shaped(v), rows)

        try:
            flaw = outputs_against_differences(self.problem, batch, outputs, push)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            flaw = str(error).splitlines()[0]
        if flaw is not None:
            raise ValueError(
                f"the derivative of this network's outputs is wrong or unavailable{suspects(self.problem, batch)}. "
                f"params= excludes weights. {flaw}"
            )

    def _tried(self, batch: WeightedBatch) -> Tensor:
        """The outputs on which the Jacobian is tested."""
        return self._rows(0, batch)

    def _rows(self, i: int, batch: WeightedBatch) -> Tensor:
        """The tensor whose Jacobian is used: the outputs on a batch."""
        outputs = self.problem.outputs(batch)
        if not isinstance(outputs, Tensor):
            raise ValueError(f"{self.name} needs a model that returns one tensor, got {type(outputs).__name__}.")
        return outputs

    def _batch_product(self, i: int, batch: WeightedBatch, v: list[Tensor]) -> Tensor:
        (outputs, pulled, seed), stored = self._graph(i, lambda: self._pullback(self._rows(i, batch)))
        jv = _push(pulled, seed, v, outputs)
        at = outputs.detach().requires_grad_()
        with torch.enable_grad():
            slope = torch.autograd.grad(self.problem.value_of(batch, at), at, create_graph=True)[0]
            if not slope.requires_grad:
                return torch.zeros(self.size, dtype=self.dtype, device=self.device)
            hjv = torch.autograd.grad(slope, at, jv, materialize_grads=True)[0]
        return self._pull(outputs, hjv, retain=stored)

    def _pullback(self, outputs: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """The outputs, J^T s as a function of a vector s, and s."""
        seed = torch.zeros_like(outputs, requires_grad=True)
        pulled = torch.autograd.grad(outputs, self.problem.weights, seed, create_graph=True, materialize_grads=True)
        return outputs, list(pulled), seed

    def _pull(self, outputs: Tensor, seed: Tensor, *, retain: bool) -> Tensor:
        rows = torch.autograd.grad(outputs, self.problem.weights, seed, retain_graph=retain, materialize_grads=True)
        return self.problem.flat(rows)


def _push(pulled: list[Tensor], seed: Tensor, v: list[Tensor], outputs: Tensor) -> Tensor:
    """J v, computed as the derivative of J^T s with respect to s along v."""
    reached = [(p, u) for p, u in zip(pulled, v, strict=True) if p.requires_grad]
    if not reached:
        return torch.zeros_like(outputs)
    pairs: Sequence[Sequence[Tensor]] = list(zip(*reached, strict=True))
    return torch.autograd.grad(pairs[0], seed, pairs[1], retain_graph=True, materialize_grads=True)[0].detach()


class EmpiricalFisher(GaussNewton):
    """The empirical Fisher matrix of a `Problem`: the uncentred second moment of the per-term gradients.

        F = (1 / T) sum_i g_i g_i^T

    g_i is the gradient of the i-th term of the loss, at the label of the data. This is not the Fisher information; for
    that, use `Fisher`.

    Args:
        problem: the function. Its loss must be a module with a `reduction`, or `per_sample` must be given.
        per_sample: (outputs, targets) -> one value per term. There may be more or fewer terms than examples; T is the
            number of values over all data. Default None: the loss with reduction="none", weighted as in its mean.
        memory: see `Curvature`. Default None.

    Raises:
        ValueError: the terms of the loss are not available, or the values do not agree with the loss.

    Source: Kunstner, Hennig & Balles, NeurIPS 2019.
    """

    name = "EmpiricalFisher"

    def __init__(
        self,
        problem: Problem,
        *,
        per_sample: Callable[[Any, Any], Tensor] | None = None,
        memory: int | None = None,
    ) -> None:
        self._per_sample = per_sample or terms_of(problem.loss)
        super().__init__(problem, memory=memory)
        self._total = self._count(own=per_sample is not None)

    def _count(self, *, own: bool) -> float | None:
        """The number of values of the caller's function over all data; None for the terms of the loss.

        Raises:
            ValueError: there is no value per example, or the mean (sum) of the values is not the loss.
        """
        values = 0
        with self.problem.together(), self.problem.guard(), torch.no_grad():
            for i, batch in enumerate(self.problem.batches if own else self.problem.batches[:1]):
                losses = self._per_sample(self.problem.outputs(batch), batch.targets)
                examples = len(first_tensor(batch.targets))
                if not isinstance(losses, Tensor) or (examples > 1 and losses.numel() < 2):
                    what = f"{losses.numel()} of them" if isinstance(losses, Tensor) else type(losses).__name__
                    raise ValueError(
                        f"{'per_sample=' if own else 'the loss with reduction=none'} must return a value for each of "
                        f"the {examples} examples of a batch (or for each of their tokens), got {what}; pass "
                        "per_sample=, a function (outputs, targets) -> values."
                    )
                values += losses.numel()
                if not own and i == 0:
                    loss = float(self.problem.value_of(batch, self.problem.outputs(batch))) / batch.share
                    mean = float(losses.double().sum()) / _counted(self.problem, batch)
                    if abs(mean - loss) > 1e-2 * max(abs(mean), abs(loss)) + 1e-6:
                        raise ValueError(
                            f"the {self.problem.reduction} of the values with reduction='none' is {mean:.5g} on a "
                            f"batch, but the loss is {loss:.5g}; pass per_sample=, a function (outputs, targets) -> "
                            "values."
                        )
        if not own:
            return None
        total = torch.tensor([values], dtype=torch.float64, device=self.device)
        return float(self.problem.reduced(total)[0])

    def _batch_product(self, i: int, batch: WeightedBatch, v: list[Tensor]) -> Tensor:
        (terms, pulled, seed), stored = self._graph(i, lambda: self._pullback(self._rows(i, batch)))
        along = _push(pulled, seed, v, terms)
        return self._pull(terms, along * self._weight(batch, terms), retain=stored)

    def _weight(self, batch: WeightedBatch, terms: Tensor) -> float:
        """The weight of each term in the mean."""
        return batch.share / _counted(self.problem, batch) if self._total is None else 1.0 / self._total

    def _rows(self, i: int, batch: WeightedBatch) -> Tensor:
        return self._per_sample(self.problem.outputs(batch), batch.targets).reshape(-1)


class Fisher(EmpiricalFisher):
    """The Fisher information of the model's own distribution, estimated with sampled labels.

        F = (1 / T) sum_i E[g g^T],   y ~ p(y | x_i)

    g is the gradient of the loss at the label y. The expectation is estimated with `draws` labels per sample, drawn
    once. Only cross-entropy (softmax) is supported; there, F equals the Gauss-Newton matrix, so use `GaussNewton` for
    the exact matrix.

    Args:
        problem: the function, with outputs (N, K) and a cross-entropy loss without label smoothing or class weights.
        draws: number of labels per sample, >= 1. Default 1.
        seed: seed of the draws. Default 0.
        memory: see `Curvature`. Default None.

    Raises:
        ValueError: the loss is not supported, or `draws` is below 1.
        ArithmeticError: the outputs are not finite (raised by the first product).
    """

    name = "Fisher"

    def __init__(self, problem: Problem, *, draws: int = 1, seed: int = 0, memory: int | None = None) -> None:
        if draws < 1:
            raise ValueError(f"draws must be at least 1, got {draws!r}.")
        loss = problem.loss
        plain = loss is F.cross_entropy or (
            isinstance(loss, nn.CrossEntropyLoss) and loss.label_smoothing == 0 and loss.weight is None
        )
        if not plain:
            raise ValueError(
                "Fisher draws labels from the softmax, so it needs nn.CrossEntropyLoss without label smoothing or "
                f"class weights, got {problem.conventions.loss}; for other losses use GaussNewton."
            )
        self._draws, self._seed = draws, seed
        self._labels: dict[int, Tensor] = {}
        super().__init__(problem, memory=memory)

    def _count(self, *, own: bool) -> None:
        return None

    def _tried(self, batch: WeightedBatch) -> Tensor:
        return GaussNewton._rows(self, 0, batch)

    @property
    def conventions(self) -> Conventions:
        return self.problem.conventions.with_seed(self._seed)

    def _rows(self, i: int, batch: WeightedBatch) -> Tensor:
        outputs = self.problem.outputs(batch)
        if not batch.targets.is_floating_point():
            outputs = outputs[batch.targets != self.problem.ignored]
        return _unreduced_cross_entropy(torch.cat([outputs] * self._draws), self._draw(i, outputs))

    def _weight(self, batch: WeightedBatch, terms: Tensor) -> float:
        return batch.share / len(terms)

    def _draw(self, i: int, outputs: Tensor) -> Tensor:
        if i not in self._labels:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + i)
            chances = outputs.detach().double().softmax(1).cpu()
            if not chances.isfinite().all():
                raise ArithmeticError("the model's outputs are not finite, so no labels can be drawn from them.")
            labels = torch.multinomial(chances, self._draws, replacement=True, generator=generator)
            self._labels[i] = labels.T.reshape(-1).to(outputs.device)
        return self._labels[i]


def _unreduced_cross_entropy(outputs: Any, targets: Any) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


def terms_of(loss: Any) -> Callable[[Any, Any], Tensor]:
    """Return the loss with reduction="none", that is, one value per term.

    Raises:
        ValueError: `loss` is a function other than `cross_entropy`, or a module without `reduction`.
    """
    if loss is F.cross_entropy:
        return _unreduced_cross_entropy
    if isinstance(loss, nn.Module) and hasattr(loss, "reduction"):
        clone: Any = copy.copy(loss)
        clone.reduction = "none"
        return clone  # type: ignore[no-any-return]
    raise ValueError(
        "the loss cannot return one value per sample; use a loss module such as nn.CrossEntropyLoss(), or pass "
        "per_sample=."
    )


def _counted(problem: Problem, batch: WeightedBatch) -> float:
    """The divisor of a batch's share for a single term: its number of terms, or 1 for a sum."""
    return 1.0 if problem.reduction == "sum" else batch.terms


def dense(operator: Operator) -> Tensor:
    """Compute the whole matrix, shape (size, size), with one product per row. For small problems."""
    rows = torch.eye(operator.size, dtype=operator.dtype, device=operator.device)
    return torch.stack([operator.matvec(row) for row in rows])


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    return 1 << 30


def _counting(build: Callable[[], Any]) -> tuple[Any, int]:
    """The result of `build`, and the number of bytes that its graph keeps in memory."""
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        built = build()
    return built, sum(seen.values())
