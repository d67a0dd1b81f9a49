"""infty's SAM, for continual learning: its closure returns outputs and a list of losses."""

from __future__ import annotations

from typing import Any

from infty.optim.geometry_reshaping.sam import SAM
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from conformance.adapter import Adapter, Base, Closure, Form, NotOfferedError, Subject, one_radius


class Returning(Subject):
    """Converts closures to the form that its `step` takes."""

    def step(self, closure: Closure) -> Any:
        """One step."""
        _, losses = self.optimizer.step(lambda: (None, [closure()]))
        return losses[0]


class ADAPTER(Adapter):
    """How it is built."""

    title = "infty"
    distribution = "infty"
    forms = frozenset({"sam", "asam"})

    def build(
        self, params: Any, base: Base, *, rho: float, form: Form | None = None, model: Any = None, **options: Any
    ) -> Subject:
        """Wrap a base optimizer. Under DistributedDataParallel each replica has its own perturbation."""
        replicated = isinstance(model, DistributedDataParallel)
        own = options.pop("ascent_sync", "all") == "none"
        self.claims(form, options)
        one_radius(params)
        if replicated and not own:
            raise NotOfferedError("local ascents only")
        made = base.make(params)
        groups = [p for g in made.param_groups for p in g["params"]]
        return Returning(SAM(groups, made, model or nn.Module(), {"rho": rho}, adaptive=form == "asam"))
