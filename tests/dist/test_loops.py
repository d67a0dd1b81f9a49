"""The table of methods and loops is what happens when they meet, and the docs have it."""

from functools import partial

import pytest
import torch
from torch import nn

import flatmin
from flatmin.methods import METHODS
from flatmin.optim.support import Loop, refusal
from tests.dist import scenarios_loops
from tests.helpers import BASES, batch, drive, noisy_net, recipe_of, wrap_fitting

HERE = [Loop.TWO_PASSES, Loop.PLAIN, Loop.FUNCTIONAL, Loop.SCALER]


def wrapped(method, **options):
    model = noisy_net()
    criterion = flatmin.Criterion(nn.CrossEntropyLoss())
    optimizer = wrap_fitting(
        BASES["sgd"](model.parameters()), recipe_of(method), model=model, criterion=criterion, **options
    )
    return model, criterion, optimizer


def meet(method, loop):
    """Run a step of the method in the loop; the sentence of the refusal, or None."""
    x, y = batch(0)
    try:
        if loop is Loop.FUNCTIONAL:
            params = {"0.weight": torch.ones(2, 3), "0.bias": torch.ones(2)}
            fn = partial(lambda p, s: s * sum(t.square().sum() for t in p.values()), s=1.0)
            flatmin.value_and_grad(fn, params, recipe=recipe_of(method), ascent_fn=partial(fn, s=2.0))
            return None
        scaler = torch.amp.GradScaler("cpu") if loop is Loop.SCALER else None
        model, criterion, optimizer = wrapped(method, scaler=scaler)

        def backward(chunk=None):
            part = (x, y) if chunk is None else (x.chunk(2)[chunk], y.chunk(2)[chunk])
            loss = criterion(model(part[0]), part[1])
            optimizer.backward(loss if scaler is None else scaler.scale(loss))
            return loss

        if loop is Loop.PLAIN:
            optimizer.train()
            stays, _ = (optimizer._under_way is not None and optimizer._under_way.resident), optimizer.eval()
            return None if stays else "is a plain loop's no-op"
        drive(optimizer, backward, "perturbed" if loop is Loop.TWO_PASSES else "closure")
    except (ValueError, RuntimeError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("method", METHODS)
def test_the_table_is_what_happens(method):
    for loop in HERE:
        why, found = refusal(recipe_of(method), loop), meet(method, loop)
        assert (why is None) == (found is None), (loop, why, found)
        if why is not None and loop in (Loop.FUNCTIONAL, Loop.SCALER):
            assert f"{method} {why}" in found


@pytest.mark.slow  # test_ddp.py and test_fsdp.py have some of each answer
@pytest.mark.dist
def test_the_table_is_what_happens_in_several_processes(ranks):
    for found in ranks.run(scenarios_loops.meet_all, timeout=180):
        for (method, name), sentence in found.items():
            why = refusal(recipe_of(method), Loop[name])
            assert (why is None) == (sentence is None), (method, name, why, sentence)
            assert why is None or f"{method} {why}" in sentence
