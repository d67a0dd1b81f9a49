"""`flatmin.SAM`: runs any recipe around any torch optimizer, in any training loop."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flatmin.methods import Need, Recipe, compose
from flatmin.optim.amp import GradScaling
from flatmin.optim.base_optimizer import (
    BaseOptimizer,
    adaptive_recipe,
    build_base,
    check_positive,
    check_rho,
    hands_on_eps,
    set_rho,
)
from flatmin.optim.checkpoint import load, mark, save
from flatmin.optim.closures import Closure, Probe, as_list, run_all
from flatmin.optim.containers import detached, loss_in
from flatmin.optim.criterion import Criterion, PassView
from flatmin.optim.diagnostics import Diagnostics
from flatmin.optim.distributed import AscentSync, Replicas
from flatmin.optim.evaluation import Evaluation
from flatmin.optim.flat import FlatWeights, check_joinable
from flatmin.optim.imitated import reach_through
from flatmin.optim.model_guard import ModelGuard
from flatmin.optim.other_gradients import OtherGradients
from flatmin.optim.perturb import WeightSnapshot
from flatmin.optim.program import EngineContext, Generators
from flatmin.optim.random_state import RandomState, generators_of
from flatmin.optim.rise import Ascents, Rise
from flatmin.optim.state import STEP, MethodState, StateView
from flatmin.optim.step import Step, end_update
from flatmin.optim.support import Loop, check_criterion, check_options, check_recipe, refusal
from flatmin.optim.tools import Tools
from flatmin.optim.weights import TrainedWeights
from flatmin.words import warn

_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)
_OF_GROUPS = frozenset({Need.SGD, Need.BARE_SGD})  # needs that depend on options of the param groups, which may change
# Attributes that are copied and pickled unchanged.
_OPTIONS = (
    "nonfinite", "eps", "clip_norm", "ascent_sync",
    "_seed", "_freeze_batchnorm", "_freeze_state", "_replay_rng", "_diagnoses", "_flat",
)  # fmt: skip
NonFinite = Literal["skip", "raise", "propagate"]


class SAM(Optimizer):
    """Sharpness-aware minimisation around a base optimizer. It runs any recipe; the default is SAM.

        g = grad L(w)
        epsilon = rho g / (||g||_2 + eps)
        w <- base step at w with grad L(w + epsilon)

    It is a `torch.optim.Optimizer` and shares param groups, defaults, hooks and state with the base optimizer, so
    schedulers, gradient clipping, checkpoints, `deepcopy` and `pickle` work as usual. `rho` is an option of each param
    group, like `lr`. Groups with rho = 0 are not perturbed.

        >>> import torch, flatmin
        >>> model = torch.nn.Linear(4, 1)
        >>> x, y = torch.randn(8, 4), torch.randn(8, 1)
        >>> optimizer = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.05, model=model)
        >>> scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = torch.nn.functional.mse_loss(model(x), y)
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)
        >>> scheduler.step()

    The call of the common single-file implementation works too:

        >>> optimizer = flatmin.SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)

    Args:
        params: a constructed base optimizer; or parameters, if `base_optimizer` is given.
        base_optimizer: class of the base optimizer, called with `params` and `kwargs`. Default None.
        rho: radius of the perturbation for param groups without their own, as a length of the whole weight vector in
            the norm of the recipe's geometry, >= 0. Default: that of the method (`recipe.default_rho`; 0.05 for SAM,
            Foret et al. 2021). If the base optimizer has an option `rho` itself (Adadelta), groups store the radius as
            "flatmin.rho"; see `rho_key`.
        adaptive: True is short for the recipe "asam". A param group's own `adaptive` takes precedence. Default False.
        recipe: a name, as in `flatmin.compose`, or a `Recipe`. Default "sam".
        model: the module being trained. Used for BatchNorm statistics (updated by the first pass only), equal dropout
            masks in manual loops, parameter names and checks. Not pickled, not in `state_dict`. Default None.
        criterion: the `flatmin.Criterion` of the training loop, for recipes that need the loss, such as those with
            another ascent loss. Default None.
        nonfinite: what to do if the descent gradient has nan or inf entries. "skip" (default): leave weights and base
            optimizer unchanged; on an accelerator this synchronises once a step, unless the base is a fused torch
            optimizer. "raise": leave them unchanged and raise FloatingPointError. "propagate": no check.
        freeze_batchnorm: whether only the first pass of a step updates running statistics (needs `model`). Default
            True.
        freeze_state: whether only the first pass of a step changes other untrained state of the model: buffers,
            untrained parameters, and numbers and tensors that are attributes of its modules (needs `model`). Default
            True.
        replay_rng: whether later passes draw the same random numbers as the first pass, from the global generators of
            torch, numpy and Python, the generators in modules of `model`, and `generators`. Default True.
        generators: further generators that the loss draws from (`torch.Generator`, `numpy.random.Generator`,
            `numpy.random.RandomState`, `random.Random`). Not copied or pickled with the optimizer. Default ().
        eps: added to every norm that divides. Default None: 1e-12, as in common implementations. If the base optimizer
            is given as a class that has an option of this name, the value is passed to it instead.
        seed: seed of the engine's random generator, for recipes that draw random numbers. Default 0.
        diagnostics: whether to record numbers for `diagnostics()` in each step. It stores one more copy of g, and one
            of eps, which is saved in checkpoints. Default False.
        scaler: the `torch.amp.GradScaler` of the training loop. The gradients of every pass are unscaled, and an inf in
            any pass is reported to it; such a step is skipped, whatever `nonfinite` is. Not pickled. Default None.
        clip_norm: largest global norm of the gradient that the base optimizer takes, > 0. Default None: no clipping.
        ascent_sync: which replicas share pass 1 under DistributedDataParallel (needs `model`): "all" (default), "none":
            each replica uses its own batch (m-sharpness, without communication in pass 1), or a number k: groups of k
            consecutive ranks.
        flat: whether the trained weights become views of one buffer for each dtype and device, so that methods whose
            parts treat all entries alike (`recipe.joins`), and torch's entrywise optimizers, work on few large tensors.
            It is faster if there are many small weights, and no faster if there are few large ones. Values agree up to
            rounding; checkpoints are the same. Everything else works weight by weight. Needs whole weights that share
            no memory, and dense gradients. It costs one more copy of the weights, for the gradients. Default False.
        kwargs: options of `base_optimizer`.

    Attributes:
        base: the base optimizer.
        recipe: the recipe.
        rho_key: the option of the param groups that holds the radius: "rho", or "flatmin.rho".
        loss_point: where the loss returned by `step(closure)` was computed: "w", or "w + eps" for recipes without a
            pass at w.
        model: the module being trained, or None. It may be set between updates, like `criterion` and `scaler`.
        clip_norm: as given. It may be set, like `nonfinite` and `eps`.

    Raises:
        ValueError, TypeError: a bad rho, an unknown recipe, contradicting parts, or needs of the recipe that are not
            met; the message says what to pass.

    Source: Foret et al., Sharpness-Aware Minimization for Efficiently Improving Generalization, ICLR 2021, Alg. 1.
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., Optimizer] | None = None,
        rho: float | None = None,
        adaptive: bool = False,
        *,
        recipe: str | Recipe = "sam",
        model: nn.Module | None = None,
        criterion: Criterion | None = None,
        nonfinite: NonFinite = "skip",
        freeze_batchnorm: bool = True,
        freeze_state: bool = True,
        replay_rng: bool = True,
        generators: Sequence[Any] = (),
        eps: float | None = None,
        seed: int = 0,
        diagnostics: bool = False,
        scaler: Any = None,
        clip_norm: float | None = None,
        ascent_sync: AscentSync = "all",
        flat: bool = False,
        **kwargs: Any,
    ) -> None:
        rho = None if rho is None else check_rho(rho)
        eps = None if eps is None else check_positive("eps", eps)
        self.clip_norm = None if clip_norm is None else check_positive("clip_norm", clip_norm)
        if adaptive and recipe != "sam":
            raise ValueError(
                f"adaptive=True means the recipe 'asam', but recipe={recipe!r} was given; drop one of them."
            )
        if nonfinite not in ("skip", "raise", "propagate"):
            raise ValueError(f"nonfinite must be 'skip', 'raise' or 'propagate', got {nonfinite!r}.")
        given = {"eps": eps, "model": model, "criterion": criterion, "clip_norm": clip_norm, "scaler": scaler}
        both = {k: v for k, v in given.items() if v is not None} | ({"seed": seed} if seed else {})
        base = build_base(params, base_optimizer, kwargs, both)
        self.nonfinite, self.eps = nonfinite, 1e-12 if eps is None or hands_on_eps(base_optimizer) else eps
        recipe = adaptive_recipe(base, recipe, adaptive, rho)
        recipe = compose(recipe) if isinstance(recipe, str) else recipe
        if not isinstance(recipe, Recipe):
            raise TypeError(f"recipe must be a name or a flatmin.Recipe, got {type(recipe).__name__}.")
        self.ascent_sync, self._seed, self._diagnoses = ascent_sync, seed, diagnostics
        self._freeze_batchnorm, self._freeze_state, self._replay_rng = freeze_batchnorm, freeze_state, replay_rng
        self._own_generators, self._lost_model, self._flat = tuple(generators), False, flat
        self._assemble(base, MethodState(recipe, seed, diagnostics), model, criterion)
        set_rho(base, self.rho_key, rho, recipe.default_rho)
        mark(self.param_groups, self._tools.state)
        check_recipe(recipe, self._tools.base, self._tools.weights, model)
        self._refuse_second_order_base()
        self._look_at_groups()
        inputs = self._tools.weights.inputs(self._tools.state)
        inputs.generator = Generators(seed)  # the check takes none of the method's random numbers
        recipe.mask.select(EngineContext(inputs, range(len(inputs.weights))))
        self.scaler = scaler

    def _assemble(
        self, optimizer: Optimizer, state: MethodState, model: nn.Module | None, criterion: Criterion | None
    ) -> None:
        """Create everything that is neither saved nor copied, from a base optimizer and the method's state."""
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
        base = BaseOptimizer(optimizer)
        self._step: Step | None = None
        self._cleared = False  # whether gradients were cleared since the last loss outside of the passes
        self._scaler: Any = None
        self.loss_point = "w"
        self._warned_of_drop = False
        self._tools = Tools(
            state.recipe,
            base,
            TrainedWeights(base, state.recipe),
            state,
            WeightSnapshot(self._seed),
            Diagnostics(state) if self._diagnoses else None,
            FlatWeights(base, state, state.recipe, diagnoses=self._diagnoses) if self._flat else None,
        )
        self.criterion = criterion
        self._attach(model)

    def _attach(self, model: nn.Module | None) -> None:
        """Set the model; None: no model."""
        tools = self._tools
        weights = tools.base.weights
        if model is not None and not {id(p) for p in model.parameters()} & {id(w) for w in weights}:
            raise ValueError("model= has none of the optimizer's parameters; pass the module being trained.")
        own = [*self._own_generators, *(() if model is None else generators_of(model))]
        tools.replicas = Replicas(self.ascent_sync, model, tools.recipe)
        tools.random = RandomState({w.device for w in weights}, own) if self._replay_rng else None
        tools.others, tools.guard, self._model = OtherGradients(), None, model
        if model is not None:
            tools.guard = ModelGuard(
                model,
                weights,
                tools.random,
                tools.others,
                freeze_batchnorm=self._freeze_batchnorm,
                freeze_state=self._freeze_state,
                abandoned=getattr(self.criterion, "give_up", None),
            )
        tools.weights.attach(model)
        if tools.flat is not None:
            tools.flat.model = model
        self._lost_model &= model is None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        reach_through(cls)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.recipe}, base={self.base!r})"

    # -- attributes ----------------------------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's list of param groups."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The base optimizer's defaults, including rho."""
        return self.base.defaults

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The base optimizer's state; if the recipe has state too, a view of both."""
        return StateView(self.base, self._tools.state) if self._tools.state else self.base.state

    @property
    def base(self) -> Optimizer:
        """The base optimizer."""
        return self._tools.base.optimizer

    @property
    def base_optimizer(self) -> Optimizer:
        """The base optimizer, under the name that other implementations use."""
        return self.base

    @property
    def recipe(self) -> Recipe:
        """The recipe."""
        return self._tools.recipe

    @property
    def criterion(self) -> Criterion | None:
        """The `flatmin.Criterion` of the training loop, or None. It may be set between updates."""
        return self._tools.criterion

    @criterion.setter
    def criterion(self, criterion: Criterion | None) -> None:
        self._refuse_during_update("a new criterion")
        if criterion is not None:
            if not isinstance(criterion, Criterion):
                raise TypeError(
                    f"criterion must be a flatmin.Criterion, got {type(criterion).__name__}; pass "
                    "flatmin.Criterion(loss)."
                )
            criterion.bind(self, self.recipe)
        check_criterion(self.recipe, criterion)
        self._tools.criterion = criterion
        if self._tools.guard is not None:
            self._tools.guard.watch.abandoned = None if criterion is None else criterion.give_up

    @property
    def rho_key(self) -> str:
        """The option of the param groups that holds the radius: "rho", or "flatmin.rho"."""
        return self._tools.base.rho_key

    @property
    def model(self) -> nn.Module | None:
        """The module being trained, or None. It may be set between updates, for example after unpickling."""
        return self._model

    @model.setter
    def model(self, model: nn.Module | None) -> None:
        self._refuse_during_update("a new model")
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
        self._attach(model)

    @property
    def scaler(self) -> Any:
        """The GradScaler of the training loop, or None. It may be set between updates."""
        return self._scaler

    @scaler.setter
    def scaler(self, scaler: Any) -> None:
        self._refuse_during_update("a new scaler")
        if scaler is not None and not all(hasattr(scaler, m) for m in ("scale", "unscale_", "step", "is_enabled")):
            raise TypeError(f"scaler must be a torch.amp.GradScaler, got {type(scaler).__name__}.")
        on = scaler is not None and scaler.is_enabled()
        if on and (why := refusal(self.recipe, Loop.SCALER)):
            raise ValueError(f"{self.recipe.name} {why}; use bfloat16 autocast, which needs no scaler.")
        self._scaler = scaler
        self._tools.scaling = GradScaling(scaler, self, self._tools.base.weights[0].device) if on else None

    def __getattr__(self, name: str) -> Any:
        if name in _HOOKS:
            return self.base.__dict__[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients; see `torch.optim.Optimizer.zero_grad`."""
        step = self._under_way if self._flat and set_to_none else None
        if step is None or not step.clear():
            self._tools.base.zero_grad(set_to_none)
        self._cleared = True
        if self._tools.guard is not None:
            self._tools.guard.watch.clear()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group. It gets the default rho unless it has its own.

        Raises:
            RuntimeError: an update is under way.
            ValueError: a bad rho, or adaptive=True with a recipe without "asam".
        """
        self._refuse_during_update("add_param_group()")
        if self.rho_key in param_group:
            check_rho(param_group[self.rho_key])
        if param_group.get("adaptive") and not self.recipe.geometry.adaptive:
            raise ValueError(f"a param group with adaptive=True needs a recipe with 'asam'; this is {self.recipe}.")
        if self._flat:
            params = param_group["params"]
            params = [params] if isinstance(params, Tensor) else list(params)
            param_group = {**param_group, "params": params}
            named = [p[1] if isinstance(p, tuple) else p for p in params]
            check_joinable([*self._tools.weights.layout.weights, *named])
        self.base.add_param_group(param_group)
        self._look_at_groups(changed=True)

    def _look_at_groups(self, *, changed: bool = False) -> None:
        """Follow changes of the param groups: forget removed weights and look up new ones."""
        tools = self._tools
        if tools.weights.changed() or changed:
            weights = tools.base.weights
            tools.state.keep_only(weights)
            tools.weights.regroup()
            if tools.guard is None:
                tools.others.forget()
            else:
                tools.guard.look_again(weights)
        if STEP not in self.base.param_groups[0]:
            mark(self.base.param_groups, tools.state)  # a checkpoint was loaded into the base optimizer directly
        if tools.flat is not None:
            tools.flat.follow(tools.weights.layout)

    # -- one update ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Closure | Sequence[Closure] | None = None) -> Any:
        """Take one step.

        With a closure, all passes run here. The closure clears the gradients, computes the loss, calls backward and
        returns the loss, as for other torch optimizers. Without a closure, `step` ends an update whose passes a manual
        loop has run (`perturbed()`, `passes()`).

        A list of closures stands for the micro-batches of one batch. Each closure returns the mean loss of its own
        samples; gradients and losses are averaged with equal weights. Methods with a perturbation for each micro-batch
        need a list.

        Args:
            closure: a closure, a list of closures, or None (default).

        Returns:
            The result of the closure in the first pass, detached. This is the loss at w, unless the recipe has no pass
            at w (see `loss_point`). For a list of closures, the mean of their losses. A closure may return the loss, or
            a dict, tuple or object that holds it as "loss" or as its first item.

        Raises:
            RuntimeError: no gradients, a loss that was not computed from the model again, or neither passes nor a
                closure.
            FloatingPointError: nonfinite="raise", and the descent gradient is not finite.
        """
        try:
            if "found_inf" in self.__dict__ and self._tools.scaling is None:
                raise RuntimeError(
                    "scaler.step() was called, but the optimizer does not know the scaler: pass scaler= when you build "
                    "the optimizer, or set optimizer.scaler."
                )
            step = self._step
            if step is not None and step.over:
                step = self._step = None
            if closure is None:
                self._end(step)
                return None
            closures = [closure] if callable(closure) else as_list(closure)
            if step is not None and (step.resident or step.outcome is not None):
                return self._end_with(closures, step)
            if step is not None:
                self._refuse_during_update("a new update")
            return self._run(closures, listed=isinstance(closure, (list, tuple)))
        except BaseException:
            # The scaler does not remove its attributes if a step raises an exception.
            for attribute in ("grad_scale", "found_inf"):
                self.__dict__.pop(attribute, None)
            raise

    # Otherwise torch would run the step hooks both here and in the base optimizer.
    step.hooked = True  # type: ignore[attr-defined]
    # With this a GradScaler always calls step(), also with a closure, and leaves unscaling and skipping to it.
    _step_supports_amp_scaling = True

    def _run(self, closures: Sequence[Closure], *, listed: bool) -> Any:
        """Run all passes of an update, and its step."""
        recipe = self._tools.recipe
        if Need.MICRO_BATCHES in recipe.needs and not listed:
            raise RuntimeError(f"{recipe.name} needs {Need.MICRO_BATCHES.value}; got one closure.")
        step = self._begin(len(closures), closed=True)
        try:
            made = None if step.plain or self._warned_of_drop else self._tools.weights.new_gradient()
            probe = None if made is None else self._probe(made)
            first, moved = step.run(closures, probe)
            self.loss_point = "w + eps" if moved else "w"
            if probe is not None and probe.added:
                self._warn_of_drop(
                    " (the closure runs in every pass). To accumulate gradients over micro-batches, pass step() a list "
                    "of closures, or use passes(); if your loop calls backward() itself, use first_step() and "
                    "second_step()"
                )
        except BaseException:
            step.abort()
            raise
        self._apply(step, first if isinstance(first, Tensor) else loss_in(first))
        if self._tools.scaling is not None:
            # The next scaler.step() would check remaining gradients and find an inf.
            self.zero_grad()
        return first

    def _end(self, step: Step | None) -> None:
        """End an update whose passes a manual loop has run."""
        if step is None:
            self._plain_step()
        elif step.resident:
            self._step_resident(step)
        elif step.outcome is None:
            raise RuntimeError(
                "step() was called before the passes of this update were done; leave perturbed() first, or use "
                "second_step()."
            )
        else:
            self._apply(step)

    def _apply(self, step: Step, loss: Any = None) -> None:
        """Let the base optimizer step, and drop the update."""
        try:
            step.apply(self.nonfinite, self.clip_norm, loss)
        finally:
            self._step = None

    def _end_with(self, closures: Sequence[Closure], step: Step) -> Any:
        """Take a step with closures between `train()` and `eval()`, or after the loop has run the passes.

        Frameworks that always call step() with a closure (Lightning) pass one that returns None if the loop gave none.
        """
        if step.resident and self._tools.scaling is not None:
            raise RuntimeError(
                "between train() and eval() a GradScaler checks the gradients before it calls step(): run backward "
                "before scaler.step(optimizer), without a closure."
            )
        with torch.enable_grad():
            result = closures[0]() if len(closures) == 1 else run_all(closures, step.weights, self._tools.others)
        if step.resident:
            self.loss_point = "w + eps"
            if self._tools.diagnostics is not None:
                self._tools.diagnostics.loss(loss_in(result), perturbed=True)
            self._step_resident(step, loss_in(result))
        elif result is None:
            self._apply(step)
        else:
            self.abort()
            raise RuntimeError(
                "step() got a closure that computes a loss, but the passes of this update are done; after perturbed() "
                "and passes() call step() without a closure."
            )
        return detached(result)

    def _plain_step(self) -> None:
        """Take the base optimizer's own step, for a loop that has run no passes; an error if weights are perturbed."""
        groups, tools = self.param_groups, self._tools
        # torch's distributed checkpoints create an optimizer's state by a step with lr = 0.
        if "found_inf" not in self.__dict__ and all(g.get("lr") is not None and float(g["lr"]) == 0.0 for g in groups):
            self.base.step()
            return
        if tools.weights.act():
            raise RuntimeError(
                f"step() needs a closure, or both passes before it: {self.recipe.name} takes a second gradient at w + "
                "eps. Pass a closure that clears the gradients, computes the loss and calls backward, or run "
                + ("the second pass in `with optimizer.perturbed():`." if self.recipe.two_pass else "passes().")
                + (" Lightning's precision '16-mixed' does not pass a closure." if "found_inf" in vars(self) else "")
            )
        if tools.scaling is None and self.clip_norm is None:
            self.base.step()
            return
        step = self._begin()
        step.take_plain()
        self._apply(step)

    def _begin(self, chunks: int = 1, *, closed: bool = False, resident: bool = False) -> Step:
        """Begin an update.

        Args:
            chunks: number of micro-batches. Default 1.
            closed: see `Step`.
            resident: see `Step`.
        """
        if self._lost_model:
            self._lost_model = False
            warn(
                "this optimizer was unpickled without its model: set optimizer.model. Otherwise every pass updates "
                "BatchNorm statistics and other state of the model."
            )
        if self._tools.base.differentiates:
            self._refuse_second_order_base()
        if self._tools.guard is not None:
            self._tools.guard.follow()
        self._look_at_groups()
        if self._tools.recipe.needs & _OF_GROUPS:
            check_options(self._tools.recipe, self._tools.base, self._tools.weights)
        self._step = Step(self._tools, chunks, eps=self.eps, closed=closed, resident=resident)
        return self._step

    @property
    def _under_way(self) -> Step | None:
        """The update that has begun and has not ended; None if there is none."""
        step = self._step
        return None if step is None or step.over else step

    def _refuse_during_update(self, what: str) -> None:
        step = self._under_way
        if step is not None:
            raise RuntimeError(
                f"{what}: an update is under way; finish it with step(), or call "
                f"{'eval()' if step.resident else 'abort()'} to restore the weights."
            )

    def _refuse_second_order_base(self) -> None:
        if self._tools.base.differentiates and self._tools.weights.act():
            raise ValueError(
                f"{type(self.base).__name__} differentiates the gradients again in its step, after the weights have "
                "been restored from w + eps. It can be a base optimizer only with rho = 0 (and "
                "optimizer.backward(loss), which keeps the graph)."
            )

    def _probe(self, weight: Tensor) -> Probe | None:
        """A probe that finds out whether the closure drops this gradient; None (and a warning) if that is certain."""
        tools = self._tools
        if tools.guard is None or tools.others.in_training():  # the forward may have been for another optimizer
            return Probe(weight)
        if tools.guard.watch.own_forwards and tools.guard.watch.alone:
            self._warn_of_drop(
                ". To accumulate gradients over micro-batches, pass step() a list of closures, or use passes()"
            )
        return None

    def _warn_of_drop(self, way_out: str) -> None:
        self._warned_of_drop = True
        warn(f"step(closure) runs all passes itself and drops the gradients that were there before it{way_out}.")

    # -- manual loops --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def perturbed(self) -> Iterator[None]:
        """A context for manual loops, inside which the weights are at w + eps.

            loss_fn(model(x), y).backward()
            with optimizer.perturbed():
                loss_fn(model(x), y).backward()
            optimizer.step()

        Gradients are cleared on entering. On leaving, the weights are restored, and the gradients are those that the
        base optimizer will take; clip them there. An exception inside restores the weights and ends the update.

        Raises:
            RuntimeError: no gradients before it, an update under way, or a recipe whose step is not one pass at w and
                one at w + eps.
        """
        with Evaluation(self._begin_manual("perturbed()"), bracketed=False):
            yield

    def passes(self, chunks: int = 1) -> Iterator[Evaluation]:
        """Iterate over the passes of one update, for manual loops with any recipe.

            for evaluation in optimizer.passes():
                with evaluation:
                    loss_fn(model(x), y).backward()
            optimizer.step()

        Args:
            chunks: number of micro-batches into which the loop divides the batch, for methods that need them. The
                attribute `chunk` of each pass is then the micro-batch to run on. Default 1.

        Yields:
            Contexts with the attributes `role`, `index` and `chunk`, see `Evaluation`. Each must be entered; gradients
            are cleared on entering.

        Raises:
            RuntimeError: an update is under way, or a context was not entered.
            ValueError: chunks below 1.
        """
        if chunks < 1:
            raise ValueError(f"chunks must be at least 1, got {chunks}.")
        self._refuse_during_update("a new update")
        with torch.no_grad():
            step = self._begin(chunks)
        while step.request is not None:
            evaluation = Evaluation(step)
            yield evaluation
            if not evaluation.entered:
                self.abort()
                raise RuntimeError("each pass must be run inside `with evaluation:`.")
            if step.over:
                return

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Perturb the weights to w + eps with the current gradients. With `second_step`, it replaces `perturbed()`.

        Args:
            zero_grad: has no effect; gradients are always cleared.

        Raises:
            RuntimeError: no gradients, an update under way, or a recipe whose step is not one pass at w and one at
                w + eps.
        """
        Evaluation(self._begin_manual("first_step()"), bracketed=False).__enter__()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Restore the weights and let the base optimizer step with the gradients at w + eps.

        With a scaler it unscales the gradients and skips the step itself; call only `scaler.update()` after it.

        Args:
            zero_grad: whether to clear the gradients afterwards. Default False.

        Raises:
            RuntimeError: no `first_step` before it, or no gradients.
        """
        step = self._under_way
        if step is None or not step.inside:
            raise RuntimeError("second_step() needs first_step() and a backward pass before it.")
        step.close()
        Evaluation(step).end()
        self.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def _begin_manual(self, entry: str) -> Step:
        """Begin an update with the current gradients as those of pass 1."""
        if self._tools.replicas.local:
            raise RuntimeError(
                f"{entry} uses gradients that are averaged over all replicas already; use passes() with ascent_sync."
            )
        if not self.recipe.two_pass:
            raise RuntimeError(
                f"{entry} works with recipes of one pass at w and one at w + eps; {self.recipe.name} needs passes() or "
                "step(closure)."
            )
        self._refuse_during_update(entry)
        step = self._begin()
        try:
            step.take_first()
        except BaseException:
            self.abort()
            raise
        return step

    def backward(self, loss: Tensor) -> None:
        """Like `loss.backward()`, but compute what the running pass needs.

        - Methods that need second derivatives: it keeps the graph in the passes that need it. Loops that call this
          instead of `loss.backward()` can run every method.
        - Methods that perturb some weights only (`only`, `sam-on`, `esam`, groups with rho = 0): in passes of the
          ascent it computes the gradients of these weights only; those of the others are None. The update is the same,
          bit for bit, but an inf in a gradient that is not computed is not found. All gradients are computed where
          something uses them: with a combination or schedule that does, `diagnostics=True`, in a process group, in
          weights joined by `flat=True`, with autograd functions written in Python, and in the first three and every
          100th update of `step(closure)`. A loop that reads all gradients in every pass calls `loss.backward()`.

        Args:
            loss: scalar loss with graph.
        """
        step = self._under_way
        if step is None:
            loss.backward(create_graph=self._tools.base.differentiates)
        else:
            step.backward(loss)

    def select_samples(self, compute: Callable[[], Any]) -> Tensor | slice:
        """The samples that the running pass needs, so that the network runs on these only.

            def closure():
                optimizer.zero_grad()
                chosen = optimizer.select_samples(lambda: criterion(model(x), y))
                loss = criterion(model(x[chosen]), y[chosen])
                optimizer.backward(loss)
                return loss

        It acts only in the descent pass of a method that chooses samples (`esam`): it calls `compute` without
        gradients, and returns the positions of the chosen samples. In all other passes, and with all other methods, it
        returns a slice of the whole batch without calling `compute`. Works with `step(closure)` and `passes()`.

        With `esam` and gamma = 1/2 a step then costs about 1.7 gradients in place of 2: the gradient of the perturbed
        weights at w, a forward of the whole batch at w + eps, and a gradient of its half. BatchNorm normalises the
        chosen samples by their own statistics, and dropout masks differ from those at w, as in the official code; what
        is drawn after the loss of the chosen samples is drawn as in the pass at w. Inside `torch.autocast`, its cache
        of weights is cleared. A loop that does not call it runs the whole batch at w + eps, and the criterion applies
        the same choice to the outputs.

        Args:
            compute: runs the network and the optimizer's criterion once, on the whole batch.

        Returns:
            The positions, shape (count,), or `slice(None)`.

        Raises:
            RuntimeError: the passes of `perturbed()` or `first_step()`; `compute` does not call the criterion once; the
                criterion is not called again in the same pass.
            ValueError: the criterion is called on other than the chosen samples.

        Source: Du et al., Efficient Sharpness-Aware Minimization for Improved Training of Neural Networks, ICLR 2022.
        """
        step = self._under_way
        chosen = None if step is None else step.select_samples(compute)
        return slice(None) if chosen is None else chosen

    @torch.no_grad()
    def abort(self) -> None:
        """End an update without a step. Weights, statistics and state are restored to those before it."""
        step, self._step = self._under_way, None
        if step is not None:
            step.abort()
        else:
            end_update(self._tools)

    # -- staying at w + eps ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def train(self) -> None:
        """Keep the weights at w + eps between steps, for methods that can, and call the base optimizer's `train()`.

            optimizer.train()
            for x, y in loader:
                optimizer.zero_grad()
                loss_fn(model(x), y).backward()
                optimizer.step()
            optimizer.eval()   # before evaluation and checkpoints

        Methods that do not need a gradient at w for eps (momentum-sam, stale-sam) can run in such a loop. All others
        still need their passes. Trainers may call it with any method and any base optimizer; the base optimizer's
        `train()` is called if there is one (schedule-free optimizers). Gradients are cleared on entering and after each
        step. The next eps is computed inside `step()`, so a radius that a scheduler sets afterwards takes effect one
        step later than with `step(closure)`.

        Raises:
            RuntimeError: an update is under way.
        """
        step = self._under_way
        if step is not None and step.resident:
            return
        self._refuse_during_update("train()")
        if callable(train := getattr(self.base, "train", None)):
            train()
        if self.recipe.one_pass:
            self._stay()

    @torch.no_grad()
    def eval(self) -> None:
        """Restore the weights to w, and call the base optimizer's `eval()` if there is one; see `train`."""
        step = self._under_way
        if step is not None and step.resident:
            self.abort()
        self._refuse_during_update("eval()")
        if callable(evaluate := getattr(self.base, "eval", None)):
            evaluate()

    def _stay(self) -> None:
        Evaluation(self._begin(resident=True), bracketed=False).__enter__()

    def _step_resident(self, step: Step, loss: Any = None) -> None:
        step.hand_over()
        Evaluation(step).end()
        self._apply(step, loss)
        self._stay()

    # -- numbers -------------------------------------------------------------------------------------------------

    def current_pass(self) -> PassView:
        """The pass that a loss computed now belongs to; between updates, the first pass of the next update."""
        step, recipe = self._under_way, self.recipe
        if step is None:
            if self._cleared and self.criterion is not None and all(w.grad is None for w in self._tools.base.weights):
                self.criterion.give_up()
            self._cleared = False
            ascends = recipe.moves and recipe.two_pass and self._tools.weights.act()
            return PassView("ascent" if ascends else "descent", under_way=False)
        if not step.inside or step.request is None:
            return PassView("descent")
        request = step.request
        return PassView(request.role, request.at is not None, request.graph, request.probe)

    def on_loss(self, outputs: Any, target: Any, loss: Tensor, *, perturbed: bool) -> None:
        """Record a training loss; called by the criterion."""
        diagnostics = self._tools.diagnostics
        if diagnostics is not None:
            ignored = None if self.criterion is None else self.criterion.ignored
            diagnostics.outputs(outputs, target, ignored, perturbed=perturbed)
            diagnostics.loss(loss, perturbed=perturbed)

    def diagnostics(self) -> dict[str, float]:
        """Numbers of the last update, if the optimizer was built with `diagnostics=True`.

        Reading them synchronises once; recording them does not. A key is missing if the step has no such number (no
        ascent, no logits, no ascent before it).

        - `loss`, `loss_perturbed`: the loss at w and at w + eps (of the last micro-batch if there are several).
        - `gradient_norm`, `perturbed_gradient_norm`, `weight_norm`: ||g||, ||g_s||, ||w||.
        - `epsilon_norm`: the length of the realised perturbation (w + eps) - w. `epsilon_asked`: ||eps|| before
          rounding. `epsilon_projection`: <realised, eps> / ||eps||^2. `epsilon_cosine`: the cosine of the two.
          `epsilon_unmoved`: share of the entries that rounding left unchanged.
        - `ascent_cosine`: the cosine of eps and the eps of the last update with an ascent, both before rounding, over
          all weights (0 for weights that were not perturbed). It shows how stable the perturbation is.
        - `cosine`: the cosine of g and g_s.
        - `ratio_larger`: share of the entries with |r| > 1, where r = g_s / g; and the shares by class `ratio_above_1`,
          `ratio_0_to_1`, `ratio_minus_1_to_0`, `ratio_below_minus_1`. Entries with r = 0 or g = 0 are in no class;
          |r| = 1 is in an inner class.
        - `same_sign`: share of the entries of g and g_s with equal signs.
        - `misclassified`: number of samples that are classified wrongly at w + eps. `flipped`: those among them that
          are classified correctly at w. Only with a `Criterion` on class logits.

        With several ascents in a row, eps is the whole displacement from w. With one for each micro-batch, it is that
        of the last one. Checkpoints contain the last eps, so that a resumed run shows the same numbers.

        Returns:
            Name -> number.

        Raises:
            RuntimeError: the optimizer was built without `diagnostics=True`.
        """
        if self._tools.diagnostics is None:
            raise RuntimeError("this optimizer records no diagnostics; build it with diagnostics=True.")
        return self._tools.diagnostics.read()

    def counts(self) -> dict[str, int]:
        """Counts since construction: `updates`, `nonfinite_ascents` and `skipped_steps`.

        `nonfinite_ascents` are ascents that were left out because their direction was not finite. Reading the counts
        synchronises; counting does not.
        """
        return self._tools.totals()

    @torch.no_grad()
    def rise(
        self,
        closure: Closure | Sequence[Closure],
        multiples: float | Sequence[float] = (1.0,),
        *,
        model: nn.Module | None = None,
    ) -> Rise:
        """Measure the rise of a batch's loss along the method's own ascent, at multiples of the param groups' radii.

        It takes no step. It restores, bit for bit, the weights, gradients, the state of optimizer and method, random
        states, and the untrained state of the model. `flatmin.measure.radius` makes a table from several batches. The
        schedule, the radius rule and the choice of samples are not used: the perturbation is one at `multiple * rho` on
        the whole batch.

        Not restored are: tensors inside lists and dicts of modules that are written to in place, nested containers,
        side effects of the closure, and existing gradients of networks other than `model`, to which the closure's
        backward adds.

        Args:
            closure: as in `step`; a list of closures for micro-batches.
            multiples: one or several multiples of the groups' rho, > 0. Default (1,).
            model: the network whose buffers and other untrained state are restored. Pass every network that the loss
                uses, several of them as an `nn.ModuleList`. Untrained parameters are copied only if together they are
                at most twice as large as the trained weights. Default None: the optimizer's `model`.

        Returns:
            The loss at w, and for each multiple the rise predicted by the gradient, the measured rise and the length of
            eps. It costs one gradient at w, and for each multiple the gradients of an ascent and one more.

        Raises:
            RuntimeError: an update is under way, or a manual loop has computed its first loss; a closure without
                backward; a forward that writes to large untrained parameters; the errors of `step`.
            ValueError: a method that never perturbs the weights or has no direction yet, rho = 0 everywhere, a multiple
                that is not above 0, no closures, or several processes.
            TypeError: a closure that does not return its loss.
            ArithmeticError: the loss or gradient at w is not finite.
        """
        self._refuse_during_update("rise()")
        model = self._model if model is None else model
        own = self._own_generators
        ascents = Ascents(self._tools, self, self._begin, self.abort, own, model, cleared=self._cleared)
        return ascents.rise(closure, multiples)

    # -- checkpoints and copies -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's checkpoint with the state of the recipe, under keys "flatmin.<part>.<slot>".

        Values that do not belong to one weight are in the first param group. The checkpoint has no copy of the weights.
        Load it with `load_state_dict` or `torch.distributed.checkpoint`.

        Raises:
            RuntimeError: an update is under way.
        """
        self._refuse_during_update("state_dict()")
        return save(self.base, self._tools.state)

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a checkpoint of this class, or a plain checkpoint of the base optimizer.

        - A checkpoint of this class must be of the same recipe. It sets each group's rho, like lr. The parameters of
          the recipe stay those of this optimizer: if they differ (another theta), it is an error if the recipe has
          state, and a warning otherwise.
        - A plain checkpoint of the base optimizer leaves rho unchanged, and the recipe starts without state.
          `flatmin.base_state_dict` converts any checkpoint to a plain one.
        - A checkpoint of the common single-file implementation sets lr and rho. Its copies of the weights are ignored.

        Args:
            state_dict: the checkpoint.

        Raises:
            RuntimeError: an update is under way.
            ValueError: a checkpoint of another recipe or of a newer version, or groups or shapes that do not match.
        """
        self._refuse_during_update("load_state_dict()")
        load(self.base, self._tools.state, state_dict)
        self._tools.state.restart(self.param_groups)
        mark(self.param_groups, self._tools.state)
        self._tools.weights.find_names()

    def __getstate__(self) -> dict[str, Any]:
        if self._under_way is not None:
            raise RuntimeError("cannot copy or pickle during an update; finish it with step() or call abort() first.")
        if self.ascent_sync != "all":
            raise RuntimeError(
                "an optimizer with ascent_sync cannot be copied or pickled; copy its state_dict() instead."
            )
        return {
            **{name: self.__dict__[name] for name in _OPTIONS},
            "recipe": self.recipe,
            "base": self.base,
            "criterion": self.criterion,
            "state": self._tools.state.dump(self._tools.base.weights),
            "weights": self._tools.weights.dump(),
            "_lost_model": self._model is not None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore without hooks and without the model. The names and layers of the weights are restored too."""
        self._revive(dict(state), model=None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        # Copy the model first, so that the copied base optimizer holds the weights of the copied model.
        model = copy.deepcopy(self._model, memo)
        state = {k: copy.deepcopy(v, memo) for k, v in self.__getstate__().items() if k != "recipe"}
        new._revive({**state, "recipe": self.recipe}, model=model)
        return new

    def _revive(self, state: dict[str, Any], model: nn.Module | None) -> None:
        base, criterion = state.pop("base"), state.pop("criterion")
        remembered, weight_names, recipe = state.pop("state"), state.pop("weights"), state.pop("recipe")
        self.__dict__.update(state)
        if not getattr(base, "param_groups", None):
            raise RuntimeError(
                f"{type(base).__name__} loses its inner optimizer when it is copied or pickled; copy its state_dict()."
            )
        self._own_generators = ()
        method_state = MethodState(recipe, self._seed, self._diagnoses)
        method_state.restore([w for group in base.param_groups for w in group["params"]], remembered)
        self._assemble(base, method_state, model, criterion)
        self._tools.weights.restore(weight_names)
