"""VaSSO (Li & Giannakis, NeurIPS 2023): train.py of BingcongLi/VaSSO."""

from __future__ import annotations

from dataclasses import dataclass

from flatmin.originals.project import Project, Translation, Value, idle, to_overrides
from flatmin.originals.reader import choose

_METHODS = {"": "sgd", "sam-": "sam", "vasso-": "vasso"}
_BASES = {"sgd": "sgd", "adam": "adamw", "adamw": "adamw"}
_OPTS = {ascent + base: (method, base) for ascent, method in _METHODS.items() for base in _BASES}
_MODELS = {
    **{f"resnet{depth}": f"resnet{depth}" for depth in (18, 34, 50, 101, 152)},
    **{f"wideresnet{depth}x10": f"wrn{depth}-10" for depth in (28, 34)},
    **{f"vgg{depth}_bn": f"vgg{depth}-bn" for depth in (11, 13, 16, 19)},
}
_ON_IMAGENET = {name: model for name, model in _MODELS.items() if name.startswith("resnet")}
_DATA = {
    "CIFAR10_base": "cifar10-wrn28-10",
    "CIFAR10_cutout": "cifar10-wrn28-10",
    "CIFAR100_base": "cifar100-wrn28-10",
    "CIFAR100_cutout": "cifar100-wrn28-10",
    "ImageNet_base": "imagenet-resnet50",
}
_SCHEDULES = {"CosineLRscheduler": "cosine", "MultiStepLRscheduler": "multistep"}
_EPS = 1e-8  # of torch's AdamW


@dataclass(frozen=True, kw_only=True)
class VassoFlags:
    """The flags of the script, with its defaults.

    Args:
        opt: "sgd", "adam" or "adamw", with "sam-" or "vasso-" before it.
        dataset, datadir: a key of the table above, and where it is.
        model: "resnet18", ..., "wideresnet28x10", "wideresnet34x10", "vgg11_bn", ..., "vgg19_bn".
        rho: radius.
        theta: share of the new gradient in VaSSO's average.
        lr, weight_decay, momentum, nesterov, batch_size, epochs, seed: as our own.
        betas, eps: of AdamW; None: torch's.
        num_workers: processes that read ImageNet.
        pin_memory, distributed_val, dist_url, output_dir, output_name: of no effect.
        drop_last: leave out the last, smaller batch of an epoch.
        start_epoch: refused unless 0.
        warmup_epoch, warmup_init_lr: linear warm-up.
        lr_scheduler: "CosineLRscheduler" (with `eta_min`) or "MultiStepLRscheduler" (with `milestone` and `gamma`).
        log_freq: updates between lines.
        resume, resume_path: refused: the script's checkpoints are not ours.
        wandb, wandb_project, wandb_name: of the tracker.
    """

    opt: str = "sgd"
    dataset: str = "CIFAR10_base"
    datadir: str = "./datasets"
    model: str = "resnet18"
    rho: float = 0.05
    theta: float = 0.9
    lr: float = 0.05
    weight_decay: float = 5e-4
    momentum: float = 0.9
    nesterov: bool = False
    betas: tuple[float, ...] | None = None
    eps: float | None = None
    batch_size: int = 128
    num_workers: int = 8
    pin_memory: bool = True
    drop_last: bool = True
    distributed_val: bool = False
    epochs: int = 200
    start_epoch: int = 0
    warmup_epoch: int = 0
    warmup_init_lr: float = 0.0
    lr_scheduler: str = "CosineLRscheduler"
    eta_min: float = 0.0
    milestone: tuple[int, ...] = (60, 120, 160)
    gamma: float = 0.2
    seed: int = 1234
    log_freq: int = 10
    output_dir: str = "logs"
    output_name: str | None = None
    resume: bool = False
    resume_path: str = "."
    wandb: bool = False
    wandb_project: str = "VASSO"
    wandb_name: str = "Default"
    dist_url: str = "env://"


def _rule(flags: VassoFlags, given: frozenset[str]) -> Translation:
    if flags.resume or "resume_path" in given:
        raise ValueError("--resume and --resume_path name a checkpoint of the script, which flatmin cannot read.")
    if flags.start_epoch:
        raise ValueError(
            f"--start_epoch expects 0, got {flags.start_epoch}: a schedule that begins later is not offered."
        )
    preset = choose("dataset", flags.dataset, _DATA)
    table: dict[str, Value] = {}
    notes = [
        *_method(flags, given, table),
        *_data(flags, given, table),
        *_base(flags, given, table),
        *_schedule(flags, given, table),
    ]
    if "log_freq" in given:
        table["log_every"] = flags.log_freq
    if flags.wandb:
        table |= {"trackers": "wandb", "project": flags.wandb_project}
    else:
        notes += idle(given, wandb_project="--wandb is not given")
    table["precision"] = "float32"
    return Translation(command=to_overrides(preset, table), notes=tuple(notes))


def _method(flags: VassoFlags, given: frozenset[str], table: dict[str, Value]) -> list[str]:
    method, base = choose("opt", flags.opt, _OPTS)
    table["method"] = method
    notes = []
    if base != "sgd":
        table["optimizer"] = _BASES[base]
        notes.append(
            f"--opt {flags.opt} stops the script with an error; here it trains with AdamW, the one Adam that the "
            "script knows (--set optimizer=adam for the other)."
        )
    if method == "sgd":
        return notes + idle(given, rho="there is no ascent", theta="there is no ascent")
    table["rho"] = flags.rho
    if method == "vasso":
        table["theta"] = flags.theta
    else:
        notes += idle(given, theta="it belongs to vasso")
    table["freeze_batchnorm"] = False
    return notes


def _data(flags: VassoFlags, given: frozenset[str], table: dict[str, Value]) -> list[str]:
    imagenet = flags.dataset == "ImageNet_base"
    table["model"] = model = choose("model", flags.model, _ON_IMAGENET if imagenet else _MODELS)
    notes = ["selection=max-test: the script trains on all images and reports its best epoch on the test part."]
    if model.startswith("vgg"):
        table["model.hidden"] = 4096
    if imagenet:
        table |= {"workers": flags.num_workers, "label_smoothing": 0.0}
    else:
        notes += idle(given, num_workers="images are augmented in whole batches, without processes that load them")
        if flags.dataset.endswith("_base"):
            table["cutout"] = 0
    if flags.dataset.startswith("CIFAR100"):
        table["statistics"] = "cifar10"
        notes.append("CIFAR-100 is normalised with the mean and deviation of CIFAR-10, as in the script.")
    table |= {
        "data_dir": flags.datadir,
        "train_on_val": True,
        "selection": "max-test",
        "epochs": flags.epochs,
        "batch_size": flags.batch_size,
        "drop_last": flags.drop_last,
        "seed": flags.seed,
    }
    return notes


def _base(flags: VassoFlags, given: frozenset[str], table: dict[str, Value]) -> list[str]:
    table |= {"lr": flags.lr, "weight_decay": flags.weight_decay}
    if "optimizer" not in table:
        table |= {"momentum": flags.momentum, "nesterov": flags.nesterov}
        return idle(given, betas="SGD has none", eps="SGD has none")
    if flags.betas is not None:
        table["betas"] = flags.betas
    if flags.eps not in (None, _EPS):
        raise ValueError(f"--eps expects {_EPS:g}, that of torch's AdamW, which is fixed here; got {flags.eps!r}.")
    return idle(given, momentum="AdamW has betas", nesterov="AdamW has betas")


def _schedule(flags: VassoFlags, given: frozenset[str], table: dict[str, Value]) -> list[str]:
    schedule = choose("lr_scheduler", flags.lr_scheduler, _SCHEDULES)
    notes = idle(given, warmup_init_lr="there is no warm-up") if not flags.warmup_epoch else []
    table["warmup"] = flags.warmup_epoch if flags.warmup_epoch > 1 else 0
    if flags.warmup_epoch > 1:
        table["warmup_lr"] = flags.warmup_init_lr
        notes.append("The script's warm-up begins after a first epoch at the full rate; ours begins with the first.")
    elif flags.warmup_epoch == 1:
        notes.append("--warmup_epoch 1 is left out: a warm-up of one epoch ends where it begins.")
    if schedule == "cosine":
        table |= {"schedule": schedule, "lr_min": flags.eta_min}
        notes += idle(given, milestone="it belongs to MultiStepLRscheduler", gamma="it belongs to MultiStepLRscheduler")
        notes.append("The script gives each epoch but the first the rate of the epoch before it; ours does not.")
        return notes
    if any(a >= b for a, b in zip((-1, *flags.milestone), flags.milestone, strict=False)):
        raise ValueError(f"--milestone expects rising epochs from 0, got {' '.join(map(str, flags.milestone))!r}.")
    late = tuple(epoch + 2 for epoch in flags.milestone if epoch + 2 < flags.epochs)
    table |= {"schedule": schedule, "milestones": late, "gamma": flags.gamma} if late else {"schedule": "constant"}
    notes.append("A rate that drops at milestone m drops two epochs later in the script, and here.")
    return notes + idle(given, eta_min="it belongs to CosineLRscheduler")


PROJECT = Project(
    name="vasso",
    script="train.py of BingcongLi/VaSSO",
    paper="Li & Giannakis, Enhancing Sharpness-Aware Optimization Through Variance Suppression, NeurIPS 2023",
    flags=VassoFlags,
    rule=_rule,
    inert={
        "pin_memory": "small images stay on the device",
        "distributed_val": "all processes evaluate",
        "dist_url": "torchrun tells the processes of each other",
        "output_dir": "runs are kept in the folder of --out",
        "output_name": "a run is named by its settings",
        "wandb_name": "a run is named by its settings",
    },
)
