"""BiSAM (Xie et al., ICML 2024): train.py of LIONS-EPFL/BiSAM."""

from __future__ import annotations

from dataclasses import dataclass

from flatmin.originals.project import Project, Translation, Value, idle, to_overrides, truth
from flatmin.originals.reader import choose

_METHODS = {"sam": "sam", "bisam_log": "bisam-log", "bisam_tanh": "bisam-tanh", "base": "sgd"}
_MODELS = {
    "resnet56": "resnet56",
    "wrn2810": "wrn28-10",
    "wrn282": "wrn28-2",
    "densenet121": "densenet121",
    "vgg19bn": "vgg19-bn",
}
_PRESETS = {"cifar10": "cifar10-resnet56", "cifar100": "cifar100-resnet56"}


@dataclass(frozen=True, kw_only=True)
class BisamFlags:
    """The flags of the script, with its defaults.

    Args:
        optim: "sam", "bisam_log", "bisam_tanh", or "base" (no ascent).
        adaptive: use ASAM's geometry.
        batch_size, epochs, learning_rate, momentum, weight_decay, rho, seed: as in flatmin.
        depth, width_factor, threads, valid: without effect.
        dropout: dropout of the wide networks.
        label_smoothing: s, with the target s / (K - 1) for each of the K - 1 other classes.
        model: network, a key of `_MODELS`. Default "resnet56".
        dataset: "cifar10" or "cifar100".
        mu, alpha: parameters of BiSAM; the script has mu = 1 for both forms.
        adam: use AdamW instead of SGD.
    """

    optim: str = "bisam_log"
    adaptive: bool = False
    batch_size: int = 128
    depth: int = 16
    dropout: float = 0.0
    epochs: int = 200
    label_smoothing: float = 0.1
    learning_rate: float = 0.1
    momentum: float = 0.9
    threads: int = 2
    rho: float = 0.05
    weight_decay: float = 5e-4
    width_factor: int = 8
    valid: bool = False
    model: str = "resnet56"
    dataset: str = "cifar10"
    mu: float = 1.0
    alpha: float = 0.1
    adam: bool = False
    seed: int = 42


def _rule(flags: BisamFlags, given: frozenset[str]) -> Translation:
    preset = choose("dataset", flags.dataset, _PRESETS)
    table: dict[str, Value] = {}
    notes = [*_method(flags, given, table), *_model(flags, given, table)]
    table |= {
        "epochs": flags.epochs,
        "batch_size": flags.batch_size,
        "lr": flags.learning_rate,
        "weight_decay": flags.weight_decay,
        "label_smoothing": flags.label_smoothing,
        "smoothing": "others",
        "seed": flags.seed,
        "precision": "float32",
    }
    if flags.adam:
        table["optimizer"] = "adamw"
        notes += idle(given, momentum="--adam uses AdamW, which has betas instead")
    else:
        table["momentum"] = flags.momentum
    if flags.dataset == "cifar100":
        table["statistics"] = "cifar10"
        notes.append(
            "CIFAR-100 is normalised with the mean and standard deviation of CIFAR-10, as in the script. The script "
            "reads them from files in ./dataa, and stops if these are missing."
        )
    return Translation(command=to_overrides(preset, table), notes=tuple(notes))


def _method(flags: BisamFlags, given: frozenset[str], table: dict[str, Value]) -> list[str]:
    method, notes = choose("optim", flags.optim, _METHODS), truth(given, flags, "adaptive")
    if method == "sgd":
        table["method"] = method
        reason = "there is no ascent"
        return [
            "--optim base stops the script with an error; here it trains with the base optimizer alone.",
            *idle(given, rho=reason, mu=reason, alpha=reason, adaptive=reason),
        ]
    adaptive = {"sam": "asam"}.get(method, f"asam+{method}") if flags.adaptive else method
    table |= {"method": adaptive, "rho": flags.rho}
    if method == "sam":
        return notes + idle(given, mu="it belongs to BiSAM", alpha="it belongs to BiSAM")
    table["mu"] = flags.mu
    if method == "bisam-log":
        return notes + idle(given, alpha="it belongs to bisam_tanh")
    table["alpha"] = flags.alpha
    if "mu" not in given:
        notes.append("mu is 1 by default, as in the script's flags; the script's function itself has the default 10.")
    return notes


def _model(flags: BisamFlags, given: frozenset[str], table: dict[str, Value]) -> list[str]:
    table["model"] = model = choose("model", flags.model, _MODELS)
    if not model.startswith("wrn"):
        notes = idle(given, dropout="the script uses it for the wide networks only")
        if model == "vgg19-bn":
            notes.append("The script's VGG has dropout before each hidden linear layer; flatmin's has it after.")
        return notes
    table["model.extra_block"] = True
    if flags.dropout:
        table["model.dropout"] = flags.dropout
    return [
        "model.extra_block=true: the script's wide networks have one more block per stage than their name says. Their "
        "last layer is initialised with zeros; flatmin's is not."
    ]


PROJECT = Project(
    name="bisam",
    script="train.py of LIONS-EPFL/BiSAM",
    paper="Xie et al., Improving SAM Requires Rethinking its Optimization Formulation, ICML 2024",
    flags=BisamFlags,
    rule=_rule,
    inert={
        "depth": "the script does not use it",
        "width_factor": "the script does not use it",
        "valid": "the script does not use it; a validation part is always held out",
        "threads": "images are augmented in whole batches, without loader processes",
    },
)
