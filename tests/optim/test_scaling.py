"""torch.amp.GradScaler in every loop: the trajectory is the unscaled one, and an inf in any pass skips the step."""

import itertools

import pytest
import torch
from torch import nn

import flatmin
from flatmin.methods import METHODS, Need
from tests.helpers import BASES, CHUNKS, as_on_device, batch, bits, noisy_net, recipe_of, takes_chunks, wrap_fitting

LOOPS = ["closure", "direct closure", "passes", "passes, unscaled", "perturbed", "two calls"]
SCALE = 2.0**10
SERVED = [m for m in METHODS if Need.SECOND_ORDER not in recipe_of(m).needs]


class Loop:
    """A training loop with a scaler (or, for "plain", without), of which one pass may be spoilt."""

    def __init__(self, kind, method="sam", base="sgd", *, spoil=(), device=False, growth=1000, **options):
        self.kind, self.spoil = kind, spoil
        self.model = noisy_net()
        self.criterion = flatmin.Criterion(nn.CrossEntropyLoss())
        self.scaler = None
        if kind != "plain":
            self.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=growth)
        self.optimizer = wrap_fitting(
            BASES[base](self.model.parameters(), **options.pop("of_base", {})),
            recipe_of(method),
            rho=0.1,
            model=self.model,
            criterion=self.criterion,
            scaler=self.scaler,
            **options,
        )
        as_on_device(self.optimizer, device)
        self.scales, self.weights = [], []

    def backward(self, k, chunk=None):
        x, y = batch(k)
        if chunk is not None:
            x, y = x.chunk(CHUNKS)[chunk], y.chunk(CHUNKS)[chunk]
        loss = self.criterion(self.model(x), y)
        if (k, self.calls) in self.spoil:
            loss = loss * torch.inf
        self.calls += 1
        self.optimizer.backward(loss if self.scaler is None else self.scaler.scale(loss))
        return loss

    def step(self, k):
        self.calls, optimizer, scaler = 0, self.optimizer, self.scaler
        torch.manual_seed(k)  # dropout

        def closure(chunk=None):
            optimizer.zero_grad()
            return self.backward(k, chunk)

        chunks = CHUNKS if takes_chunks(optimizer) else 1
        closures = [lambda i=i: closure(i) for i in range(CHUNKS)] if chunks > 1 else closure
        if self.kind in ("plain", "direct closure"):
            optimizer.step(closures)
        elif self.kind == "closure":
            scaler.step(optimizer, closures)
        elif self.kind.startswith("passes"):
            for evaluation in optimizer.passes(chunks=chunks):
                with evaluation:
                    self.backward(k, evaluation.chunk)
            if self.kind == "passes, unscaled":
                scaler.unscale_(optimizer)
                self.norm = torch.nn.utils.get_total_norm([w.grad for w in self.model.parameters()])
            scaler.step(optimizer)
        else:
            optimizer.zero_grad()
            self.backward(k)
            if self.kind == "perturbed":
                with optimizer.perturbed():
                    self.backward(k)
            else:
                optimizer.first_step()
                self.backward(k)
                optimizer.second_step()
            if self.kind == "perturbed":
                scaler.step(optimizer)
        if scaler is not None:
            scaler.update()
            self.scales.append(scaler.get_scale())

    def run(self, steps):
        for k in range(steps):
            self.step(k)
            self.weights.append(bits(self.model.parameters()))
        return self


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("method", "kind"),
    [*(("gsam", kind) for kind in LOOPS), *zip(("sam", "vasso", "wsam", "usam"), LOOPS, strict=False)],
)
def test_the_trajectory_is_the_unscaled_one(method, kind):
    """A scale of a power of two changes no bit."""
    device = (len(method) + LOOPS.index(kind)) % 2 == 1
    plain = Loop("plain", method, device=device).run(6)
    assert same(Loop(kind, method, device=device).run(6).weights[-1], plain.weights[-1])


@pytest.mark.parametrize("method", SERVED)
def test_every_method_is_served(method):
    kind, base = (("closure", "sgd"), ("passes", "adamw"))[SERVED.index(method) % 2]
    assert same(Loop(kind, method, base).run(4).weights[-1], Loop("plain", method, base).run(4).weights[-1])


def test_functional_sam_takes_the_slopes_of_its_outputs_in_single_precision():
    """1e-7 has one bit in float16; the scaler multiplies the loss, which is later."""

    def update(low):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(torch.float32 if low else torch.float64)
        criterion = flatmin.Criterion(lambda z, y: 1e-6 * nn.functional.cross_entropy(z, y))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, enabled=low)
        base = torch.optim.SGD(model.parameters(), lr=1e5)
        optimizer = flatmin.wrap(base, "functional-sam", rho=0.5, model=model, criterion=criterion, scaler=scaler)
        before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        x, y = batch(0)

        def closure():
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16, enabled=low):
                loss = criterion(model(x.to(before.dtype)), y)
            scaler.scale(loss).backward()
            return loss

        optimizer.step(closure)
        return (nn.utils.parameters_to_vector(model.parameters()).detach() - before).double()

    low, exact = update(True), update(False)
    assert float((low - exact).norm()) < 0.01 * float(exact.norm())


@pytest.mark.parametrize("kind", LOOPS)
def test_an_inf_in_any_pass_skips_the_step_and_lowers_the_scale(kind):
    """What remains is the trajectory of a loop that never had step 2, with the memory of the method as it was."""
    for spoilt, (device, fused) in itertools.product((0, 1), ((False, False), (True, False), (True, True))):
        loop = Loop(kind, "vasso", spoil={(2, spoilt)}, device=device, of_base={"fused": fused}).run(5)
        assert same(loop.weights[2], loop.weights[1]) and not same(loop.weights[3], loop.weights[2])
        assert loop.scales == [SCALE, SCALE, SCALE / 2, SCALE / 2, SCALE / 2]
        counts = loop.optimizer.counts()
        assert counts["skipped_steps"] == 1 and counts["nonfinite_ascents"] == 1 - spoilt
        without = Loop("plain", "vasso", device=device, of_base={"fused": fused})
        for k in (0, 1, 3, 4):
            without.step(k)
        # BatchNorm's running statistics saw the spoilt batch, the weights did not.
        assert same(bits(without.model.parameters()), loop.weights[4])


@pytest.mark.parametrize("option", ["raise", "propagate"])
@pytest.mark.parametrize("kind", ["closure", "passes"])
def test_the_scaler_decides_whatever_nonfinite_says(kind, option):
    loop = Loop(kind, spoil={(1, 0), (2, 1)}, nonfinite=option).run(4)
    assert same(loop.weights[2], loop.weights[0])
    assert loop.scales == [SCALE, SCALE / 2, SCALE / 4, SCALE / 4]


def test_the_scale_grows_after_good_steps():
    assert Loop("closure", growth=2).run(4).scales == [SCALE, 2 * SCALE, 2 * SCALE, 4 * SCALE]


def test_unscaled_gradients_are_what_the_base_takes():
    plain, loop = Loop("plain"), Loop("passes, unscaled")
    for k in range(3):
        plain.step(k)
        loop.step(k)
        want = torch.nn.utils.get_total_norm([w.grad for w in plain.model.parameters()])
        torch.testing.assert_close(loop.norm, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["closure", "passes", "perturbed"])
def test_clipping_acts_on_unscaled_gradients(kind):
    plain = Loop("plain", clip_norm=0.05).run(4)
    assert same(Loop(kind, clip_norm=0.05).run(4).weights[-1], plain.weights[-1])
    assert not same(Loop("plain").run(4).weights[-1], plain.weights[-1])


def test_a_run_resumes_with_its_scaler():
    straight = Loop("closure", "vasso", spoil={(3, 0)}, growth=2).run(8)
    first = Loop("closure", "vasso", spoil={(3, 0)}, growth=2).run(5)
    second = Loop("closure", "vasso", growth=2)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.scaler.load_state_dict(first.scaler.state_dict())
    for k in range(5, 8):
        second.step(k)
    assert same(bits(second.model.parameters()), straight.weights[-1])
    assert second.scales == straight.scales[5:]


@pytest.mark.parametrize("spoil", [False, True])
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("growth", [1000, 2])
def test_without_a_closure_and_with_the_weights_kept_at_w_plus_eps(growth, early, spoil):
    """momentum-sam in a plain loop: train() and eval(); the scale moves between the steps."""

    def run(scaler):
        model = noisy_net()
        optimizer = flatmin.wrap(BASES["sgd"](model.parameters()), "momentum-sam", model=model, scaler=scaler)
        optimizer.train()
        for k in range(6):
            torch.manual_seed(k)
            x, y = batch(k)
            bad = spoil and k == 2
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y) * (torch.inf if bad else 1.0)
            if scaler is None:
                loss.backward()
                optimizer.step()
                continue
            scaler.scale(loss).backward()
            if early:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        optimizer.eval()
        return bits(model.parameters())

    assert same(run(torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=growth)), run(None))


def test_what_a_skipped_step_leaves_is_not_found_again():
    """A closure after a skipped manual step: the next step is good, and the scale stays."""
    loop = Loop("passes", spoil={(0, 1)})
    loop.step(0)
    loop.kind = "closure"
    loop.step(1)
    assert loop.scales == [SCALE / 2, SCALE / 2]
    assert loop.optimizer.counts()["skipped_steps"] == 1


@pytest.mark.parametrize("spoil", [False, True])
def test_the_plain_base_in_a_plain_loop(spoil):
    model = noisy_net()
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    optimizer = flatmin.wrap(BASES["sgd"](model.parameters()), "sgd", scaler=scaler)
    reference = noisy_net()
    plain = BASES["sgd"](reference.parameters())
    for k in range(3):
        x, y = batch(k)
        torch.manual_seed(k)
        loss = nn.functional.cross_entropy(model(x), y) * (torch.inf if spoil and k == 1 else 1.0)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        torch.manual_seed(k)
        plain.zero_grad()
        nn.functional.cross_entropy(reference(x), y).backward()
        if not (spoil and k == 1):
            plain.step()
    assert same(bits(model.parameters()), bits(reference.parameters()))
    assert scaler.get_scale() == (SCALE / 2 if spoil else SCALE)


class TestRefusals:
    def closure(self, optimizer, model, scaler):
        def closure():
            optimizer.zero_grad()
            loss = model(batch(0)[0]).sum()
            scaler.scale(loss).backward()
            return loss

        return closure

    def test_a_scaler_that_the_optimizer_does_not_know(self):
        model, scaler = noisy_net(), torch.amp.GradScaler("cpu")
        optimizer = flatmin.wrap(BASES["sgd"](model.parameters()), "sam")
        scaler.scale(torch.zeros(()))
        with pytest.raises(RuntimeError, match=r"does not know the scaler: pass scaler="):
            scaler.step(optimizer, self.closure(optimizer, model, scaler))
        # It can be told later, and nothing was left behind.
        optimizer.scaler = scaler
        scaler.update(SCALE)
        scaler.step(optimizer, self.closure(optimizer, model, scaler))
        scaler.update()

    def test_a_step_past_the_scaler(self):
        loop = Loop("passes")
        loop.calls = 0
        for evaluation in loop.optimizer.passes():
            with evaluation:
                loop.backward(0)
        with pytest.raises(RuntimeError, match=r"the gradients are scaled: end the update with scaler\.step"):
            loop.optimizer.step()

    @pytest.mark.parametrize("where", ["before perturbed()", "in the first pass", "between passes", "in the last pass"])
    def test_unscaling_between_the_passes(self, where):
        loop = Loop("passes", "gsam")
        loop.calls = 0
        before = bits(loop.model.parameters())
        sentence = r"unscale_\(optimizer\) was called between the passes"
        with pytest.raises(RuntimeError, match=sentence):
            if where == "before perturbed()":
                loop.backward(0)
                loop.scaler.unscale_(loop.optimizer)
                with loop.optimizer.perturbed():
                    pass
            for evaluation in loop.optimizer.passes():
                with evaluation:
                    loop.backward(0)
                    if where == f"in the {('first', 'last')[evaluation.index]} pass":
                        loop.scaler.unscale_(loop.optimizer)
                if where == "between passes":
                    loop.scaler.unscale_(loop.optimizer)
        assert same(bits(loop.model.parameters()), before)

    def test_two_steps_without_an_update_of_the_scaler(self):
        loop = Loop("direct closure")
        loop.scaler.update = lambda: None
        loop.step(0)
        with pytest.raises(RuntimeError, match=r"call scaler\.update\(\) after each step"):
            loop.step(1)

    def test_a_single_backward_while_lr_is_zero(self):
        loop = Loop("passes")
        loop.optimizer.param_groups[0]["lr"] = 0.0
        loop.calls = 0
        loop.backward(0)
        with pytest.raises(RuntimeError, match="needs a closure, or both passes before it"):
            loop.scaler.step(loop.optimizer)
        assert not loop.optimizer.base.state

    def test_second_derivatives(self):
        model, scaler = noisy_net(), torch.amp.GradScaler("cpu")
        with pytest.raises(
            ValueError, match=r"second derivatives, which would overflow with the scale of a GradScaler"
        ):
            flatmin.wrap(BASES["sgd"](model.parameters()), "sgdhess", scaler=scaler)

    def test_weights_in_half_precision(self):
        w = nn.Parameter(torch.ones(3, dtype=torch.float16))
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        optimizer = flatmin.wrap(torch.optim.SGD([w], lr=0.1), "sam", scaler=scaler)

        def closure():
            optimizer.zero_grad()
            loss = w.sum()
            scaler.scale(loss).backward()
            return loss

        with pytest.raises(ValueError, match=r"does not support weights in float16; keep them in float32"):
            optimizer.step(closure)
        assert torch.equal(w, torch.ones(3, dtype=torch.float16))

    @pytest.mark.parametrize("what", [object(), 65536.0])
    def test_what_is_no_scaler(self, what):
        with pytest.raises(TypeError, match=r"must be a torch\.amp\.GradScaler"):
            flatmin.wrap(BASES["sgd"](noisy_net().parameters()), "sam", scaler=what)


def test_a_scaler_that_is_switched_off_changes_nothing():
    model = noisy_net()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    optimizer = flatmin.wrap(BASES["sgd"](model.parameters()), "sam", rho=0.1, model=model, scaler=scaler)
    plain = Loop("plain")
    for k in range(3):
        plain.step(k)
        x, y = batch(k)
        torch.manual_seed(k)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            return loss

        scaler.step(optimizer, closure)
        scaler.update()
    assert same(bits(model.parameters()), bits(plain.model.parameters()))


@pytest.mark.parametrize("method", ["sgd", "sam"])
def test_a_distributed_checkpoint_of_a_fresh_optimizer(method):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = noisy_net()
    scaler = torch.amp.GradScaler("cpu")
    base = BASES["sgd"](model.parameters())
    optimizer = flatmin.wrap(base, method, rho=0.0, model=model, scaler=scaler, clip_norm=1.0)
    assert get_optimizer_state_dict(model, optimizer)["param_groups"]
    assert optimizer.counts()["updates"] == 0
