# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Choosing rho
#
# rho is the length of the ascent. Too small, and SAM is plain training at twice the cost. Too large, and the network
# does not train. It is chosen like a learning rate: on validation data, with the baseline in the grid.
#
# This page needs `pip install '.[digits,plot]'` in a clone of flatmin, and runs in a minute on one CPU core.

# %%
import matplotlib.pyplot as plt
import torch
from torch.nn import functional as F

import flatmin
from flatmin.data.digits import load_digits
from flatmin.data.noise import symmetric_noise
from flatmin.models.small import mlp
from flatmin.stats import paired, summarise

torch.set_num_threads(1)
data = load_digits()

# %% [markdown]
# ## A grid, with the baseline in it
#
# `rho=0` is the base optimizer, bit for bit and at its cost, so it belongs in the grid. The values grow by factors of
# two to three: the radius matters by its order of magnitude. The seed sets initial weights, wrong labels and batches,
# and is the same for every rho, so that differences are paired.


# %%
def validation_accuracy(rho, seed, epochs=12):
    torch.manual_seed(seed)
    labels = symmetric_noise(data.train.y, 0.4, num_classes=10, seed=seed)
    model = mlp()
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = flatmin.SAM(base, rho=rho, model=model)
    for _ in range(epochs):
        for index in torch.randperm(len(labels)).split(32):

            def closure(index=index):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(data.train.x[index]), labels[index])
                loss.backward()
                return loss

            optimizer.step(closure)
    model.eval()
    with torch.no_grad():
        return 100 * (model(data.val.x).argmax(1) == data.val.y).float().mean().item()


grid = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)
seeds = (0, 1, 2)
results = {rho: {seed: validation_accuracy(rho, seed) for seed in seeds} for rho in grid}

# %% [markdown]
# ## Means, and differences to the baseline
#
# `flatmin.stats.paired` gives the mean difference over the seeds with its 95 % interval.

# %%
step = 100 / len(data.val.y)  # accuracies on n samples move in steps of 100 / n
for rho, values in results.items():
    mean = summarise(list(values.values()), step=step)
    line = f"rho {rho:4}: {mean.mean:.1f} % on validation"
    if rho > 0:
        difference = paired(values, results[0.0], step=step)
        line += f"   {difference.mean:+.1f} +- {difference.half:.1f} against rho = 0"
    print(line)

best = max(grid, key=lambda rho: sum(results[rho].values()))
print(f"\nbest on validation: rho = {best}")

# %%
figure, axis = plt.subplots(figsize=(5, 3.2), layout="constrained")
for seed in seeds:
    axis.plot(range(len(grid)), [results[rho][seed] for rho in grid], color="#0072b2", alpha=0.3)
axis.plot(range(len(grid)), [sum(results[rho].values()) / len(seeds) for rho in grid], "o-", color="#0072b2")
axis.set_xticks(range(len(grid)), [str(rho) for rho in grid])
_ = axis.set(xlabel="rho", ylabel="validation accuracy, %")

# %% [markdown]
# ## Rules that save time
#
# - Choose on validation data and report the test accuracy of seeds that were not used to choose.
# - If the best value is at an end of the grid, widen the grid. If rho = 0 wins, do not use the method here.
# - A value of one method means nothing to another whose norm differs: ASAM's values are about ten times SAM's, although
#   its weights do not move ten times as far.
# - Choose again when batch size or learning rate change much.
# - The command line does all of this: `flatmin compare --tune rho=.05,.1,.2,.4` chooses on validation, then trains
#   fresh seeds.
# - Up to which radius the loss is linear can be measured ([radius](../measure/radius.md)), but that radius is far too
#   large to train with: it is a diagnostic, not a way to choose.
