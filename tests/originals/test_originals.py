"""The command lines of the original projects, against configurations written by hand and those of our studies."""

import math
import shlex

import pytest
import torch

from flatmin.models.zoo import MODELS
from flatmin.originals import bisam, empirical, fundamental, vasso
from flatmin.originals.project import check
from flatmin.originals.projects import PROJECTS
from flatmin.study.expand import grid_points
from flatmin.study.reading import read_study
from flatmin.train.config import RunConfig, identity
from flatmin.train.settings import content_hash
from flatmin.train.trainer import build_schedule


def translated(project, line=""):
    return PROJECTS[project].translate(shlex.split(line))


def config(project, line="", *words):
    return check(translated(project, line).with_overrides([*words, "device=cpu"]).command)


# -- what the projects' own pages and scripts run ------------------------------------------------------------------

CIFAR = {"epochs": 200, "momentum": 0.9, "cutout": 16, "cutout_p": 0.5, "split_seed": 42, "channels_last": True}
BISAM = CIFAR | {"lr": 0.1, "weight_decay": 5e-4, "batch_size": 128, "label_smoothing": 0.1, "smoothing": "others"}
EMPIRICAL = CIFAR | {"lr": 0.1, "batch_size": 256, "data": "cifar100", "model": "resnet18", "seed": 42}
VASSO = CIFAR | {
    **{"batch_size": 128, "drop_last": True, "train_on_val": True, "selection": "max-test", "data_dir": "./datasets"},
}
SCRIPT = "python train.py --opt {} --dataset CIFAR100_cutout --seed 3107 --lr 0.1 --weight_decay 1e-3 "
SCRIPT += "--model wideresnet28x10 --rho 0.2"
WRN = VASSO | {"data": "cifar100", "statistics": "cifar10", "model": "wrn28-10", "seed": 3107, "lr": 0.1}
WRN |= {"weight_decay": 1e-3, "rho": 0.2, "freeze_batchnorm": False}
README = "--experiment=default_sam {} --rho=0.2 --wd=0.001 --project_name=CIFAR100-SAM --framework_name=wandb"
SAMS = EMPIRICAL | {"rho": 0.2, "weight_decay": 1e-3}

EXPECTED = [
    (
        "bisam",
        "python train.py --optim bisam_log --rho 0.05 --epochs 200 --learning_rate 0.1 --model resnet56 "
        "--dataset cifar10",
        BISAM
        | {"method": "bisam-log", "rho": 0.05, "params": {"objective.mu": 1}, "model": "resnet56", "seed": 42}
        | {"data": "cifar10"},
    ),
    (
        "bisam",
        "--optim bisam_tanh --dataset cifar100 --model wrn282 --mu 10 --dropout 0.3 --adaptive True --seed 7",
        BISAM
        | {"method": "asam+bisam-tanh", "rho": 0.05, "params": {"objective.mu": 10, "objective.alpha": 0.1}}
        | {"model": "wrn28-2", "model_params": {"extra_block": True, "dropout": 0.3}, "data": "cifar100", "seed": 7}
        | {"statistics": "cifar10"},
    ),
    (
        "bisam",
        "--optim sam --adam --learning_rate 1e-3 --label_smoothing 0 --model vgg19bn",
        BISAM
        | {"method": "sam", "rho": 0.05, "optimizer": "adamw", "lr": 1e-3, "label_smoothing": 0.0}
        | {"model": "vgg19-bn", "data": "cifar10", "seed": 42},
    ),
    ("empirical", f"python sam_hessian/train.py {README.format('')}", SAMS | {"method": "sam"}),
    ("empirical", README.format("--opt_name=samdirection"), SAMS | {"method": "sam-magnitude"}),
    ("empirical", README.format("--opt_name=sammagnitude"), SAMS | {"method": "sam-direction"}),
    (
        "empirical",
        "--experiment default --opt_name samhess --rho 2 --model_name wrn28_10",
        EMPIRICAL | {"method": "sgdhess", "rho": 2.0, "weight_decay": 5e-4, "model": "wrn28-10"},
    ),
    ("empirical", "--experiment default", EMPIRICAL | {"method": "sgd", "weight_decay": 5e-4}),
    (
        "empirical",
        "--experiment default --opt_name samdirection --adaptive True",
        EMPIRICAL | {"method": "asam+sam-magnitude", "rho": 0.05, "weight_decay": 5e-4},
    ),
    ("vasso", SCRIPT.format("sam-sgd"), WRN | {"method": "sam"}),
    (
        "vasso",
        f"CUDA_VISIBLE_DEVICES=0 {SCRIPT.format('vasso-sgd')} --theta 0.9",
        WRN | {"method": "vasso", "params": {"direction.theta": 0.9}},
    ),
    (
        "vasso",
        "python train.py --model resnet18 --dataset CIFAR10_cutout --datadir there --opt sgd --lr 0.05 "
        "--weight_decay 5e-4 --seed 3107",
        VASSO
        | {"method": "sgd", "data": "cifar10", "model": "resnet18", "lr": 0.05, "weight_decay": 5e-4}
        | {"seed": 3107, "data_dir": "there"},
    ),
    (
        "vasso",
        "python train.py --model resnet18 --dataset CIFAR10_cutout --opt vasso-sgd --weight_decay 1e-3",
        VASSO
        | {"method": "vasso", "rho": 0.05, "params": {"direction.theta": 0.9}, "data": "cifar10", "lr": 0.05}
        | {"model": "resnet18", "weight_decay": 1e-3, "seed": 1234, "freeze_batchnorm": False},
    ),
    (
        "vasso",
        "--opt vasso-adam --betas 0.9 0.99 --model vgg11_bn --lr 1e-3 --drop_last False",
        VASSO
        | {"method": "vasso", "rho": 0.05, "params": {"direction.theta": 0.9}, "data": "cifar10", "cutout": 0}
        | {"optimizer": "adamw", "betas": (0.9, 0.99), "lr": 1e-3, "weight_decay": 5e-4, "model": "vgg11-bn"}
        | {"model_params": {"hidden": 4096}, "seed": 1234, "freeze_batchnorm": False, "drop_last": False},
    ),
    (
        "vasso",
        "--nesterov --lr_scheduler MultiStepLRscheduler --milestone 3 5 --gamma 0.5 --epochs 6",
        VASSO
        | {"method": "sgd", "nesterov": True, "data": "cifar10", "model": "resnet18", "cutout": 0, "lr": 0.05}
        | {"weight_decay": 5e-4, "seed": 1234, "schedule": "multistep", "milestones": (5,), "gamma": 0.5, "epochs": 6},
    ),
    (
        "vasso",
        "--dataset ImageNet_base --model resnet50 --warmup_epoch 5 --warmup_init_lr 0.01 --num_workers 3 "
        "--eta_min 1e-3",
        {"method": "sgd", "data": "imagenet", "model": "resnet50", "model_params": {"stem": "imagenet"}, "epochs": 200}
        | {"batch_size": 128, "drop_last": True, "train_on_val": True, "selection": "max-test", "seed": 1234}
        | {"lr": 0.05, "weight_decay": 5e-4, "warmup": 5.0, "warmup_lr": 0.01, "lr_min": 1e-3, "workers": 3}
        | {"data_dir": "./datasets", "val_share": 0.01, "split_seed": 42, "channels_last": True},
    ),
    (
        "fundamental",
        "python fundamental_sam/train_sam.py --experiment=cifar100_resnet18_sam_diminish2",
        CIFAR
        | {"method": "sam", "rho": 0.05, "lr": 0.1, "momentum": 0.0, "weight_decay": 1e-3, "batch_size": 128}
        | {"schedule": "diminish2", "as_coded": True, "data": "cifar100", "statistics": "cifar10", "seed": 42}
        | {"model": "resnet18", "model_params": {"max_pool": True}},
    ),
]


@pytest.mark.parametrize(("project", "line", "expected"), EXPECTED, ids=lambda value: str(value)[:40])
def test_against_settings_written_by_hand(project, line, expected):
    assert config(project, line) == RunConfig(**expected)


@pytest.mark.parametrize("project", PROJECTS)
def test_precision_is_the_scripts_whatever_the_machine_has(project):
    line = {"empirical": "--experiment default", "fundamental": "--experiment cifar10_wrn28_10_sam_diminish1"}
    assert "precision=float32" in translated(project, line.get(project, "")).command


# -- fundamental: all files, against our studies -------------------------------------------------------------------


def test_every_file_is_a_row_of_our_studies():
    """Two of the files have settings of their own, which the studies even out."""
    even = {"cifar10_resnet18_sam_constant_0001": "seed=42", "tiny_imagenet_resnet18_sam_constant_01": "epochs=200"}
    rows = []
    for study in ("fundamental-cifar10", "fundamental-cifar100", "fundamental-tiny"):
        rows += [
            content_hash(identity(point.config)) for point in grid_points(read_study(study, ["seed=42", "device=cpu"]))
        ]
    found = []
    for stem in fundamental.STEMS:
        mine = content_hash(identity(config("fundamental", f"--experiment {stem}", *filter(None, [even.get(stem)]))))
        assert mine in rows, stem
        found.append(mine)
    assert len(found) == 49 and sorted(found) == sorted(rows)


@pytest.mark.parametrize(
    ("stem", "key", "value"), [(k, *one) for k, v in fundamental._OWN.items() for one in v.items()]
)
def test_files_with_settings_of_their_own(stem, key, value):
    assert getattr(config("fundamental", f"--experiment {stem}"), key) == value
    assert f"Only this settings file has {key}={value}." in translated("fundamental", f"--experiment {stem}").notes


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant_001", {0: 0.01, 199: 0.01}),
        ("diminish1", {0: 0.1, 1: 0.05, 199: 5e-4}),
        ("diminish2", {0: 0.1, 1: 0.1, 2: 0.1 / 2**0.5001}),
        ("diminish3", {0: 0.1, 1: 0.1 / (3 * math.log(3)), 5: 0.1 / (3 * math.log(3)), 6: 0.1 / (4 * math.log(4))}),
    ],
)
def test_the_rates_are_those_of_the_script(schedule, rates):
    schedule = build_schedule(config("fundamental", f"--experiment cifar10_resnet34_sam_{schedule}"), 1)
    assert {epoch: schedule.at(epoch) for epoch in rates} == pytest.approx(rates, rel=1e-12)


def test_the_steps_of_vasso_drop_when_the_script_drops_them():
    made = build_schedule(config("vasso", "--lr_scheduler MultiStepLRscheduler --milestone 2 5 --epochs 12"), 1)
    rates = [0.05] + [0.05 * 0.2 ** sum(epoch > one for one in (2, 5)) for epoch in range(11)]
    assert [made.at(epoch) for epoch in range(12)] == pytest.approx(rates)
    short = config("vasso", "--lr_scheduler MultiStepLRscheduler --epochs 3")
    assert (short.schedule, short.milestones) == ("constant", ())


# -- networks ------------------------------------------------------------------------------------------------------

NETWORKS = [
    *(("bisam", f"--model {name}") for name in bisam._MODELS),
    *(("empirical", f"--experiment default_sam --model_name {name}") for name in empirical._MODELS),
    *(("vasso", f"--model {name}") for name in vasso._MODELS),
    *(("vasso", f"--dataset ImageNet_base --model {name}") for name in vasso._ON_IMAGENET),
    *(("fundamental", f"--experiment cifar10_{name}_sam_diminish1") for name in fundamental._MODELS),
]


@pytest.mark.slow
def test_every_network_can_be_built():
    for project, line in NETWORKS:
        made = config(project, line)
        with torch.device("meta"):
            MODELS[made.model](**made.model_params)


def test_the_wide_networks_of_bisam_are_the_scripts():
    made = config("bisam", "--model wrn2810")
    with torch.device("meta"):
        net = MODELS[made.model](**made.model_params)
    assert sum(p.numel() for p in net.parameters()) == 46_160_474
