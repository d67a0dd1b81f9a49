"""The optimizer wrapper: runs any recipe around any torch optimizer, in any training loop."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from flatmin.methods import Need, Radius, learning_rate
from flatmin.methods.compose import Recipe, compose
from flatmin.optim.amp import Scaling
from flatmin.optim.base_optimizer import (
    build_base,
    check_positive,
    check_rho,
    differentiates_gradients,
    hands_on_eps,
    has_momentum,
    momenta_of,
    needs_closure,
    rho_key,
    set_rho,
    takes_closure,
)
from flatmin.optim.checkpoint import VERSION, load, parts_of, save, unfilled
from flatmin.optim.copies import Copies
from flatmin.optim.criterion import Criterion, PassView
from flatmin.optim.diagnostics import Diagnostics
from flatmin.optim.distributed import AscentSync, Replicas, refuse_unserved
from flatmin.optim.guards import FrozenStatistics, OtherGradients, RandomState, generators_of
from flatmin.optim.imitated import reach_through
from flatmin.optim.perturb import Flags, Ledger
from flatmin.optim.program import Generators, Services, Site
from flatmin.optim.state import PREFIX, StateView, Store
from flatmin.optim.support import Loop, refusal
from flatmin.optim.tensors import Layout
from flatmin.optim.untrained import UntrainedState
from flatmin.optim.watch import ModelWatch

_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)
NonFinite = Literal["skip", "raise", "propagate"]


class SAM(Copies):
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
            Default: the geometry's own (`recipe.default_rho`; 0.05 for SAM, Foret et al. 2021). Around a base that has
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
        rho_key: the option of the param groups that holds the radius: "rho", or "flatmin.rho".

    Raises:
        ValueError, TypeError: bad rho, unknown or contradicting recipe, needs that this loop cannot serve.

    Source: Foret et al., Sharpness-Aware Minimization for Efficiently Improving Generalization, ICLR 2021, Alg. 1.
    """

    criterion: Criterion | None
    _flags: Flags | None
    _random: RandomState | None
    _layout: Layout
    _layers: dict[Tensor, str]
    _force_device_path: bool
    _unchecked_rounding: bool
    _frozen: bool
    rho_key: str

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
        if rho is not None:
            rho = check_rho(rho)
        if adaptive and recipe != "sam":
            raise ValueError(f"adaptive=True means the recipe 'asam'; got recipe={recipe!r} as well.")
        if nonfinite not in ("skip", "raise", "propagate"):
            raise ValueError(f"nonfinite must be 'skip', 'raise' or 'propagate', got {nonfinite!r}.")
        eps = None if eps is None else check_positive("eps", eps)
        self.clip_norm = None if clip_norm is None else check_positive("clip_norm", clip_norm)
        given = {"eps": eps, "model": model, "criterion": criterion, "clip_norm": clip_norm, "scaler": scaler}
        both = {k: v for k, v in given.items() if v is not None} | ({"seed": seed} if seed else {})
        self.base = build_base(params, base_optimizer, kwargs, both)
        self.nonfinite, self.eps = nonfinite, 1e-12 if eps is None or hands_on_eps(base_optimizer) else eps
        recipe = self._adaptive(recipe, adaptive, rho)
        self.recipe = compose(recipe) if isinstance(recipe, str) else recipe
        if not isinstance(self.recipe, Recipe):
            raise TypeError(f"recipe must be a name or a flatmin.Recipe, got {type(recipe).__name__}.")
        self.criterion = criterion
        self.ascent_sync = ascent_sync
        self._seed, self._freeze_batchnorm, self._replay_rng = seed, freeze_batchnorm, replay_rng
        self._lost_model = False
        self._freeze_state, self._own_generators = freeze_state, tuple(generators)
        self._diagnoses = diagnostics
        self._generators = Generators(seed)
        self._store = Store(self.recipe, diagnostics)
        self.rho_key = rho_key(self.base)
        self._runtime(model)
        set_rho(self.base, self.rho_key, rho, self.recipe.default_rho)
        self._init_group_state()
        self._check_needs()
        self.scaler = scaler

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        reach_through(cls)

    def _adaptive(self, recipe: Any, adaptive: bool, rho: float | None) -> Any:
        """The recipe that `adaptive`, also of single param groups, asks for."""
        asked = [group.get("adaptive", adaptive) for group in self.base.param_groups]
        if "adaptive" in self.base.defaults or not any(asked):
            return recipe
        if not isinstance(recipe, str) or "asam" not in recipe.split("+"):
            if recipe != "sam":
                raise ValueError(f"a param group with adaptive=True needs a recipe with 'asam'; got recipe={recipe!r}.")
            recipe = "asam"
        if not all(asked) and rho is None:
            raise ValueError("param groups differ in adaptive and share one norm: give rho=.")
        for group, one in zip(self.base.param_groups, asked, strict=True):
            group["adaptive"] = bool(one)
        return recipe

    # -- the base's attributes -----------------------------------------------------------------------------------

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
        return StateView(self.base, self._store) if self._store else self.base.state

    @property
    def base_optimizer(self) -> Optimizer:
        """The wrapped optimizer, by the name other implementations use."""
        return self.base

    @property
    def model(self) -> nn.Module | None:
        """The module being trained, as given at construction; may be set between updates, after unpickling for one."""
        return self._model

    @model.setter
    def model(self, model: nn.Module | None) -> None:
        self._refuse_second_update("a new model")
        self._attach(model)

    @property
    def scaler(self) -> Any:
        """The GradScaler of the loop, or None. May be set between updates."""
        return self._scaler

    @scaler.setter
    def scaler(self, scaler: Any) -> None:
        self._refuse_second_update("a new scaler")
        if scaler is not None and not all(hasattr(scaler, m) for m in ("scale", "unscale_", "step", "is_enabled")):
            raise TypeError(f"scaler must be a torch.amp.GradScaler, got {type(scaler).__name__}.")
        on = scaler is not None and scaler.is_enabled()
        if on and (why := refusal(self.recipe, Loop.SCALER)):
            raise ValueError(f"{self.recipe.name} {why}; use bfloat16 autocast, which needs no scaler.")
        weights = [w for g in self.param_groups for w in g["params"]]
        self._scaler, self._scaling = scaler, Scaling(scaler, weights[0].device) if on else None

    def __getattr__(self, name: str) -> Any:
        if name in _HOOKS:
            return self.base.__dict__[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients; see `torch.optim.Optimizer.zero_grad`."""
        if set_to_none and type(self.base).zero_grad is Optimizer.zero_grad:
            # Reading .grad first, as torch does, would make an object of every gradient only to drop it.
            for group in self.param_groups:
                for w in group["params"]:
                    w.grad = None
        else:
            self.base.zero_grad(set_to_none)
        if self._watch is not None:
            self._watch.clear()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base; it takes the default rho unless it sets one.

        Raises:
            RuntimeError: during an update.
            ValueError: bad rho.
        """
        self._refuse_second_update("add_param_group()")
        if self.rho_key in param_group:
            check_rho(param_group[self.rho_key])
        if param_group.get("adaptive") and not hasattr(self.recipe.geometry, "eta"):
            raise ValueError(f"a param group with adaptive=True needs a recipe with 'asam'; this is {self.recipe}.")
        self.base.add_param_group(param_group)
        self._regroup()

    # -- what updates use ----------------------------------------------------------------------------------------

    def _site(self, chunks: int = 1) -> Site:
        listed = [group["params"] for group in self.param_groups]
        if not self._layout.fits(listed):
            before, self._layout = self._layout, Layout(listed)
            self._regroup()
            if before.weights:
                self._remember_gradients()
        layout = self._layout
        groups: list[dict[str, Any]] = []
        rhos: list[float] = []
        for group, count in zip(self.param_groups, layout.trained, strict=True):
            groups += [group] * count
            rhos += [self._rho(group)] * count
        weights = layout.weights
        names = [self._names.get(w, "") for w in weights] if Need.NAMES in self.recipe.needs else []
        if PREFIX + "step" not in self.param_groups[0]:
            self._init_group_state()  # a checkpoint was loaded into the base itself
        step = int(self.param_groups[0][PREFIX + "step"])
        layers = [self._layers.get(w, "") for w in weights] if Need.LAYERS in self.recipe.needs else []
        services = Services(layers, functools.partial(momenta_of, self.base), chunks)
        return Site(weights, groups, rhos, names, step, self._generators, layout, services)

    def _rho(self, group: dict[str, Any]) -> float:
        if self.rho_key not in group:  # likewise
            group[self.rho_key] = self.base.defaults[self.rho_key]
        return check_rho(group[self.rho_key])

    def _regroup(self) -> None:
        """Follow a change of the param groups: a weight that left is forgotten, a new one is looked up in the model."""
        weights = [w for group in self.param_groups for w in group["params"]]
        self._store.keep_only(weights)
        for known, found in ((self._names, self._read_names()), (self._layers, self._read_layers())):
            kept = {w: known[w] for w in weights if w in known}
            known.clear()
            known.update({**kept, **found})
        self._look_at_the_rest()

    def _device_flags(self, tensors: Sequence[Tensor]) -> Flags | None:
        """The verdicts kept on these tensors' device; None on the CPU, where reading is free."""
        device = tensors[0].device if tensors else torch.device("cpu")
        if device.type == "cpu" and not self._force_device_path:
            return None
        if self._flags is None or self._flags.words.device != device:
            self._flags = Flags(device)
        return self._flags

    def _base_takes_found_inf(self) -> bool:
        """Whether the base can leave out a step by itself, so that the host need not know."""
        if not (
            type(self.base).__module__.startswith("torch.optim") and all(g.get("fused") for g in self.param_groups)
        ):
            return False
        if not isinstance(self.base, SGD):
            return True
        # It makes its momentum in a step that a found inf then leaves out, and takes it for filled in the next one.
        state = self.base.state
        return all(
            state.get(w, {}).get("momentum_buffer") is not None
            for group in self.param_groups
            if group["momentum"]
            for w in group["params"]
            if w.grad is not None
        )

    def _freeze(self) -> None:
        if self._statistics is not None and not self._frozen:
            self._statistics.__enter__()
            self._frozen = True
        if self._state is not None:
            self._state.hold()

    def _thaw(self) -> None:
        if self._statistics is not None and self._frozen:
            self._frozen = False
            self._statistics.__exit__(None, None, None)
        if self._state is not None:
            self._state.release()

    def _rewind(self) -> None:
        """Take back the random draws of an update that did not happen."""
        rng = self.param_groups[0].get(PREFIX + "rng")
        if isinstance(rng, Tensor):
            self._generators.cpu.set_state(rng)

    def _between_updates(self) -> None:
        """What is seen from here on belongs to the next update."""
        if self._watch is not None:
            bracketed = self._watch.bracketed
            self._watch.begin_update()
            if self._state is not None and not bracketed:
                self._state.begin()  # a loop that calls parts of the model may show no forward
        if self._random is not None:
            self._random.forget()
        self._remember_gradients()
        if self.criterion is not None:
            self.criterion.forget()
        if self._diagnostics is not None:
            self._diagnostics.turn_over()

    def _remember_gradients(self) -> None:
        """What the weights' gradients hold now is nothing that a closure would drop."""
        first = next((g for w in self._layout.weights if (g := w.grad) is not None), None)
        self._left = None if first is None else (weakref.ref(first), first._version)

    def _note(self, *, ascent_finite: bool, stepped: bool) -> None:
        group = self.param_groups[0]
        group[PREFIX + "step"] = int(group[PREFIX + "step"]) + 1
        if Need.RANDOM in self.recipe.needs:
            group[PREFIX + "rng"] = self._generators.cpu.get_state()
        radius = self.recipe.radius
        if type(radius).remember is not Radius.remember:
            for group in self.param_groups:
                group.update(radius.remember(group))
        if self._diagnostics is not None:
            self._diagnostics.keep()
        self._host_counts["updates"] += 1
        self._host_counts["nonfinite_ascents"] += not ascent_finite
        self._host_counts["skipped_steps"] += not stepped

    def current_pass(self) -> PassView:
        """The pass that a loss computed now belongs to; between updates it opens the next one."""
        update = self._update
        if update is None:
            return PassView("ascent" if self.recipe.moves and self.recipe.two_pass and self._moves() else "descent")
        if not update.inside or update.request is None:
            return PassView("descent")
        return PassView(update.request.role, update.request.at is not None, update.request.graph)

    def saw(self, outputs: Any, target: Any, loss: Tensor, *, perturbed: bool) -> None:
        """Told by the criterion of every loss computed in training."""
        if self._diagnostics is not None:
            ignored = None if self.criterion is None else self.criterion.ignored
            self._diagnostics.outputs(outputs, target, ignored, perturbed=perturbed)
            self._diagnostics.loss(loss, perturbed=perturbed)

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
        if self._diagnostics is None:
            raise RuntimeError("this optimizer records nothing; build it with diagnostics=True.")
        return self._diagnostics.read()

    def _moves(self) -> bool:
        return any(self._rho(g) > 0 for g in self.param_groups)

    def counts(self) -> dict[str, int]:
        """Updates, ascents not taken because their direction was not finite, and steps skipped, since construction.

        Reading synchronises; counting does not.
        """
        counts = dict(self._host_counts)
        if self._flags is not None:
            finite, found = self._flags.totals.tolist()
            counts["nonfinite_ascents"] += self._flags.ascents - finite
            counts["skipped_steps"] += found // Flags.ONE
        return counts

    # -- construction and checkpoints ------------------------------------------------------------------------------

    def _runtime(self, model: nn.Module | None) -> None:
        """Everything that is neither saved nor copied."""
        self._base_differentiates = differentiates_gradients(self.base)
        self._base_takes_closure, self._base_needs_closure = takes_closure(self.base), needs_closure(self.base)
        self._update = None
        self._ledger = Ledger()
        self._layout = Layout([])
        self._flags = None
        self._force_device_path = False
        self._frozen = False
        self._host_counts = {"updates": 0, "nonfinite_ascents": 0, "skipped_steps": 0}
        self.loss_point = "w"
        self._resident = False
        self._diagnostics = Diagnostics(self._store) if self._diagnoses else None
        self._scaler = self._scaling = None
        self._unchecked_rounding = True
        self._left = None  # the first gradient that the last update left behind, and its version
        self._warned: set[str] = set()
        self._attach(model)
        if self.criterion is not None:
            if not isinstance(self.criterion, Criterion):
                raise TypeError(
                    f"criterion must be a flatmin.Criterion, got {type(self.criterion).__name__}; wrap the loss in one."
                )
            self.criterion.bind(self, self.recipe)

    def _attach(self, model: nn.Module | None) -> None:
        """Take in the model; None: there is none."""
        self._lost_model &= model is None
        weights = [w for g in self.param_groups for w in g["params"]]
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
        own = [*self._own_generators, *(() if model is None else generators_of(model))]
        self._random = RandomState({w.device for w in weights}, own) if self._replay_rng else None
        self._model = model
        self._statistics: FrozenStatistics | None = None
        self._state: UntrainedState | None = None
        self._others: OtherGradients | None = None
        self._looks = 0  # updates in which a loss was asked, or may be, for further weights that it depends on
        self._watch: ModelWatch | None = None
        if model is not None:
            if not {id(p) for p in model.parameters()} & {id(w) for w in weights}:
                raise ValueError("model= holds none of the optimizer's parameters; pass the module being trained.")
            forget = getattr(self.criterion, "forget", None)
            self._watch = ModelWatch(model, self._random, weights, self._follow_model, forget)
            self._look_at_the_rest()
        self._replicas = Replicas(self.ascent_sync, model, self.recipe)
        self._names = self._read_names()
        self._layers = self._read_layers()

    def _look_at_the_rest(self) -> None:
        """Find what the model has beside the weights of this optimizer."""
        if self._model is None or self._watch is None:
            self._others, self._looks = None, 0  # one of them may have joined the optimizer
            return
        weights = [w for group in self.param_groups for w in group["params"]]
        self._watch.weights = weights
        self._families = [(m._modules, list(m._modules.values())) for m in self._model.modules() if m._modules]
        if self._freeze_batchnorm and not self._frozen:
            statistics = FrozenStatistics(self._model)
            self._statistics = statistics if statistics.layers else None
        self._others, self._looks = OtherGradients(self._model, weights) or None, 0
        if self._freeze_state:
            layers = () if self._statistics is None else self._statistics.layers
            self._state = UntrainedState(self._model, weights, layers, not self._freeze_batchnorm) or None
            self._watch.state = self._state
            if self._state is not None:
                self._state.begin()

    def _follow_model(self) -> None:
        """Look again at a model whose layers have been replaced since (SyncBatchNorm, quantisation)."""
        if self._model is not None and any(list(now.values()) != known for now, known in self._families):
            self._look_at_the_rest()

    def _read_names(self) -> dict[Tensor, str]:
        names: dict[Tensor, str] = {}
        if self._model is not None:
            names.update(plain_names(self._model))
        given = {
            w: _plain_name(n)
            for group in self.param_groups
            for w, n in zip(group["params"], group.get("param_names", ()), strict=False)
        }
        while given and all(n.startswith(_MODULE) for n in given.values()):
            given = {w: n.removeprefix(_MODULE) for w, n in given.items()}
        return {**names, **given}

    def _read_layers(self) -> dict[Tensor, str]:
        layers: dict[Tensor, str] = {}
        for module in () if self._model is None else self._model.modules():
            layers.update(dict.fromkeys(module.parameters(recurse=False), type(module).__name__))
        return layers

    def _init_group_state(self) -> None:
        """Counters live in the first group from the start: distributed checkpoints keep only groups and state."""
        first = self.base.param_groups[0]
        first[PREFIX + "version"], first[PREFIX + "recipe"] = VERSION, str(self.recipe)
        first[PREFIX + "parts"] = parts_of(self.recipe)
        first.setdefault(PREFIX + "step", 0)
        # Flattened distributed checkpoints look for the keys of the live group; `save` fills in the values.
        for key in self._store.scalars:
            first.setdefault(PREFIX + key, unfilled(first["params"]))
        for group in self.base.param_groups:
            for key, value in self.recipe.radius.marks.items():
                group.setdefault(key, value)
        if Need.RANDOM in self.recipe.needs:
            first[PREFIX + "rng"] = self._generators.cpu.get_state()

    def _check_needs(self) -> None:
        name, needs = self.recipe.name, self.recipe.needs
        weights = [w for g in self.param_groups for w in g["params"]]
        for part in self.recipe.parts.values():
            part.examine()
            if Need.LR in part.demands():
                for group in self.param_groups:
                    learning_rate(group, part)
        if Need.CRITERION in needs and self.criterion is None:
            raise ValueError(f"{name} needs {Need.CRITERION.value}, because it does more with it than descend.")
        if Need.PER_SAMPLE in needs:
            if self.criterion is None:
                raise ValueError(f"{name} needs {Need.PER_SAMPLE.value}.")
            self.criterion.check_per_sample()
        if Need.BASE_MOMENTUM in needs and not has_momentum(self.base):
            raise ValueError(
                f"{name} needs {Need.BASE_MOMENTUM.value}, and {type(self.base).__name__} is set up without: give it "
                "momentum > 0 or betas."
            )
        if Need.LAYERS in needs and (self._model is None or any(w not in self._layers for w in weights)):
            raise ValueError(f"{name} needs {Need.LAYERS.value}.")
        if Need.NAMES in needs and any(w not in self._names for w in weights):
            raise ValueError(f"{name} needs {Need.NAMES.value}.")
        refuse_unserved(self.recipe, weights)
        self._refuse_second_order_base()
        site = self._site()
        self.recipe.mask.select(site.context(range(len(site.weights))))

    def _refuse_second_order_base(self) -> None:
        if self._base_differentiates and self.recipe.ascends and self._moves():
            raise ValueError(
                f"{type(self.base).__name__} differentiates the gradients once more in its step, when the weights have "
                "left w + eps: it is a base with rho = 0 only (call optimizer.backward(loss), which keeps the graph)."
            )

    def state_dict(self) -> dict[str, Any]:
        """The base's checkpoint with the recipe's state in it, under keys "flatmin.<part>.<slot>" and in group 0.

        Holds no copy of the weights. Loads with `load_state_dict` and `torch.distributed.checkpoint`.

        Raises:
            RuntimeError: during an update.
        """
        self._refuse_second_update("state_dict()")
        return save(self.base, self._store)

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
        self._refuse_second_update("load_state_dict()")
        load(self.base, self._store, state_dict)
        rng = self.param_groups[0].get(PREFIX + "rng")
        if isinstance(rng, Tensor):
            self._generators.cpu.set_state(rng.to("cpu", torch.uint8))
        else:
            self._generators = Generators(self._seed)
        self._init_group_state()
        self._names = self._read_names()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.recipe}, base={self.base!r})"


_MODULE = "module."
# Levels that compilation, checkpointing, sharding and Fabric put into names.
_LEVELS = frozenset(
    {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module", "_original_module"}
)
# Modules that hold the user's own one as `module`.
_WRAPPERS = frozenset(
    {
        "AveragedModel",
        "DataParallel",
        "DeepSpeedEngine",
        "DistributedDataParallel",
        "FullyShardedDataParallel",
        "ShardedDataParallel",
    }
)


def plain_names(model: nn.Module) -> dict[Tensor, str]:
    """The parameters' names in the user's own module, without the levels of wrappers, however deep they are nested."""
    wrappers = {n for n, m in model.named_modules() if any(c.__name__ in _WRAPPERS for c in type(m).__mro__)}
    names: dict[Tensor, str] = {}
    for name, parameter in model.named_parameters():
        levels = name.split(".")
        own = [x for i, x in enumerate(levels) if not (x == "module" and ".".join(levels[:i]) in wrappers)]
        names[parameter] = _plain_name(".".join(own))
    return names


def _plain_name(name: str) -> str:
    return ".".join(level for level in name.split(".") if level not in _LEVELS)
