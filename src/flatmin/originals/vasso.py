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
        opt: "sgd", "adam" or "adamw", alone or after "sam-" or "vasso-".
        dataset: data set, a key of `_DATA`.
        datadir: folder of the data.
        model: "resnet18", ..., "wideresnet28x10", "wideresnet34x10", "vgg11_bn", ..., "vgg19_bn".
        rho: radius.
        theta: weight of the new gradient in VaSSO's average.
        lr, weight_decay, momentum, nesterov, batch_size, epochs, seed: as in flatmin.
        betas, eps: parameters of AdamW; None: torch's defaults.
        num_workers: number of processes that read ImageNet.
        pin_memory, distributed_val, dist_url, output_dir, output_name: without effect.
        drop_last: leave out the last, smaller batch of an epoch.
        start_epoch: must be 0.
        warmup_epoch, warmup_init_lr: length of the linear warm-up in epochs, and its first learning rate.
        lr_scheduler: "CosineLRscheduler" (with `eta_min`) or "MultiStepLRscheduler" (with `milestone` and `gamma`).
        log_freq: number of updates between log lines.
        resume, resume_path: not supported, because flatmin cannot read the script's checkpoints.
        wandb, wandb_project, wandb_name: log to Weights & Biases, with its project and name.
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
        raise ValueError(
            "--resume and --resume_path name a checkpoint of the script, which flatmin cannot read; leave them out."
        )
    if flags.start_epoch:
        raise ValueError(
            f"--start_epoch expects 0, got {flags.start_epoch}: starting a schedule at a later epoch is not supported."
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
            f"--opt {flags.opt} stops the script with an error; here it trains with AdamW, the only Adam variant in "
            "the script (for Adam: --set optimizer=adam)."
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
    notes = [
        "selection=max-test: the script trains on all training images and reports the best epoch on the test part."
    ]
    if model.startswith("vgg"):
        table["model.hidden"] = 4096
    if imagenet:
        table |= {"workers": flags.num_workers, "label_smoothing": 0.0}
    else:
        notes += idle(given, num_workers="images are augmented in whole batches, without loader processes")
        if flags.dataset.endswith("_base"):
            table["cutout"] = 0
    if flags.dataset.startswith("CIFAR100"):
        table["statistics"] = "cifar10"
        notes.append("CIFAR-100 is normalised with the mean and standard deviation of CIFAR-10, as in the script.")
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
        return idle(given, betas="SGD does not use it", eps="SGD does not use it")
    if flags.betas is not None:
        table["betas"] = flags.betas
    if flags.eps not in (None, _EPS):
        raise ValueError(f"--eps expects {_EPS:g}, the fixed value of torch's AdamW; got {flags.eps!r}.")
    return idle(given, momentum="AdamW has betas instead", nesterov="AdamW has betas instead")


def _schedule(flags: VassoFlags, given: frozenset[str], table: dict[str, Value]) -> list[str]:
    schedule = choose("lr_scheduler", flags.lr_scheduler, _SCHEDULES)
    notes = idle(given, warmup_init_lr="there is no warm-up") if not flags.warmup_epoch else []
    table["warmup"] = flags.warmup_epoch if flags.warmup_epoch > 1 else 0
    if flags.warmup_epoch > 1:
        table["warmup_lr"] = flags.warmup_init_lr
        notes.append(
            "The script's warm-up begins after a first epoch at the full learning rate; flatmin's begins with the "
            "first epoch."
        )
    elif flags.warmup_epoch == 1:
        notes.append("--warmup_epoch 1 is left out, because a warm-up of one epoch has no effect.")
    if schedule == "cosine":
        table |= {"schedule": schedule, "lr_min": flags.eta_min}
        notes += idle(given, milestone="it belongs to MultiStepLRscheduler", gamma="it belongs to MultiStepLRscheduler")
        notes.append(
            "In the script, every epoch after the first uses the learning rate of the epoch before; flatmin does not "
            "do this."
        )
        return notes
    if any(a >= b for a, b in zip((-1, *flags.milestone), flags.milestone, strict=False)):
        raise ValueError(
            f"--milestone expects epochs from 0 in increasing order, got {' '.join(map(str, flags.milestone))!r}."
        )
    late = tuple(epoch + 2 for epoch in flags.milestone if epoch + 2 < flags.epochs)
    table |= {"schedule": schedule, "milestones": late, "gamma": flags.gamma} if late else {"schedule": "constant"}
    notes.append("In the script, the learning rate drops two epochs after each milestone; flatmin does the same.")
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
        "dist_url": "torchrun connects the processes",
        "output_dir": "runs are stored in the folder of --out",
        "output_name": "the name of a run is derived from its settings",
        "wandb_name": "the name of a run is derived from its settings",
    },
)
