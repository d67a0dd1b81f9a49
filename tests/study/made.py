"""Made-up studies: the table of given results, through the real plan and tabulation."""

from flatmin.study.executors import RunOutcome
from flatmin.study.plan import plan
from flatmin.study.reading import read_study
from flatmin.study.tabulate import tabulate
from flatmin.train.result import Result


def made_result(config, test, **changes):
    point = {"epoch": 1, "val_acc": test + 1, "test_acc": test, "memorised": None}
    values = dict(
        method=config.method,
        rho=config.rho,
        gradient_evaluations=1.0 if config.method == "sgd" else 2.0,
        seed=config.seed,
        epochs=config.epochs,
        noise=0.0,
        trained=True,
        last=point,
        best=point,
        chosen=point,
        train_ce=0.5,
        lambda_max=None,
        seconds=1.0,
    )
    return Result(**(values | changes))


def made_table(text, folder, result_of, words=(), changed=lambda spec: spec):
    """The table of a study whose run has the test accuracy or outcome that `result_of(cell, seed)` gives."""
    path = folder / "made.toml"
    path.write_text(text, encoding="utf-8")
    todo = plan(changed(read_study(str(path), words)), folder, make=False)
    outcomes = {}
    for (i, seed), run in todo.runs.items():
        found = result_of(todo.grid_points[i], seed)
        outcomes[run.name] = (
            found if isinstance(found, RunOutcome) else RunOutcome(result=made_result(run.config, found))
        )
    return tabulate(todo, outcomes)
