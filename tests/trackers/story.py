"""The events of a run that never was."""

from flatmin.train.config import RunConfig
from flatmin.train.events import Began, Ended, EpochEnded, Measured, Stepped, Warned
from flatmin.train.result import Epoch, Result
from flatmin.train.trackers import scalars

CONFIG = RunConfig(
    method="vasso+asam", rho=0.1, params={"direction.theta": 0.8}, betas=(0.9, 0.95), milestones=(1, 2), nesterov=True
)
DIAGNOSTICS = {"loss": 0.123456789012345, "loss_perturbed": 2 / 3, "cosine": -0.25, "ratio_larger": 1.0}
MEASURES = {"lambda_1": 12.3, "lambda_1/lambda_5": 1.5, "lambda_1[0.weight]": 7.5, "sam_paper: lambda_1 / lambda_5": 3}


def began(step=0):
    found = {"versions": {"torch": "2.13.0", "scikit-learn": None}, "device": "cpu", "threads": 1}
    return Began(
        name="run",
        config=CONFIG,
        environment=found,
        parameters=1000,
        samples=90,
        steps=10,
        gradient_evaluations=2.0,
        epoch=step // 10,
        step=step,
    )


def stepped(step, loss=None, **others):
    values = {"lr": 0.1 / step, "rho": 0.1, "seconds": 0.3, "images": 45, "diagnostics": DIAGNOSTICS}
    return Stepped(
        step=step, epoch=1 + (step - 1) // 10, loss=1 / step if loss is None else loss, **{**values, **others}
    )


def ended_epoch(number):
    line = Epoch(
        epoch=number,
        lr=0.1,
        rho=0.1,
        train_loss=1 / 3,
        perturbed_loss=0.5,
        train_acc=61.5,
        val_acc=70.0 + number,
        val_loss=0.9,
        test_acc=None,
        memorised=None,
        seconds=0.6,
        images_per_second=150.0,
        skipped=1,
    )
    return EpochEnded(line=line, step=10 * number)


def ended(failure=None):
    chosen = {"selection": "val", "epoch": 2, "val_acc": 72.0, "test_acc": 200 / 3, "test_top5": None, "test_loss": 0.8}
    good = failure is None
    result = Result(
        method="vasso+asam",
        rho=0.1,
        gradient_evaluations=2.0,
        seed=0,
        epochs=2,
        noise=0.0,
        trained=good,
        last={"epoch": 2, "test_acc": 200 / 3, "val_acc": 72.0, "memorised": None} if good else None,
        best={"epoch": 2, "test_acc": 200 / 3, "val_acc": 72.0} if good else None,
        train_ce=0.31 if good else None,
        lambda_max={"value": 41.5, "residual": 1e-7, "products": 30, "converged": True} if good else None,
        seconds=1.2,
        chosen=chosen if good else None,
        failure=failure,
    )
    return Ended(result=result)


def first_epoch():
    return [stepped(5), stepped(10), ended_epoch(1), Measured(epoch=1, step=10, values=MEASURES)]


def whole():
    said = Warned(text="by the way")
    return [began(), *first_epoch(), said, stepped(15), stepped(20), ended_epoch(2), ended()]


def numbers(events):
    """(name, step) -> value of every number of the events."""
    found, step = {}, 0
    for event in events:
        step = getattr(event, "step", step)
        found |= {(name, step): value for name, value in scalars(event).items()}
    return found
