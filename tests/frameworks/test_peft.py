"""Adapters of PEFT: any method over them alone, and Flat-LoRA's noise beneath them."""

import copy
import math
from functools import partial

import pytest
import torch
from torch.nn import functional as F

import flatmin
from flatmin.methods import METHODS, Need
from flatmin.optim import FlatLoRA
from tests.helpers import wrap_fitting

peft = pytest.importorskip("peft", reason="needs peft: run make test-frameworks")
transformers = pytest.importorskip("transformers", reason="needs transformers: run make test-frameworks")

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # transformers, of its own names
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
RHO = 0.05
IDS = torch.randint(20, (4, 10), generator=torch.Generator().manual_seed(0))


def language_model(dtype=torch.float32, lora=None, eager=False, **more):
    """A tiny Llama with adapters, B of which is not 0, so that all gradients are there from the start."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=20, **sizes)
    if eager:
        config._attn_implementation = "eager"
    model = transformers.LlamaForCausalLM(config).to(dtype)
    lora = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **(lora or {})}
    return peft.get_peft_model(model, peft.LoraConfig(**lora), **more).train()


def adapters(model):
    return [p for p in model.parameters() if p.requires_grad]


def frozen(model):
    return [p.detach().clone() for p in model.parameters() if not p.requires_grad]


def backward(model, optimizer, criterion=F.cross_entropy, part=slice(None)):
    ids = IDS[part]
    loss = criterion(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    getattr(optimizer, "backward", torch.Tensor.backward)(loss)
    return loss


def train(model, optimizer, criterion=F.cross_entropy, steps=3):
    def closure(part=slice(None)):
        optimizer.zero_grad()
        return backward(model, optimizer, criterion, part)

    several = Need.MICRO_BATCHES in optimizer.recipe.needs
    for _ in range(steps):
        optimizer.step([partial(closure, slice(0, 2)), partial(closure, slice(2, 4))] if several else closure)
    return [p.detach().clone() for p in adapters(model)]


def equal(a, b):
    return all(map(torch.equal, a, b))


# -- methods over adapters ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [m for m in METHODS if m != "sam-on"])
def test_every_method_trains_adapters_and_leaves_the_rest(method):
    recipe = flatmin.compose(method).for_length(3, 4)
    model = language_model(eager=Need.SECOND_ORDER in recipe.needs, lora={"lora_dropout": 0.1})
    base = torch.optim.SGD(adapters(model), lr=0.1, momentum=0.9)
    criterion = flatmin.Criterion(torch.nn.CrossEntropyLoss())
    optimizer = wrap_fitting(base, recipe, rho=RHO, model=model, criterion=criterion)
    before, rest = [p.detach().clone() for p in adapters(model)], frozen(model)
    after = train(model, optimizer, criterion)
    assert not any(map(torch.equal, before, after))
    assert equal(rest, frozen(model)) and all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_a_method_for_normalisation_layers_says_that_adapters_are_none():
    model = language_model()
    with pytest.raises(ValueError, match=r"no layer matches .*the trained layers are Linear"):
        flatmin.wrap(torch.optim.SGD(adapters(model), lr=0.1), "sam-on", model=model)


def test_sam_over_adapters_is_the_formula_with_the_norm_of_the_adapters_alone():
    model = language_model(torch.float64)
    other = copy.deepcopy(model)
    train(model, flatmin.SAM(torch.optim.SGD(adapters(model), lr=0.1), rho=RHO, model=model), steps=1)
    weights = adapters(other)

    def gradients():
        loss = F.cross_entropy(other(input_ids=IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        return torch.autograd.grad(loss, weights)

    g = gradients()
    norm = math.sqrt(sum(float(x.square().sum()) for x in g))
    with torch.no_grad():
        home = [w.clone() for w in weights]
        for w, x in zip(weights, g, strict=True):
            w.add_(x, alpha=RHO / norm)
    for new, w, x in zip(adapters(model), home, gradients(), strict=True):
        torch.testing.assert_close(new.detach(), w - 0.1 * x)


def test_only_takes_the_names_that_peft_gives():
    model = language_model()
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    optimizer = flatmin.wrap(torch.optim.SGD(adapters(model), lr=0.1), "only", only="*.lora_B.*", model=model, rho=RHO)
    before = dict(zip(names, (p.detach().clone() for p in adapters(model)), strict=True))
    backward(model, optimizer)
    with optimizer.perturbed():
        moved = [n for n, p in zip(names, adapters(model), strict=True) if not torch.equal(p, before[n])]
        assert moved == [n for n in names if ".lora_B." in n] and len(moved) == 4
        backward(model, optimizer)
    optimizer.step()
    with pytest.raises(ValueError, match=r"'q_proj'; did you mean base_model\.model\..*q_proj\.lora_A\.default"):
        flatmin.wrap(torch.optim.SGD(adapters(model), lr=0.1), "only", only="q_proj", model=model)


@pytest.mark.parametrize("entry", ["closure", "perturbed", "passes"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_bit(entry, reentrant):
    """Dropout masks are those of the first pass also where the forward runs again inside the backward."""
    ends = []
    for checkpoints in (False, True):
        model = language_model(lora={"lora_dropout": 0.3})
        if checkpoints:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
            assert all(m.gradient_checkpointing for m in model.modules() if hasattr(m, "gradient_checkpointing"))
        optimizer = flatmin.SAM(torch.optim.SGD(adapters(model), lr=0.5), rho=0.5, model=model)
        torch.manual_seed(1)
        for _ in range(2):
            if entry == "closure":
                train(model, optimizer, steps=1)
                continue
            optimizer.zero_grad()
            if entry == "passes":
                for evaluation in optimizer.passes():
                    with evaluation:
                        backward(model, optimizer)
            else:
                backward(model, optimizer)
                with optimizer.perturbed():
                    backward(model, optimizer)
            optimizer.step()
        ends.append([p.detach().clone() for p in adapters(model)])
    assert equal(*ends)


def test_a_model_in_bf16_keeps_its_adapters_in_float32_unless_told_otherwise():
    """PEFT's default leaves nothing to round; adapters in bf16 are moved by eps in the mean."""
    for dtype, more in ((torch.float32, {}), (torch.bfloat16, {"autocast_adapter_dtype": False})):
        model = language_model(torch.bfloat16, **more)
        assert {p.dtype for p in adapters(model)} == {dtype}
        base = torch.optim.SGD(adapters(model), lr=0.0)
        optimizer = flatmin.SAM(base, rho=0.002, model=model, diagnostics=True)
        rest, projections = frozen(model), []
        with pytest.warns(UserWarning, match="norm") if more else pytest.MonkeyPatch.context():
            train(model, optimizer, steps=1)
        for _ in range(20):
            train(model, optimizer, steps=1)
            projections.append(optimizer.diagnostics()["epsilon_projection"])
        assert sum(projections) / 20 == pytest.approx(1, abs=0.1 if more else 1e-5)
        assert equal(rest, frozen(model))


def test_the_trainer_takes_a_model_with_adapters(tmp_path):
    from flatmin.integrations.hf import SAMTrainer

    model = language_model()
    arguments = transformers.TrainingArguments(
        str(tmp_path), use_cpu=True, report_to=[], max_steps=2, save_strategy="no", disable_tqdm=True, learning_rate=0.1
    )
    rest, before = frozen(model), [p.detach().clone() for p in adapters(model)]
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    trainer = SAMTrainer(model=model, args=arguments, train_dataset=rows, recipe="sam", rho=RHO)
    trainer.train()
    assert trainer.optimizer.param_groups[0]["rho"] == RHO
    assert equal(rest, frozen(model)) and not equal(before, adapters(model))


# -- Flat-LoRA ----------------------------------------------------------------------------------------------------


def test_the_noise_is_sized_by_the_rows_of_w_and_its_adapters():
    model = language_model(lora={"lora_alpha": 6})
    flat = FlatLoRA(model, 0.1, total=0)
    layers = {n: m for n, m in model.named_modules() if n.endswith(("q_proj", "v_proj"))}
    seen = flat.deviations()
    assert list(seen) == list(layers) and len(seen) == 4
    for name, layer in layers.items():
        whole = layer.base_layer.weight + 3 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        torch.testing.assert_close(seen[name], 0.1 * whole.detach().norm(dim=1) / 4)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    name, layer = next(iter(layers.items()))
    both = layer.base_layer.weight + layer.get_delta_weight("default") + layer.get_delta_weight("second")
    torch.testing.assert_close(flat.deviations()[name], 0.1 * both.detach().norm(dim=1) / 4)
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="are merged into its weight; call unmerge_adapter"), flat:
        pytest.fail("entered")


def test_a_row_of_a_transposed_layer_is_a_column():
    """GPT-2's Conv1D keeps W as (in, out)."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    lora = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    model = peft.get_peft_model(transformers.GPT2LMHeadModel(config), lora)
    (sigma,) = FlatLoRA(model, 0.1, total=0).deviations().values()
    weight = model.base_model.model.transformer.h[0].attn.c_attn.base_layer.weight
    torch.testing.assert_close(sigma, 0.1 * weight.norm(dim=0) / math.sqrt(8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["base", "sam"])
def test_training_with_noise_leaves_the_frozen_weights_and_rho_0_is_the_training_without(dtype, method):
    ends = []
    for rho in (None, 0.0, 0.05):
        model = language_model(dtype, lora={"lora_dropout": 0.1})
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
        optimizer = flatmin.wrap(torch.optim.AdamW(adapters(model), lr=0.01), method, rho=RHO, model=model)
        flat = None if rho is None else FlatLoRA(model, rho, total=2)
        rest = frozen(model)
        torch.manual_seed(1)
        for _ in range(3):
            if flat is None:
                train(model, optimizer, steps=1)
            else:
                with flat:
                    train(model, optimizer, steps=1)
        assert equal(rest, frozen(model))
        ends.append(adapters(model))
    assert equal(ends[0], ends[1]) and not equal(ends[0], ends[2])


def test_what_flat_lora_refuses_of_peft():
    dora = language_model(lora={"use_dora": True, "init_lora_weights": True})
    embedded = language_model(lora={"target_modules": ["q_proj", "embed_tokens"], "init_lora_weights": True})
    for model in (dora, embedded):
        with pytest.raises(ValueError, match="is not a linear layer with plain adapters"):
            FlatLoRA(model, total=1)
    assert len(FlatLoRA(embedded, total=1, only="*q_proj").deviations()) == 2
    normed = language_model()
    torch.nn.utils.parametrizations.weight_norm(normed.get_base_model().model.layers[0].self_attn.q_proj.base_layer)
    with pytest.raises(ValueError, match="computed in every forward"):
        FlatLoRA(normed, total=1)
    tied = language_model(lora={"target_modules": ["q_proj", "lm_head"]})
    llama = tied.get_base_model()
    llama.lm_head.base_layer.weight = llama.model.embed_tokens.weight
    with pytest.raises(ValueError, match=r"lm_head and .*embed_tokens share one weight, .*exclude .*lm_head by only="):
        FlatLoRA(tied, total=1)
    assert len(FlatLoRA(tied, total=1, only="*q_proj").deviations()) == 2
