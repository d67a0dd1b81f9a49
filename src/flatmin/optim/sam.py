"""The optimizer that users hold: any recipe around any torch optimizer, in any training loop."""

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
from flatmin.optim.imitated import reach_through
from flatmin.optim.model_guard import ModelGuard
from flatmin.optim.other_gradients import OtherGradients
from flatmin.optim.perturb import WeightSnapshot
from flatmin.optim.program import EngineContext
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
# What is copied and pickled as it is.
_OF_GROUPS = frozenset({Need.SGD, Need.BARE_SGD})  # what is asked of param groups, which may change
_OPTIONS = (
    "nonfinite", "eps", "clip_norm", "ascent_sync",
    "_seed", "_freeze_batchnorm", "_freeze_state", "_replay_rng", "_diagnoses",
)  # fmt: skip
NonFinite = Literal["skip", "raise", "propagate"]


class SAM(Optimizer):
    r"""Sharpness-aware minimisation around a base optimizer; runs any recipe, SAM by default.

    .. math::
        \epsilon = \rho \frac{g}{\|g\|_2 + \mathrm{eps}},\quad g = \nabla L(w),\qquad
        w \leftarrow \text{base step at } w \text{ with } \nabla L(w + \epsilon)

    It is a `torch.optim.Optimizer` whose param groups, defaults, hooks and state are the base's: schedulers, clipping
    utilities, checkpoints, `deepcopy` and `pickle` work on it. `rho` is an option of each param group, like `lr`;
    groups with rho = 0 stay out of the ascent.

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

    The form of the common single-file implementation works too:

        >>> optimizer = flatmin.SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)

    Args:
        params: a constructed base optimizer, or parameters (then `base_optimizer` is its class).
        base_optimizer: class of the base, called with `params` and `kwargs`. Default None.
        rho: ascent radius for groups that set none, in units of the weights' norm under the recipe's geometry, >= 0.
            Default: the method's own (`recipe.default_rho`; 0.05 for SAM, Foret et al. 2021). Around a base that has
            an option `rho` of its own (Adadelta) groups hold the radius as "flatmin.rho"; see `rho_key`.
        adaptive: shorthand for the recipe "asam". A param group's own `adaptive` goes before. Default False.
        recipe: a name as in `flatmin.compose`, or a `Recipe`. Default "sam".
        model: the module being trained, for BatchNorm statistics (touched by the first pass only), equal dropout masks
            in manual loops, parameter names and checks. Held, never pickled or put into `state_dict`. Default None.
        criterion: the `flatmin.Criterion` of the loop; needed by recipes that climb another loss. Default None.
        nonfinite: what to do when the descent gradient has nan or inf entries. "skip" (default): weights and base
            state stay; synchronises once a step on an accelerator unless the base is a fused torch optimizer. "raise":
            FloatingPointError, likewise unchanged. "propagate": exactly the base's behaviour, no check.
        freeze_batchnorm: keep running statistics out of later passes (needs `model`). Default True.
        freeze_state: put back what later passes change in all else of the model that is not trained, so that it
            advances once a step: buffers, untrained parameters, and numbers and tensors that its modules hold as
            attributes (needs `model`). Default True.
        replay_rng: later passes draw the random numbers of the first one: torch's, numpy's and Python's global
            generators, those that modules of `model` hold, and `generators`. Default True.
        generators: further ones that the loss draws from (`torch.Generator`, `numpy.random.Generator`,
            `numpy.random.RandomState`, `random.Random`). Not copied or pickled with the optimizer. Default ().
        eps: added to every norm that divides. Default None: 1e-12 (Foret et al.'s common implementations). A base given
            by its class, if it has an option of this name, is handed it instead.
        seed: of the engine's own generator, for recipes that draw. Default 0.
        diagnostics: record each step's numbers for `diagnostics()`; holds one more copy of g, and one of eps, which
            goes into checkpoints. Default False.
        scaler: the `torch.amp.GradScaler` of the loop, so that gradients of every pass are unscaled and the scaler
            hears of an inf in any of them; such a step is skipped, whatever `nonfinite` says. Held, never pickled.
            Default None.
        clip_norm: the base takes u scaled down to this global norm, > 0. Default None: no clipping.
        ascent_sync: whose batches pass 1 sees under DistributedDataParallel (needs `model`): "all" replicas' (default),
            "none" but the replica's own (m-sharpness, and no communication in pass 1), or those of k consecutive
            ranks.
        kwargs: options of `base_optimizer`.

    Attributes:
        base: the base optimizer.
        recipe: what is run.
        rho_key: the option of the param groups that holds the radius: "rho", or "flatmin.rho".
        loss_point: where the loss that `step(closure)` returned was taken: "w", or "w + eps" for recipes that skip or
            move pass 1.
        model: the module being trained, or None; may be set between updates, as `criterion` and `scaler` may.
        clip_norm: as given; may be set. `nonfinite` and `eps` likewise.

    Raises:
        ValueError, TypeError: bad rho, unknown or contradicting recipe, needs that this loop cannot serve.

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
        **kwargs: Any,
    ) -> None:
        rho = None if rho is None else check_rho(rho)
        eps = None if eps is None else check_positive("eps", eps)
        self.clip_norm = None if clip_norm is None else check_positive("clip_norm", clip_norm)
        if adaptive and recipe != "sam":
            raise ValueError(f"adaptive=True means the recipe 'asam'; got recipe={recipe!r} as well.")
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
        self._own_generators, self._lost_model = tuple(generators), False
        self._assemble(base, MethodState(recipe, seed, diagnostics), model, criterion)
        set_rho(base, self.rho_key, rho, recipe.default_rho)
        mark(self.param_groups, self._tools.state)
        check_recipe(recipe, self._tools.base, self._tools.weights, model)
        self._refuse_second_order_base()
        self._look_at_groups()
        inputs = self._tools.weights.inputs(self._tools.state)
        recipe.mask.select(EngineContext(inputs, range(len(inputs.weights))))
        self.scaler = scaler

    def _assemble(
        self, optimizer: Optimizer, state: MethodState, model: nn.Module | None, criterion: Criterion | None
    ) -> None:
        """Make all that is neither saved nor copied, around a base, and what the method remembers."""
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
        )
        self.criterion = criterion
        self._attach(model)

    def _attach(self, model: nn.Module | None) -> None:
        """Take in the model; None: there is none."""
        tools = self._tools
        weights = tools.base.weights
        if model is not None and not {id(p) for p in model.parameters()} & {id(w) for w in weights}:
            raise ValueError("model= holds none of the optimizer's parameters; pass the module being trained.")
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
        self._lost_model &= model is None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        reach_through(cls)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.recipe}, base={self.base!r})"

    # -- attributes ----------------------------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base's own list of groups."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The base's own defaults, with rho."""
        return self.base.defaults

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The base's state; with a recipe that remembers, a view of it together with the recipe's own."""
        return StateView(self.base, self._tools.state) if self._tools.state else self.base.state

    @property
    def base(self) -> Optimizer:
        """The wrapped optimizer."""
        return self._tools.base.optimizer

    @property
    def base_optimizer(self) -> Optimizer:
        """The wrapped optimizer, by the name other implementations use."""
        return self.base

    @property
    def recipe(self) -> Recipe:
        """What is run, as given at construction."""
        return self._tools.recipe

    @property
    def criterion(self) -> Criterion | None:
        """The `flatmin.Criterion` of the loop, or None. May be set between updates."""
        return self._tools.criterion

    @criterion.setter
    def criterion(self, criterion: Criterion | None) -> None:
        self._refuse_during_update("a new criterion")
        if criterion is not None:
            if not isinstance(criterion, Criterion):
                raise TypeError(
                    f"criterion must be a flatmin.Criterion, got {type(criterion).__name__}; wrap the loss in one."
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
        """The module being trained, as given at construction; may be set between updates, after unpickling for one."""
        return self._model

    @model.setter
    def model(self, model: nn.Module | None) -> None:
        self._refuse_during_update("a new model")
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
        self._attach(model)

    @property
    def scaler(self) -> Any:
        """The GradScaler of the loop, or None. May be set between updates."""
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
        self._tools.base.zero_grad(set_to_none)
        self._cleared = True
        if self._tools.guard is not None:
            self._tools.guard.watch.clear()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base; it takes the default rho unless it sets one.

        Raises:
            RuntimeError: during an update.
            ValueError: bad rho.
        """
        self._refuse_during_update("add_param_group()")
        if self.rho_key in param_group:
            check_rho(param_group[self.rho_key])
        if param_group.get("adaptive") and not self.recipe.geometry.adaptive:
            raise ValueError(f"a param group with adaptive=True needs a recipe with 'asam'; this is {self.recipe}.")
        self.base.add_param_group(param_group)
        self._look_at_groups(changed=True)

    def _look_at_groups(self, *, changed: bool = False) -> None:
        """Follow what the loop has done to the param groups: weights that left are forgotten, new ones looked up."""
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
            mark(self.base.param_groups, tools.state)  # a checkpoint was loaded into the base itself

    # -- one update ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Closure | Sequence[Closure] | None = None) -> Any:
        """One update.

        With a closure (torch's convention: it zeroes the gradients, computes the loss, calls backward, returns the
        loss) all passes run here. Without one it ends an update whose passes a manual loop has run.

        A list of closures stands for the micro-batches of one batch: each returns the mean loss of its own samples, and
        gradients and losses are averaged over them, all counting alike. Methods with an ascent for every micro-batch
        need it.

        Returns:
            What the closure returned in the first pass, detached: its loss at w unless the recipe skips or moves pass 1
            (see `loss_point`). Of a list of closures: the mean of their losses. A closure may return the loss, or a
            dict, tuple or object that holds it as "loss" or first.

        Raises:
            RuntimeError: no gradients, a loss without forward pass, or no passes run and no closure.
            FloatingPointError: see `nonfinite`.
        """
        try:
            if "found_inf" in self.__dict__ and self._tools.scaling is None:
                raise RuntimeError(
                    "scaler.step() on an optimizer that does not know the scaler: give it as scaler= when building the "
                    "optimizer, or set optimizer.scaler."
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
            # The scaler leaves its marks behind when a step raises.
            for attribute in ("grad_scale", "found_inf"):
                self.__dict__.pop(attribute, None)
            raise

    # torch would fire the step hooks here as well as in the base.
    step.hooked = True  # type: ignore[attr-defined]
    # A GradScaler then calls step() in any case, also with a closure, and leaves scaling and skipping to it.
    _step_supports_amp_scaling = True

    def _run(self, closures: Sequence[Closure], *, listed: bool) -> Any:
        """All passes of an update, and its step."""
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
                    " (here the closure runs in every pass). To accumulate over micro-batches, give step() a list of "
                    "closures, or use passes(); a loop that calls backward() itself needs first_step() and "
                    "second_step()"
                )
        except BaseException:
            step.abort()
            raise
        self._apply(step, first if isinstance(first, Tensor) else loss_in(first))
        if self._tools.scaling is not None:
            # What is left would be checked, and found infinite, by the next scaler.step().
            self.zero_grad()
        return first

    def _end(self, step: Step | None) -> None:
        """The step of an update whose passes a manual loop has run."""
        if step is None:
            self._plain_step()
        elif step.resident:
            self._step_resident(step)
        elif step.outcome is None:
            raise RuntimeError(
                "step() called before the passes of this update are done; leave perturbed(), or use second_step()."
            )
        else:
            self._apply(step)

    def _apply(self, step: Step, loss: Any = None) -> None:
        """Let the base step, and let go of the update."""
        try:
            step.apply(self.nonfinite, self.clip_norm, loss)
        finally:
            self._step = None

    def _end_with(self, closures: Sequence[Closure], step: Step) -> Any:
        """A step with closures where w + eps is the place between steps, or where the loop has run the passes already.

        Frameworks whose step() always has a closure (Lightning's) give one that computes nothing if the loop gave none.
        """
        if step.resident and self._tools.scaling is not None:
            raise RuntimeError(
                "between train() and eval() a GradScaler looks at the gradients before it calls step(): run backward "
                "before scaler.step(optimizer), and give it no closure."
            )
        with torch.enable_grad():
            result = closures[0]() if len(closures) == 1 else run_all(closures, step.inputs.weights, self._tools.others)
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
                "step() got a closure that computes a loss, and the passes of this update are done; call step() "
                "without one after perturbed() and passes()."
            )
        return detached(result)

    def _plain_step(self) -> None:
        """The step of a loop that has run no passes: the base's own, where nothing moves."""
        groups, tools = self.param_groups, self._tools
        # torch's distributed checkpoints make the state of an optimizer by a step with lr = 0.
        if "found_inf" not in self.__dict__ and all(g.get("lr") is not None and float(g["lr"]) == 0.0 for g in groups):
            self.base.step()
            return
        if tools.weights.act():
            raise RuntimeError(
                f"step() needs a closure, or both passes before it: {self.recipe.name} takes a second gradient at w + "
                "eps. Pass a closure that zeroes, computes the loss and calls backward, or run "
                + ("the second pass in `with optimizer.perturbed():`." if self.recipe.two_pass else "passes().")
                + (" Lightning's precision '16-mixed' keeps a closure to itself." if "found_inf" in vars(self) else "")
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
                "this optimizer was unpickled, and its model is not known any more: set optimizer.model, or BatchNorm "
                "statistics and other state of the model advance in every pass."
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
        """The update that has begun and not ended."""
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
                f"{type(self.base).__name__} differentiates the gradients once more in its step, when the weights have "
                "left w + eps: it is a base with rho = 0 only (call optimizer.backward(loss), which keeps the graph)."
            )

    def _probe(self, weight: Tensor) -> Probe | None:
        """What finds out whether a closure's passes drop this gradient of the loop's; warns where that is known."""
        tools = self._tools
        if tools.guard is None or tools.others.in_training():  # the forward may have been another optimizer's
            return Probe(weight)
        if tools.guard.watch.own_forwards and tools.guard.watch.alone:
            self._warn_of_drop("; to accumulate over micro-batches, give step() a list of closures, or use passes()")
        return None

    def _warn_of_drop(self, way_out: str) -> None:
        self._warned_of_drop = True
        warn(f"step(closure) runs all passes itself and drops the gradients of the forward before it{way_out}.")

    # -- manual loops --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def perturbed(self) -> Iterator[None]:
        """Context for manual loops: inside, the weights are at w + eps.

            loss_fn(model(x), y).backward()
            with optimizer.perturbed():
                loss_fn(model(x), y).backward()
            optimizer.step()

        Gradients are cleared on entering; after it they hold what the base will take, so clip there. Weights are
        restored on leaving, also by an exception, which ends the update.

        Raises:
            RuntimeError: no gradients before it, an update under way, or a recipe whose step is not two passes.
        """
        with Evaluation(self._begin_manual("perturbed()"), bracketed=False):
            yield

    def passes(self, chunks: int = 1) -> Iterator[Evaluation]:
        """The passes of one update, for manual loops with any recipe.

            for evaluation in optimizer.passes():
                with evaluation:
                    loss_fn(model(x), y).backward()
            optimizer.step()

        Args:
            chunks: into how many micro-batches the loop divides the batch, for methods that need them; each pass then
                says in `chunk` on which of them it runs. Default 1.

        Yields:
            Contexts with `role`, `index` and `chunk`; each must be entered. Gradients are cleared on entering.

        Raises:
            RuntimeError: an update under way, or a context that was not entered.
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
        """Climb to w + eps with the gradients at hand; the two-call form of `perturbed()`.

        Gradients are cleared in any case: they are spent.

        Raises:
            RuntimeError: no gradients, an update under way, or a recipe whose step is not two passes.
        """
        Evaluation(self._begin_manual("first_step()"), bracketed=False).__enter__()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Return to w and let the base step with the gradients taken at w + eps.

        With a scaler it unscales and skips by itself; `scaler.update()` comes after it.

        Args:
            zero_grad: clear the gradients afterwards. Default False.

        Raises:
            RuntimeError: without a first_step before it, or no gradients.
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
        """Begin an update with the gradients at hand as those of pass 1."""
        if self._tools.replicas.local:
            raise RuntimeError(f"{entry} takes a gradient that is averaged already; ascent_sync needs passes().")
        if not self.recipe.two_pass:
            raise RuntimeError(
                f"{entry} serves recipes of one pass at w and one at w + eps; {self.recipe.name} needs passes() or "
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
        """`loss.backward()`, keeping the graph in the passes of methods that need second derivatives.

        Loops that call it in place of `loss.backward()` can run every method; its cost is that of `loss.backward()`
        wherever no graph is needed.

        Args:
            loss: scalar, with graph.
        """
        step = self._under_way
        if step is None:
            loss.backward(create_graph=self._tools.base.differentiates)
        else:
            step.backward(loss)

    @torch.no_grad()
    def abort(self) -> None:
        """End an update without a step: weights, statistics and state are as the step found them."""
        step, self._step = self._under_way, None
        if step is not None:
            step.abort()
        else:
            end_update(self._tools)

    # -- staying at w + eps ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def train(self) -> None:
        """Tell a base that has `train()`, as schedule-free ones have; and stay at w + eps between steps (Momentum-SAM).

            optimizer.train()
            for x, y in loader:
                optimizer.zero_grad()
                loss_fn(model(x), y).backward()
                optimizer.step()
            optimizer.eval()   # before evaluation and checkpoints

        Methods that know w + eps without a gradient at w (momentum-sam, stale-sam) stay there; the others need their
        passes. Trainers may call it on any optimizer: a base without `train()` is told nothing. Gradients are cleared
        on entering and after each step. The next eps is made inside step(), so a radius that a scheduler sets after it
        acts one step later than in step(closure).

        Raises:
            RuntimeError: an update under way.
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
        """Return to w and stay there, and tell a base that has `eval()`; see `train`."""
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
        """The pass that a loss computed now belongs to; between updates it opens the next one."""
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
        """Called by the criterion with every loss computed in training."""
        diagnostics = self._tools.diagnostics
        if diagnostics is not None:
            ignored = None if self.criterion is None else self.criterion.ignored
            diagnostics.outputs(outputs, target, ignored, perturbed=perturbed)
            diagnostics.loss(loss, perturbed=perturbed)

    def diagnostics(self) -> dict[str, float]:
        """What the last update did; needs `diagnostics=True`. Reading synchronises once, recording does not.

        `loss`, `loss_perturbed`: at w and at w + eps (of the last micro-batch, if there are several).
        `gradient_norm`, `perturbed_gradient_norm`, `weight_norm`: ||g||, ||g_s||, ||w||. `epsilon_norm`: the realised
        ||(w + eps) - w||; `epsilon_asked`: ||eps|| before rounding; `epsilon_projection`, `epsilon_cosine`: <made,
        eps> / ||eps||^2 and the cosine of the two; `epsilon_unmoved`: share of all entries that rounding left where
        they are. `ascent_cosine`: of eps before rounding and that of the last update that ascended, over all weights,
        those that stayed where they were counting as zero; how stable the adversary is. `cosine`: of g and g_s.
        `ratio_larger`: share of the entries with |g_s / g| > 1,
        and the classes `ratio_above_1`, `ratio_0_to_1`, `ratio_minus_1_to_0`, `ratio_below_minus_1` (zeros are in
        none; |r| = 1 is in an inner one). `same_sign`: share of the entries whose sign agrees. `misclassified`,
        `flipped`: samples that are wrong at w + eps, and those right at w and wrong there; only with a `Criterion` on
        class logits.

        Keys of what a step did not have (an ascent, logits, an ascent before it) are missing. With several ascents in a
        row eps is the whole way from w; with one for each micro-batch it is that of the last one. The eps of the ascent
        before is part of checkpoints, so that a run that goes on shows the same numbers.

        Raises:
            RuntimeError: the optimizer was built without it.
        """
        if self._tools.diagnostics is None:
            raise RuntimeError("this optimizer records nothing; build it with diagnostics=True.")
        return self._tools.diagnostics.read()

    def counts(self) -> dict[str, int]:
        """Updates, ascents not taken because their direction was not finite, and steps skipped, since construction.

        Reading synchronises; counting does not.
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
        """The rise of a batch's loss along the method's own ascent, at multiples of the radii of the param groups.

        It takes no step and puts back, bit for bit, weights, gradients, the optimizer's and the method's state, random
        numbers, and what the model holds beside its weights. `flatmin.measure.radius` makes a table of several batches.
        The schedule, the radius's rule and the choice among samples are left out: what is measured is an ascent at
        `multiple * rho` on the whole batch.

        Not put back are tensors that modules keep inside lists and dicts and write to in place, containers inside
        these, what the closure does elsewhere, and existing gradients of networks other than `model`, which the
        closure's backward adds to.

        Args:
            closure: as in `step`; a list of them for micro-batches.
            multiples: of the groups' rho, > 0; a number or several. Default (1,).
            model: whose buffers and other untrained state are put back; give every network that the loss passes
                through, several as an `nn.ModuleList`. Untrained parameters are copied only if all of them are at most
                twice as large as the trained weights. Default None: the optimizer's own `model`.

        Returns:
            The loss at w, and for each multiple the rise that the gradient predicts, that measured, and the length of
            eps. It costs one gradient for w and for each multiple those of an ascent and one more.

        Raises:
            RuntimeError: during an update, also between the first loss of a manual loop's step and the perturbation; a
                closure without backward; a forward that writes to large untrained parameters; and what the passes of
                `step` raise.
            ValueError: a method that never leaves w or knows no way yet, rho = 0 everywhere, a multiple that is not
                above 0, no closures, several processes.
            TypeError: a closure that does not return its loss.
            ArithmeticError: a loss or gradient at w that is not finite.
        """
        self._refuse_during_update("rise()")
        model = self._model if model is None else model
        own = self._own_generators
        ascents = Ascents(self._tools, self, self._begin, self.abort, own, model, cleared=self._cleared)
        return ascents.rise(closure, multiples)

    # -- checkpoints and copies -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The base's checkpoint with the recipe's state in it, under keys "flatmin.<part>.<slot>" and in group 0.

        Holds no copy of the weights. Loads with `load_state_dict` and `torch.distributed.checkpoint`.

        Raises:
            RuntimeError: during an update.
        """
        self._refuse_during_update("state_dict()")
        return save(self.base, self._tools.state)

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a checkpoint of this class, or a plain one of the base.

        A checkpoint of this class brings each group's rho with it, as it brings lr. It must be of the same recipe; the
        recipe's own parameters are those of this optimizer. Other ones (another theta) are refused where the recipe
        remembers something, and warned of where it does not. A plain checkpoint leaves rho as it is, and the recipe
        begins anew; `flatmin.base_state_dict` makes one of any checkpoint. A checkpoint of the common single-file
        implementation brings lr and rho; its copies of the weights are left out.

        Raises:
            RuntimeError: during an update.
            ValueError: a checkpoint of another recipe or a newer version, groups or shapes that do not match.
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
            raise RuntimeError("an optimizer with ascent_sync belongs to its processes; copy its state_dict() instead.")
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
        """Without hooks and without the model; names and layers of the weights are known from before."""
        self._revive(dict(state), model=None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        # The model first, or its weights, copied through the base, would not be the copied model's.
        model = copy.deepcopy(self._model, memo)
        state = {k: copy.deepcopy(v, memo) for k, v in self.__getstate__().items() if k != "recipe"}
        new._revive({**state, "recipe": self.recipe}, model=model)
        return new

    def _revive(self, state: dict[str, Any], model: nn.Module | None) -> None:
        base, criterion = state.pop("base"), state.pop("criterion")
        remembered, known, recipe = state.pop("state"), state.pop("weights"), state.pop("recipe")
        self.__dict__.update(state)
        if not getattr(base, "param_groups", None):
            raise RuntimeError(
                f"{type(base).__name__} loses what it wraps when it is copied or pickled; copy its state_dict()."
            )
        self._own_generators = ()
        method_state = MethodState(recipe, self._seed, self._diagnoses)
        method_state.restore([w for group in base.param_groups for w in group["params"]], remembered)
        self._assemble(base, method_state, model, criterion)
        self._tools.weights.restore(known)
