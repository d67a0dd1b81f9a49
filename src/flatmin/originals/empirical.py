"""The empirical study (Luong, 2024): sam_hessian/train.py of lhchau/empirical-sam."""

from __future__ import annotations

from dataclasses import dataclass

from flatmin.originals.project import Project, Translation, Value, idle, to_overrides, truth
from flatmin.originals.reader import choose

# optimizer and radius of the script's two files of settings; the class's own radius is 0.05
_EXPERIMENTS = {"default": ("sgd", 0.05), "default_sam": ("sam", 0.2)}
_METHODS = {
    "sgd": "sgd",
    "sam": "sam",
    "samdirection": "sam-magnitude",
    "sammagnitude": "sam-direction",
    "samhess": "sgdhess",
}
_MODELS = {f"resnet{depth}": f"resnet{depth}" for depth in (18, 34, 50, 101, 152)} | {"wrn28_10": "wrn28-10"}
_FRAMEWORKS = {"tensorboard": "tensorboard", "wandb": "wandb"}
_SWAPPED = (
    "--opt_name {name}: in the code this keeps SAM's {kept} and the plain gradient's {other}, the other way round than "
    "it is called; ours is named for what it keeps: {method}."
)


@dataclass(frozen=True, kw_only=True)
class EmpiricalFlags:
    """The flags of the script, with its defaults; None takes what the file of settings has.

    Args:
        experiment: "default" (SGD) or "default_sam" (SAM with radius 0.2); the script's own default names no file.
        rho: radius, or SGDHESS's factor.
        wd: weight decay; 5e-4 in both files.
        model_name: "resnet18", ..., "wrn28_10"; "resnet18" in both files.
        opt_name: "sgd", "sam", "samdirection", "sammagnitude" or "samhess", which is SGDHESS.
        adaptive: ASAM's geometry.
        project_name, framework_name: of the tracker, "tensorboard" or "wandb".
    """

    experiment: str = "example"
    rho: float | None = None
    wd: float | None = None
    model_name: str | None = None
    opt_name: str | None = None
    adaptive: bool | None = None
    project_name: str | None = None
    framework_name: str | None = None


def _rule(flags: EmpiricalFlags, given: frozenset[str]) -> Translation:
    if "experiment" not in given:
        raise ValueError(f"--experiment is needed: expected one of {', '.join(_EXPERIMENTS)}, and there is none.")
    usual, rho = choose("experiment", flags.experiment, _EXPERIMENTS)
    name = flags.opt_name or usual
    method = choose("opt_name", name, _METHODS)
    table: dict[str, Value] = {"method": method}
    notes = truth(given, flags, "adaptive") if method.startswith("sam") else []
    if method == "sgd":
        notes.append("The script's sgd stops with an error in its first update; here it trains.")
        notes += idle(given, rho="SGD has no radius", adaptive="SGD has no ascent")
    else:
        table["rho"] = rho if flags.rho is None else flags.rho
    if method == "sgdhess":
        notes.append(
            "The script's samhess stops with an error, as its loop keeps no graph of the gradient; here it is SGDHESS "
            "with the curvature of that class, |H z| averaged over kernels."
        )
        notes += idle(given, adaptive="SGDHESS has no ascent")
    elif flags.adaptive and method != "sgd":
        table["method"] = "asam" if method == "sam" else f"asam+{method}"
    if method in ("sam-magnitude", "sam-direction"):
        part = method.removeprefix("sam-")
        other = "direction" if part == "magnitude" else "magnitude"
        notes.append(_SWAPPED.format(name=name, kept=part, other=other, method=method))
    model = choose("model_name", flags.model_name or "resnet18", _MODELS)
    table |= {
        "weight_decay": 5e-4 if flags.wd is None else flags.wd,
        "model": model,
        "precision": "float32",
    }
    if model == "wrn28-10":
        notes.append("The script's WRN begins with BatchNorm weights drawn from (0, 1), ours with 1.")
    notes += _tracking(flags, given, table)
    notes.append("The script augments its validation images; ours are left as they are.")
    return Translation(command=to_overrides("cifar100-resnet18", table), notes=tuple(notes))


def _tracking(flags: EmpiricalFlags, given: frozenset[str], table: dict[str, Value]) -> list[str]:
    if flags.framework_name is None:
        notes = ["The script writes TensorBoard's files; here they are an option: --set trackers=tensorboard."]
        return notes + idle(given, project_name="no tracker is given")
    table["trackers"] = tracker = choose("framework_name", flags.framework_name, _FRAMEWORKS)
    if flags.project_name is not None:
        table["project"] = flags.project_name
    return ["The script measures eigenvalues at the end; here: flatmin measure RUN."] if tracker == "wandb" else []


PROJECT = Project(
    name="empirical",
    script="sam_hessian/train.py of lhchau/empirical-sam",
    paper="Luong, Empirical Study on Sharpness-Aware Minimization, 2024",
    flags=EmpiricalFlags,
    rule=_rule,
)
