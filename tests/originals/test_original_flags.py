"""The flags of the original projects: how they are read, what is said about them, which are refused."""

import shlex

import pytest

from flatmin import originals
from flatmin.originals.projects import PROJECTS, find_project


def translated(project, line=""):
    return PROJECTS[project].translate(shlex.split(line))


def test_lines_that_mean_the_same():
    for project, one, other in [
        ("bisam", "--opt sam", "--optim=sam"),
        ("bisam", "--optim sam --adaptive", "--optim sam --adaptive yes"),
        ("bisam", "--optim sam --adaptive False", "--optim sam"),
        ("bisam", "--rho 0.3 --rho 0.1", "--rho 0.1"),
        ("bisam", "python3.8 -u ./train.py --alpha 0.1", "--opt bisam_log"),
        ("bisam", "--depth 28 --width_factor 10 --threads 4 --valid", ""),
        ("vasso", "--lr 0.1", "--lr=1e-1"),
        ("vasso", "--milestone 1 2 --lr 0.1", "--lr 0.1"),
        ("vasso", "--pin_memory --distributed_val --dist_url x --output_dir y --output_name z --wandb_name n", ""),
        ("vasso", "--eps 1e-8 --opt adamw", "--opt adam"),
    ]:
        assert translated(project, one).command == translated(project, other).command


def test_what_differs_is_said():
    for project, line, note in [
        ("bisam", "--adaptive False", "--adaptive is false here, as given; the script reads any value as true."),
        ("bisam", "--threads 4", "--threads has no effect: images are augmented in whole batches"),
        ("bisam", "--depth 28", "--depth has no effect: the script does not use it."),
        ("bisam", "--optim sam --mu 3", "--mu has no effect: it belongs to BiSAM."),
        ("bisam", "--optim bisam_tanh", "mu is 1 by default, as in the script's flags"),
        ("bisam", "--optim base", "--optim base stops the script with an error"),
        ("bisam", "--dataset cifar100", "normalised with the mean and standard deviation of CIFAR-10"),
        ("bisam", "--adam --momentum 0.5", "--momentum has no effect: --adam uses AdamW, which has betas instead."),
        ("empirical", "--experiment default_sam --opt_name samdirection", "contrary to its name"),
        ("empirical", "--experiment default", "stops the script with an error in its first update; here it trains."),
        ("empirical", "--experiment default_sam --opt_name sgd --rho 1", "--rho has no effect: SGD has no radius."),
        ("empirical", "--experiment default --adaptive False --opt_name sam", "--adaptive is false here"),
        ("fundamental", "--experiment cifar10_resnet18_sam_diminish3", "--set as_coded=false uses the paper's formula"),
        ("vasso", "--opt vasso-adam", "--opt vasso-adam stops the script with an error; here it trains with AdamW"),
        ("vasso", "--opt sam-sgd --theta 0.5", "--theta has no effect: it belongs to vasso."),
        ("vasso", "--output_dir x", "--output_dir has no effect: runs are stored in the folder of --out."),
        (
            "vasso",
            "CUDA_VISIBLE_DEVICES=1 python train.py",
            "CUDA_VISIBLE_DEVICES=1 is ignored; put it before the word flatmin.",
        ),
        ("vasso", "--warmup_epoch 1", "--warmup_epoch 1 is left out"),
        ("vasso", "--gamma 0.1", "--gamma has no effect: it belongs to MultiStepLRscheduler."),
    ]:
        assert note in " ".join(translated(project, line).notes)


def test_trackers():
    words = translated("vasso", "--wandb --wandb_project mine --log_freq 20").command
    assert {"trackers=wandb", "project=mine", "log_every=20"} <= set(words)
    line = "--experiment default_sam --framework_name tensorboard"
    assert "trackers=tensorboard" in translated("empirical", line).command


def test_mistakes_are_one_sentence():
    for project, line, message in [
        ("bisam", "--learning-rate 0.1", "--learning-rate is not a flag of train.py of LIONS-EPFL/BiSAM; did "),
        ("bisam", "--rho", "--rho expects a number, but no value follows it."),
        ("bisam", "--rho --mu 1", "--rho expects a number, but no value follows it."),
        ("bisam", "--epochs 1.5", "--epochs expects a whole number, got '1.5'."),
        ("bisam", "--adaptive maybe", "--adaptive expects true or false, got 'maybe'."),
        ("bisam", "--d 3", "--d can mean --depth or --dropout or --dataset; write the flag in full."),
        ("bisam", "--model resnet65", "--model expects one of resnet56, "),
        ("bisam", "--optim bisam_tan", "got 'bisam_tan'; did you mean 'bisam_tanh'?"),
        (
            "bisam",
            "rho 0.1",
            "unexpected word 'rho': expected a flag of train.py of LIONS-EPFL/BiSAM; did you mean '--rho'?",
        ),
        ("bisam", "epochs=1", "unexpected word 'epochs=1': expected a flag of "),
        ("bisam", "--optim", "--optim expects text, but no value follows it."),
        ("bisam", "--momentum -1", "momentum must be at least 0, got -1.0."),
        ("bisam", "torchrun --nproc 2 train.py", "'torchrun' starts several processes; use torchrun with"),
        ("empirical", "--opt_name sam", "--experiment is missing; it must be one of default, default_sam"),
        ("empirical", "--experiment defalt", "got 'defalt'; did you mean 'default'?"),
        ("empirical", "--experiment default --framework_name wand", "got 'wand'; did you mean 'wandb'?"),
        ("fundamental", "", "--experiment is missing; it must be one of the script's 49 settings files"),
        (
            "fundamental",
            "--experiment config/cifar10_wrn28_10_sam_diminish1.yaml",
            "got 'config/cifar10_wrn28_10_sam_diminish1.yaml'; did you mean 'cifar10_wrn28_10_sam_diminish1'?",
        ),
        ("fundamental", "--experiment tiny_imagenet_resnet34_sam_constant_01", "one of the script's 49 settings files"),
        ("fundamental", "--experiment x --rho 1", "--rho is not a flag of fundamental_sam/train_sam.py"),
        ("vasso", "--betas", "--betas expects one number or more, but no value follows it."),
        ("vasso", "--milestone 3 x", "--milestone expects one whole number or more, got '3 x'."),
        (
            "vasso",
            "--lr_scheduler MultiStepLRscheduler --milestone 3 3",
            "--milestone expects epochs from 0 in increasing order, got",
        ),
        ("vasso", "--warm 3", "--warm can mean --warmup_epoch or --warmup_init_lr"),
        ("vasso", "--start_epoch 3", "--start_epoch expects 0, got 3"),
        ("vasso", "--resume_path x", "--resume and --resume_path name a checkpoint of the script"),
        ("vasso", "--opt adamw --eps 1e-3", "--eps expects 1e-08, the fixed value of torch's AdamW"),
        ("vasso", "--dataset ImageNet_base --model vgg11_bn", "--model expects one of resnet18, "),
        ("vasso", "--dataset CIFAR10_cutuot", "got 'CIFAR10_cutuot'; did you mean 'CIFAR10_cutout'?"),
        ("vasso", "--opt vasso-sgd --theta 2", "EMA: theta must be in (0, 1], got 2.0."),
        ("vasso", "--eta_min 1", "lr_min must be at most lr = 0.05, got 1.0."),
    ]:
        with pytest.raises(ValueError) as raised:
            translated(project, line)
        text = str(raised.value)
        assert message in text and "\n" not in text and ". " not in text


def test_an_unknown_project():
    with pytest.raises(ValueError, match=r"^unknown project 'vaso'; did you mean 'vasso'\? \(projects: bisam, "):
        find_project("vaso")


def test_a_fifth_project_is_one_file_and_one_line():
    """Every module beside the core is a project of the table."""
    from importlib import resources

    files = {entry.name.removesuffix(".py") for entry in resources.files(originals).iterdir() if entry.is_file()}
    assert files - {"__init__", "project", "projects", "reader"} == set(PROJECTS)
