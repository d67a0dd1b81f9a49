"""The empirical study (Luong, 2024): sam_hessian/train.py of lhchau/empirical-sam."""

from __future__ import annotations

from dataclasses import dataclass

from flatmin.originals.project import Project, Translation, Value, idle, to_overrides, truth
from flatmin.originals.reader import choose

# Optimizer and radius in the script's two settings files; the default radius of the script's SAM class is 0.05.
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
    "--opt_name {name}: contrary to its name, the script's code keeps SAM's {kept} and the plain gradient's {other}; "
    "in flatmin this is {method}."
)


@dataclass(frozen=True, kw_only=True)
class EmpiricalFlags:
    """The flags of the script, with its defaults; None means the value in the settings file.

    Args:
        experiment: settings file: "default" (SGD) or "default_sam" (SAM with radius 0.2); the script's own default does
            not exist.
        rho: radius, or the factor of SGDHESS.
        wd: weight decay; 5e-4 in both files.
        model_name: "resnet18", ..., "wrn28_10"; "resnet18" in both files.
        opt_name: "sgd", "sam", "samdirection", "sammagnitude" or "samhess" (SGDHESS).
        adaptive: use ASAM's geometry.
        project_name: project of the tracker.
        framework_name: tracker: "tensorboard" or "wandb".
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
        raise ValueError(f"--experiment is missing; it must be one of {', '.join(_EXPERIMENTS)}.")
    usual, rho = choose("experiment", flags.experiment, _EXPERIMENTS)
    name = flags.opt_name or usual
    method = choose("opt_name", name, _METHODS)
    table: dict[str, Value] = {"method": method}
    notes = truth(given, flags, "adaptive") if method.startswith("sam") else []
    if method == "sgd":
        notes.append("--opt_name sgd stops the script with an error in its first update; here it trains.")
        notes += idle(given, rho="SGD has no radius", adaptive="SGD has no ascent")
    else:
        table["rho"] = rho if flags.rho is None else flags.rho
    if method == "sgdhess":
        notes.append(
            "--opt_name samhess stops the script with an error, because its loop does not keep the graph of the "
            "gradient; here it is SGDHESS with the curvature of the script's class, |H z| averaged over kernels."
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
        notes.append(
            "The script initialises the BatchNorm weights of its WRN from (0, 1); flatmin initialises them with 1."
        )
    notes += _tracking(flags, given, table)
    notes.append("The script augments its validation images; flatmin does not.")
    return Translation(command=to_overrides("cifar100-resnet18", table), notes=tuple(notes))


def _tracking(flags: EmpiricalFlags, given: frozenset[str], table: dict[str, Value]) -> list[str]:
    if flags.framework_name is None:
        notes = ["The script writes TensorBoard files; here this is optional: --set trackers=tensorboard."]
        return notes + idle(given, project_name="there is no tracker")
    table["trackers"] = tracker = choose("framework_name", flags.framework_name, _FRAMEWORKS)
    if flags.project_name is not None:
        table["project"] = flags.project_name
    return ["The script measures eigenvalues at the end; here, use flatmin measure RUN."] if tracker == "wandb" else []


PROJECT = Project(
    name="empirical",
    script="sam_hessian/train.py of lhchau/empirical-sam",
    paper="Luong, Empirical Study on Sharpness-Aware Minimization, 2024",
    flags=EmpiricalFlags,
    rule=_rule,
)
