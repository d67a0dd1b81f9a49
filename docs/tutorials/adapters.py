# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Fine-tuning with adapters
#
# A low-rank adapter (LoRA) trains two small matrices A and B beside a frozen weight W: `y = W x + s B A x`. SAM goes
# over adapters as over any weights: give the base optimizer the adapters alone, and only they are perturbed. Flat-LoRA
# adds noise to the frozen W instead, at the cost of one gradient a step.
#
# We fine-tune a small network for digits on 200 images that lie on their side, 30 % of them with a wrong label. The
# adapter here is a module of our own, so that the page needs no other package; with PEFT the optimizer lines are the
# same: [Adapters](../loops/adapters.md).
#
# This page needs `pip install '.[digits]'` in a clone of flatmin, and runs in half a minute on one CPU core.

# %%
import copy

import torch
from torch import nn
from torch.nn import functional as F

import flatmin
from flatmin.data.digits import load_digits
from flatmin.data.noise import symmetric_noise
from flatmin.models.small import mlp
from flatmin.optim import FlatLoRA

torch.set_num_threads(1)
data = load_digits()


def run_epochs(optimizer, model, x, y, epochs, around=None):
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(32):

            def closure(index=index):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x[index]), y[index])
                loss.backward()
                return loss

            if around is None:
                optimizer.step(closure)
            else:
                with around:
                    optimizer.step(closure)


@torch.no_grad()
def accuracy(model, x, y):
    return 100 * (model.eval()(x).argmax(1) == y).float().mean().item()


# %% [markdown]
# ## The network to start from
#
# Trained on upright digits, it reads digits on their side badly.

# %%
torch.manual_seed(0)
start = mlp()
run_epochs(torch.optim.SGD(start.parameters(), lr=0.05, momentum=0.9), start, data.train.x, data.train.y, epochs=20)
rotated = {name: part.x.rot90(1, (2, 3)) for name, part in (("train", data.train), ("test", data.test))}
print(f"upright: {accuracy(start, data.test.x, data.test.y):.1f} %")
print(f"on their side: {accuracy(start, rotated['test'], data.test.y):.1f} %")

# %% [markdown]
# ## The adapter
#
# `lora_weight` tells Flat-LoRA the frozen weight and what the adapter adds to it. SAM does not need it.


# %%
class Adapted(nn.Module):
    def __init__(self, layer, rank=4):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, layer.in_features) / layer.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x):
        return self.layer(x) + x @ self.a.T @ self.b.T

    def lora_weight(self):
        return self.layer.weight, self.b @ self.a


def with_adapters(model):
    model = copy.deepcopy(model).requires_grad_(False)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, Adapted(layer))
    return model


# %% [markdown]
# ## Fine-tune it in three ways

# %%
few_x, few_y = rotated["train"][:200], data.train.y[:200]
epochs = 40


def fine_tune(kind, seed):
    torch.manual_seed(seed)
    labels = symmetric_noise(few_y, 0.3, num_classes=10, seed=seed)
    model = with_adapters(start)
    adapters = [p for p in model.parameters() if p.requires_grad]
    base = torch.optim.AdamW(adapters, lr=1e-2)
    optimizer = flatmin.wrap(base, "sam" if kind == "SAM over the adapters" else "base", rho=0.1, model=model)
    noise = None
    if kind == "Flat-LoRA":
        noise = FlatLoRA(model, rho=0.1, total=epochs * len(torch.arange(len(few_x)).split(32)))
    run_epochs(optimizer, model, few_x, labels, epochs, around=noise)
    return accuracy(model, rotated["test"], data.test.y)


for kind in ("AdamW", "SAM over the adapters", "Flat-LoRA"):
    values = [fine_tune(kind, seed) for seed in range(3)]
    print(f"{kind:22} " + "  ".join(f"{value:.1f} %" for value in values))

# %% [markdown]
# Three seeds with one radius show how to write it, not which is better: choose rho first ([Choosing
# rho](choosing_rho.py)), then compare with intervals ([Comparing methods fairly](comparing_fairly.py)). What the
# variants cost in time and memory: [Adapters](../loops/adapters.md#what-it-costs).
