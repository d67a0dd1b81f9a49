"""The convergence paper (Khanh et al., NeurIPS 2024): fundamental_sam/train_sam.py of lhchau/fundamental-sam."""

from __future__ import annotations

from dataclasses import dataclass

from flatmin.originals.project import Project, Translation, Value, to_overrides
from flatmin.words import suggest

_MODELS = {"resnet18": "resnet18", "resnet34": "resnet34", "wrn28_10": "wrn28-10"}
_RATES = {"constant_01": 0.1, "constant_001": 0.01, "constant_0001": 0.001}
_DIMINISH = ("diminish1", "diminish2", "diminish3")
_PRESETS = {
    "cifar10": "cifar10-resnet18",
    "cifar100": "cifar100-resnet18",
    "tiny_imagenet": "tiny-imagenet-resnet18",
}


def _stems() -> dict[str, tuple[str, str, str]]:
    """Data, network and schedule of each settings file, by its name."""
    stems = {}
    for data in _PRESETS:
        for model in _MODELS:
            for schedule in (*_RATES, *_DIMINISH):
                small = data != "tiny_imagenet" or schedule in ("constant_001", *_DIMINISH)
                if small or (model, schedule) == ("resnet18", "constant_01"):
                    stems[f"{data}_{model}_sam_{schedule}"] = (data, model, schedule)
    return stems


STEMS = _stems()
# Settings in which two of the files differ from all others.
_OWN: dict[str, dict[str, Value]] = {
    "cifar10_resnet18_sam_constant_0001": {"seed": 43},
    "tiny_imagenet_resnet18_sam_constant_01": {"epochs": 90},
}


@dataclass(frozen=True, kw_only=True)
class FundamentalFlags:
    """The script's one flag.

    Args:
        experiment: settings file, a key of `STEMS`; the script's own default does not exist.
    """

    experiment: str = "example"


def _rule(flags: FundamentalFlags, given: frozenset[str]) -> Translation:
    if "experiment" not in given:
        raise ValueError(
            f"--experiment is missing; it must be one of the script's {len(STEMS)} settings files, such as "
            f"{next(iter(STEMS))}."
        )
    if flags.experiment not in STEMS:
        near = suggest(flags.experiment, STEMS)
        raise ValueError(
            f"--experiment expects one of the script's {len(STEMS)} settings files, DATA_NETWORK_sam_SCHEDULE without "
            f"folder and ending, got {flags.experiment!r}{near}"
        )
    data, network, schedule = STEMS[flags.experiment]
    table: dict[str, Value] = {"method": "sam", "rho": 0.05, "model": _MODELS[network]}
    if network != "wrn28_10":
        table["model.max_pool"] = True
    table |= {"batch_size": 128, "momentum": 0.0, "weight_decay": 1e-3}
    table |= _schedule(schedule)
    table |= _OWN.get(flags.experiment, {})
    if data != "tiny_imagenet":
        table["statistics"] = "cifar10"
    table["precision"] = "float32"
    return Translation(command=to_overrides(_PRESETS[data], table), notes=tuple(_notes(flags.experiment)))


def _schedule(name: str) -> dict[str, Value]:
    if name in _RATES:
        return {"schedule": "constant", "lr": _RATES[name]}
    return {"schedule": name, "lr": 0.1, "as_coded": True}


def _notes(stem: str) -> list[str]:
    data, _, schedule = STEMS[stem]
    notes = []
    if schedule in ("diminish2", "diminish3"):
        notes.append("The script's schedule is one epoch late; --set as_coded=false uses the paper's formula.")
    for key, value in _OWN.get(stem, {}).items():
        notes.append(f"Only this settings file has {key}={value}.")
    if data == "tiny_imagenet":
        notes.append(
            "The script selects the epoch on the official validation part and tests on images without labels; here the "
            "epoch is selected on a tenth of the training part, and the official validation part is the test part."
        )
    else:
        notes.append(
            "The script augments its validation images; flatmin does not. The script normalises with CIFAR-10's mean "
            "and standard deviations of 0.2023, 0.1994 and 0.2010; flatmin uses 0.2470, 0.2435 and 0.2616."
        )
    return [*notes, "The script needs wandb; here this is optional: --set trackers=wandb."]


PROJECT = Project(
    name="fundamental",
    script="fundamental_sam/train_sam.py of lhchau/fundamental-sam",
    paper="Khanh et al., Fundamental Convergence Analysis of Sharpness-Aware Minimization, NeurIPS 2024",
    flags=FundamentalFlags,
    rule=_rule,
)
