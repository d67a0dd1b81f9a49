"""Matrices of second derivatives as matrix-free operators: Hessian, Gauss-Newton, Fisher."""

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
    """A symmetric matrix known by its products with vectors."""

    @property
    def size(self) -> int:
        """Number of rows."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the vectors."""

    @property
    def device(self) -> torch.device:
        """Of the vectors."""

    def matvec(self, vector: Tensor) -> Tensor:
        """The product with a vector of shape (size,)."""


class Curvature:
    """What the operators on a `Problem` share: batches, kept graphs, sums over processes.

    Args:
        problem: the function.
        memory: bytes of kept graphs. A batch whose graph is kept costs about two gradients a product, another one
            three. Default: 1 GiB on the CPU, half of what is free on an accelerator; 0 keeps none.

    Attributes:
        products: number of them so far.
        stored_graphs: number of batches whose graph is kept.
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
        """What it is a matrix of."""
        return self.problem.conventions

    def matvec(self, vector: Tensor) -> Tensor:
        """The product with a vector of shape (size,), in its own dtype.

        Raises:
            ValueError: another shape.
            ArithmeticError: it is not finite; with the batch whose loss is not, if there is one.
        """
        v = self.problem.shaped(vector.detach().to(self.dtype))
        total = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        with self.problem.guard():
            for i, batch in enumerate(self.problem.batches):
                total += self._batch_product(i, batch, v)
        total = self.problem.reduced(total)
        if not torch.isfinite(total).all():
            where = self.problem.not_finite()
            raise ArithmeticError(f"a product with the {self.name} is not finite; nothing can be measured here.{where}")
        self.products += 1
        return total + self._decay() * vector.to(self.dtype)

    def _decay(self) -> float:
        return 0.0

    def _batch_product(self, i: int, batch: WeightedBatch, v: list[Tensor]) -> Tensor:
        raise AttributeError(f"{type(self).__name__} defines no _batch_product().")

    def _graph(self, i: int, build: Callable[[], Any]) -> tuple[Any, bool]:
        """What `build` gives for batch i, and whether it is kept (its graph must then survive a backward)."""
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
        """The operator of a problem at other weights, for a trial."""
        clone = copy.copy(self)
        clone.problem, clone.dtype, clone._graphs, clone._full = copy.copy(problem), problem.dtype, {}, True
        clone.problem.weights = [w.detach().requires_grad_() for w in at]
        return clone

    def close(self) -> None:
        """Drop the kept graphs."""
        self._graphs.clear()
        self._full = True


class Hessian(Curvature):
    r"""H = d^2 L / dw^2 of a `Problem`, weight decay included.

    Products are by double backward (Pearlmutter, Neural Computation 1994), with the graph of the gradient kept within
    the memory budget; by the forward derivative of the gradient where a net has no double backward; by central
    differences only on request: on nets with kinks (ReLU, max pooling) they are wrong by tens of percent whatever the
    step. The row `padding_idx` of an embedding is a constant, as in training.

    Args:
        problem: the function.
        form: "reverse", "forward", "finite", or "auto" (default): the first of the first two that works on this net.
        memory: see `Curvature`.

    Raises:
        ValueError: another form, or a net of which neither derivative can be taken.
    """

    name = "Hessian"

    def __init__(self, problem: Problem, *, form: Form | Literal["auto"] = "auto", memory: int | None = None) -> None:
        super().__init__(problem, memory=memory)
        if form not in ("auto", "finite", *_FORMS):
            raise ValueError(f"form must be 'auto', 'reverse', 'forward' or 'finite', got {form!r}.")
        if form == "finite":
            warnings.warn(
                "Hessian products by finite differences are wrong on nets with kinks (ReLU, max pooling), by tens of "
                "percent.",
                stacklevel=2,
            )
        self.form: Form = "reverse"
        self._padding: list[tuple[int, int]] | None = None
        with problem.together():
            self.form = self._probe() if form == "auto" else form

    def _probe(self) -> Form:
        """The first form whose products on a few examples are differences of the gradient."""
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
                raise  # says nothing about the form
            except (RuntimeError, NotImplementedError) as error:
                flaw = str(error).splitlines()[0]
            if flaw is None:
                self._full = keep
                return form
            failures.append(f"{form}: {flaw}")
        raise ValueError(
            f"no second derivative of this net can be trusted{suspects(self.problem, batch)}. If the loss is smooth, "
            "form='finite' takes differences of the gradient; form='reverse' takes products as they are; params= "
            "leaves weights out. " + " ".join(failures)
        )

    def _flaw(self, batch: WeightedBatch) -> str | None:
        """What is wrong with the products, if anything is: against differences of the gradient, then in themselves."""

        def product(problem: Problem, at: Sequence[Tensor], piece: WeightedBatch, v: Tensor) -> Tensor:
            return self._elsewhere(problem, at)._batch_product(0, piece, problem.shaped(v))

        flaw = against_differences(self.problem, batch, product)
        if flaw is not None:
            return flaw
        # In the precision of the problem, and where differences say nothing.
        generator = torch.Generator().manual_seed(0)
        u, v = (
            torch.randn(self.size, generator=generator, dtype=torch.float64).to(self.device, self.dtype)
            for _ in range(2)
        )
        hu, hv = (self._batch_product(0, batch, self.problem.shaped(x)) for x in (u, v))
        left, right = torch.dot(u.double(), hv.double()), torch.dot(v.double(), hu.double())
        size = float(hu.double().norm() * v.double().norm() + hv.double().norm() * u.double().norm())
        if size and abs(float(left - right)) > 1e-2 * size:
            return "the products are not those of a symmetric matrix."
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
        v = without_padding(v, self._padding)  # these forms would move it
        if self.form == "forward":
            weights = tuple(w.detach() for w in self.problem.weights)
            with warnings.catch_warnings():
                # torch's own rules are compiled by a part of torch that it has deprecated.
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
    r"""G = (1/T) sum_i J_i^T (d^2 l_i / df^2) J_i, with J_i the Jacobian of the outputs f in the weights.

    The generalised Gauss-Newton matrix: the Hessian without the outputs' own second derivatives; positive
    semi-definite for convex losses. Exact: J v by double backward, the loss's Hessian in the outputs likewise, J^T u by
    backward. Source: Schraudolph, Neural Computation 2002.

    Args:
        problem: the function; its outputs must be one tensor.
        memory: see `Curvature`.
    """

    name = "GaussNewton"

    def __init__(self, problem: Problem, *, memory: int | None = None) -> None:
        super().__init__(problem, memory=memory)
        with problem.together():
            self._try()

    def _try(self) -> None:
        """Refuse a net whose Jacobian is not the derivative of its outputs."""
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
                f"the derivative of this net's outputs cannot be trusted{suspects(self.problem, batch)}. "
                f"params= leaves weights out. {flaw}"
            )

    def _tried(self, batch: WeightedBatch) -> Tensor:
        """What the Jacobian is tried on."""
        return self._rows(0, batch)

    def _rows(self, i: int, batch: WeightedBatch) -> Tensor:
        """What the Jacobian is of: the outputs on a batch."""
        outputs = self.problem.outputs(batch)
        if not isinstance(outputs, Tensor):
            raise ValueError(f"{self.name} needs a model whose output is one tensor, got {type(outputs).__name__}.")
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
        """The outputs, J^T s as a function of a seed s, and the seed."""
        seed = torch.zeros_like(outputs, requires_grad=True)
        pulled = torch.autograd.grad(outputs, self.problem.weights, seed, create_graph=True, materialize_grads=True)
        return outputs, list(pulled), seed

    def _pull(self, outputs: Tensor, seed: Tensor, *, retain: bool) -> Tensor:
        rows = torch.autograd.grad(outputs, self.problem.weights, seed, retain_graph=retain, materialize_grads=True)
        return self.problem.flat(rows)


def _push(pulled: list[Tensor], seed: Tensor, v: list[Tensor], outputs: Tensor) -> Tensor:
    """J v, as the derivative of J^T s in s along v."""
    reached = [(p, u) for p, u in zip(pulled, v, strict=True) if p.requires_grad]
    if not reached:
        return torch.zeros_like(outputs)
    pairs: Sequence[Sequence[Tensor]] = list(zip(*reached, strict=True))
    return torch.autograd.grad(pairs[0], seed, pairs[1], retain_graph=True, materialize_grads=True)[0].detach()


class EmpiricalFisher(GaussNewton):
    r"""F = (1/T) sum_i g_i g_i^T with g_i the gradient of the i-th term of the loss at its label.

    The uncentred second moment of the per-sample gradients; not the Fisher information, which `Fisher` is. Source:
    Kunstner, Hennig & Balles, NeurIPS 2019.

    Args:
        problem: the function; its loss must be a module with a `reduction`, or come with `per_sample`.
        per_sample: (outputs, targets) -> one value per term, of which there may be more or fewer than examples; T is
            the number of values over all data. Default: the loss with reduction="none", counted as its mean counts.
        memory: see `Curvature`.

    Raises:
        ValueError: no way to the terms, or values that are not those of the loss.
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
        """Values of the caller's function over all data; None for terms of the loss, which count as in its mean.

        Raises:
            ValueError: values that are not those of examples, or whose mean (sum) is not the loss.
        """
        values = 0
        with self.problem.together(), self.problem.guard(), torch.no_grad():
            for i, batch in enumerate(self.problem.batches if own else self.problem.batches[:1]):
                losses = self._per_sample(self.problem.outputs(batch), batch.targets)
                examples = len(first_tensor(batch.targets))
                if not isinstance(losses, Tensor) or (examples > 1 and losses.numel() < 2):
                    what = f"{losses.numel()} of them" if isinstance(losses, Tensor) else type(losses).__name__
                    raise ValueError(
                        f"{'per_sample=' if own else 'the loss with reduction=none'} must give a value for each of the "
                        f"{examples} examples of a batch (or for each of their tokens), got {what}; pass per_sample=, "
                        "a function (outputs, targets) -> values."
                    )
                values += losses.numel()
                if not own and i == 0:
                    loss = float(self.problem.value_of(batch, self.problem.outputs(batch))) / batch.share
                    mean = float(losses.double().sum()) / _counted(self.problem, batch)
                    if abs(mean - loss) > 1e-2 * max(abs(mean), abs(loss)) + 1e-6:
                        raise ValueError(
                            f"the loss with reduction='none' gives values whose {self.problem.reduction} is {mean:.5g} "
                            f"on a batch, where the loss is {loss:.5g}; pass per_sample=, a function (outputs, "
                            "targets) -> values."
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
        """Of each term in the mean."""
        return batch.share / _counted(self.problem, batch) if self._total is None else 1.0 / self._total

    def _rows(self, i: int, batch: WeightedBatch) -> Tensor:
        return self._per_sample(self.problem.outputs(batch), batch.targets).reshape(-1)


class Fisher(EmpiricalFisher):
    r"""F = (1/T) sum_i E_{y ~ p(y | x_i)} [g g^T]: the Fisher information of the model's own distribution.

    For cross-entropy (softmax), the only loss it serves, it equals the Gauss-Newton matrix; here the expectation is
    taken over labels drawn once per draw and sample, by the seed. For the exact matrix use `GaussNewton`.

    Args:
        problem: the function, with outputs (N, K) and a cross-entropy loss without label smoothing or class weights.
        draws: labels per sample, >= 1. Default 1.
        seed: of the draws.
        memory: see `Curvature`.

    Raises:
        ValueError: another loss, or draws below 1.
        ArithmeticError: outputs that are not finite, at the first product.
    """

    name = "Fisher"

    def __init__(self, problem: Problem, *, draws: int = 1, seed: int = 0, memory: int | None = None) -> None:
        if draws < 1:
            raise ValueError(f"Fisher needs at least one draw, got {draws!r}.")
        loss = problem.loss
        plain = loss is F.cross_entropy or (
            isinstance(loss, nn.CrossEntropyLoss) and loss.label_smoothing == 0 and loss.weight is None
        )
        if not plain:
            raise ValueError(
                "Fisher draws labels from a softmax, so it needs nn.CrossEntropyLoss without smoothing or weights; "
                f"got {problem.conventions.loss}. GaussNewton serves every loss."
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
                raise ArithmeticError("the outputs of the model are not finite, so no labels can be drawn from them.")
            labels = torch.multinomial(chances, self._draws, replacement=True, generator=generator)
            self._labels[i] = labels.T.reshape(-1).to(outputs.device)
        return self._labels[i]


def _unreduced_cross_entropy(outputs: Any, targets: Any) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


def terms_of(loss: Any) -> Callable[[Any, Any], Tensor]:
    """The loss with one value per term.

    Raises:
        ValueError: a function other than `cross_entropy`, or a module without `reduction`.
    """
    if loss is F.cross_entropy:
        return _unreduced_cross_entropy
    if isinstance(loss, nn.Module) and hasattr(loss, "reduction"):
        clone: Any = copy.copy(loss)
        clone.reduction = "none"
        return clone  # type: ignore[no-any-return]
    raise ValueError(
        "the loss gives no value per sample; use a loss module such as nn.CrossEntropyLoss(), or pass per_sample=."
    )


def _counted(problem: Problem, batch: WeightedBatch) -> float:
    """Terms of a batch in the mean that its share is of."""
    return 1.0 if problem.reduction == "sum" else batch.terms


def dense(operator: Operator) -> Tensor:
    """The whole matrix, by one product per row; for small problems and tests."""
    rows = torch.eye(operator.size, dtype=operator.dtype, device=operator.device)
    return torch.stack([operator.matvec(row) for row in rows])


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    return 1 << 30


def _counting(build: Callable[[], Any]) -> tuple[Any, int]:
    """What `build` returns, and the bytes that its graph keeps alive."""
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        built = build()
    return built, sum(seen.values())
