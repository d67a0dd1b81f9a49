# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # SAM in your loop
#
# We train a small network on handwritten digits twice: with plain SGD, and with SAM around the same SGD. 40 % of the
# training labels are wrong, so that one can see the network memorise them.
#
# This page needs `pip install '.[digits,plot]'` in a clone of flatmin, and runs in half a minute on one CPU core.

# %%
import copy

import matplotlib.pyplot as plt
import torch
from torch.nn import functional as F

import flatmin
from flatmin.data.digits import load_digits
from flatmin.data.noise import symmetric_noise
from flatmin.models.small import conv

torch.set_num_threads(1)
data = load_digits()
train_x, true_y = data.train.x, data.train.y
train_y = symmetric_noise(true_y, 0.4, num_classes=10, seed=0)
wrong = train_y != true_y
print(f"{len(train_y)} training images, {wrong.sum()} with a wrong label; {len(data.test.y)} test images")

# %% [markdown]
# ## The loop without SAM
#
# A training loop as one writes it: zero the gradients, compute the loss, go backward, step.

# %%
torch.manual_seed(0)
start = conv()


def batches(generator):
    for index in torch.randperm(len(train_x), generator=generator).split(32):
        yield train_x[index], train_y[index]


@torch.no_grad()
def evaluate(model):
    """Test accuracy, and the share of the wrong labels that the model reproduces, both in percent."""
    model.eval()
    test = (model(data.test.x).argmax(1) == data.test.y).float().mean()
    memorised = (model(train_x[wrong]).argmax(1) == train_y[wrong]).float().mean()
    model.train()
    return 100 * test.item(), 100 * memorised.item()


def train_plain(epochs=25):
    model, generator = copy.deepcopy(start), torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    history = []
    for _ in range(epochs):
        for x, y in batches(generator):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        history.append(evaluate(model))
    return history


plain = train_plain()
print(f"last epoch: test accuracy {plain[-1][0]:.1f} %, {plain[-1][1]:.1f} % of the wrong labels memorised")

# %% [markdown]
# ## The loop with SAM
#
# Three lines change. The optimizer is wrapped, and between the first backward and the step stands a second one: inside
# `perturbed()` the weights are at `w + eps`, the worst point within a distance rho (to first order). The step then
# goes from w, with the gradient of the second backward.


# %%
def train_sam(method="sam", rho=0.15, epochs=25):
    model, generator = copy.deepcopy(start), torch.Generator().manual_seed(0)
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = flatmin.wrap(base, method, rho=rho, model=model)  # new
    history = []
    for _ in range(epochs):
        for x, y in batches(generator):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            with optimizer.perturbed():  # new
                F.cross_entropy(model(x), y).backward()  # new
            optimizer.step()
        history.append(evaluate(model))
    return history


sam = train_sam()
print(f"last epoch: test accuracy {sam[-1][0]:.1f} %, {sam[-1][1]:.1f} % of the wrong labels memorised")

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for axis, k, title in zip(axes, (0, 1), ("test accuracy, %", "wrong labels memorised, %"), strict=True):
    axis.plot([row[k] for row in plain], label="SGD", color="#6b7280")
    axis.plot([row[k] for row in sam], label="SAM", color="#0072b2")
    axis.set(xlabel="epoch", title=title)
    axis.legend(frameon=False)

# %% [markdown]
# One run of each proves nothing: seeds differ by several points here. [Comparing methods fairly](comparing_fairly.py)
# shows how to find out what is more than noise.
#
# ## Another method
#
# Every method is a name. Its parameters are keywords of `wrap`, and `flatmin methods vasso` in the terminal lists them.

# %%
vasso = train_sam("vasso", rho=0.15)
print(f"VaSSO: test accuracy {vasso[-1][0]:.1f} %, {vasso[-1][1]:.1f} % of the wrong labels memorised")

# %% [markdown]
# ## What a step did
#
# With `diagnostics=True` the optimizer records norms and cosines of each step, and the losses at w and at w + eps if
# the loss is a `flatmin.Criterion`.

# %%
model = copy.deepcopy(start)
base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
criterion = flatmin.Criterion(torch.nn.CrossEntropyLoss())
optimizer = flatmin.SAM(base, rho=0.15, model=model, criterion=criterion, diagnostics=True)
for x, y in batches(torch.Generator().manual_seed(0)):
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    with optimizer.perturbed():
        criterion(model(x), y).backward()
    optimizer.step()
for name in ("loss", "loss_perturbed", "cosine"):
    print(f"{name:15} {optimizer.diagnostics()[name]:.3f}")

# %% [markdown]
# ## Next
#
# - Your loop has a closure, accumulates gradients, or trains in mixed precision: [In your loop](../loops/index.md).
# - Which rho? [Choosing rho](choosing_rho.py).
# - Which method? [Methods by use](../methods/index.md).
