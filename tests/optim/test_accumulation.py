"""Gradient accumulation: n micro-batches are the big batch, in every pass."""

import pytest
import torch
from torch import nn

import flatmin
from tests.helpers import BASES, batch, recipe_of

# One for each thing that a pass leaves to the method: an average, a combination, several ascents, draws, a decision by
# value, second derivatives. Methods on micro-batches mean them, and those that choose samples choose in each.
METHODS = ["sam", "vasso", "gsam", "n-step", "rsam", "ae-sam", "sgdhess"]
WAYS = ["list of closures", "loop in a closure", "loop in a pass", "loop in perturbed()", "sum of losses"]
PARTS = 4


class Run:
    def __init__(self, method, base, way):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)).double()
        self.criterion = flatmin.Criterion(nn.CrossEntropyLoss())
        self.optimizer = flatmin.wrap(
            BASES[base](self.model.parameters()),
            recipe_of(method),
            rho=0.2,
            model=self.model,
            criterion=self.criterion,
        )
        self.way = way

    def backward(self, x, y, share=1.0):
        loss = self.criterion(self.model(x), y) * share
        self.optimizer.backward(loss)
        return loss

    def parts(self, k):
        x, y = batch(k, size=16, dtype=torch.float64)
        return list(zip(x.chunk(PARTS), y.chunk(PARTS), strict=True))

    def all_parts(self, k):
        return sum(self.backward(x, y, 1.0 / PARTS).detach() for x, y in self.parts(k))

    def step(self, k):
        optimizer = self.optimizer

        def closure(x, y, share=1.0):
            optimizer.zero_grad()
            return self.backward(x, y, share)

        def looped():
            optimizer.zero_grad()
            return self.all_parts(k)

        def summed():
            optimizer.zero_grad()
            loss = sum(self.criterion(self.model(x), y) for x, y in self.parts(k)) / PARTS
            optimizer.backward(loss)
            return loss

        if self.way == "whole":
            return optimizer.step(lambda: closure(*batch(k, size=16, dtype=torch.float64)))
        if self.way == "list of closures":
            return optimizer.step([lambda x=x, y=y: closure(x, y) for x, y in self.parts(k)])
        if self.way == "loop in a closure":
            return optimizer.step(looped)
        if self.way == "sum of losses":
            return optimizer.step(summed)
        if self.way == "loop in a pass":
            for evaluation in optimizer.passes():
                with evaluation:
                    self.all_parts(k)
        else:
            optimizer.zero_grad()
            self.all_parts(k)
            with optimizer.perturbed():
                self.all_parts(k)
        optimizer.step()
        return None


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_are_the_big_batch(method):
    for way in WAYS:
        recipe = recipe_of(method)
        if way == "loop in perturbed()" and not recipe.two_pass:
            continue
        base = list(BASES)[(METHODS.index(method) + WAYS.index(way)) % 2]
        whole, run = Run(method, base, "whole"), Run(method, base, way)
        for k in range(5):
            losses = whole.step(k), run.step(k)
            if losses[1] is not None:
                torch.testing.assert_close(losses[1].detach(), losses[0], rtol=1e-12, atol=0)
        for a, b in zip(run.model.parameters(), whole.model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_each_pass_runs_every_micro_batch_in_order():
    run, seen = Run("sam", "sgd", "list of closures"), []

    def closure(i, x, y):
        seen.append(i)
        run.optimizer.zero_grad()
        return run.backward(x, y)

    run.optimizer.step([lambda i=i, x=x, y=y: closure(i, x, y) for i, (x, y) in enumerate(run.parts(0))])
    assert seen == [0, 1, 2, 3, 0, 1, 2, 3]


def test_an_ascent_of_each_micro_batch_is_another_method():
    """The same list means accumulation to sam, and an ascent each to micro-sam."""
    runs = [Run(method, "sgd", "list of closures") for method in ("sam", "micro-sam")]
    for run in runs:
        run.step(0)
    a, b = (torch.cat([p.detach().flatten() for p in run.model.parameters()]) for run in runs)
    assert (a - b).abs().max() > 1e-6
