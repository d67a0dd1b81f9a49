# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Is my minimum flat?
#
# "Flat" can mean many things: small eigenvalues of the Hessian, a loss that rises little in the worst direction, or in
# a random one. We train two networks, with SGD and with SAM, and measure all three, with their errors.
#
# This page needs `pip install '.[digits,plot]'` in a clone of flatmin, and runs in half a minute on one CPU core.

# %%
import matplotlib.pyplot as plt
import torch

import flatmin
from flatmin.data.digits import load_digits
from flatmin.measure import Hessian, Problem, average_case, spectrum, trace, worst_case
from flatmin.models.small import conv

torch.set_num_threads(1)
data = load_digits()
x, y = data.train.x, data.train.y
loss_fn = torch.nn.CrossEntropyLoss(label_smoothing=0.1)  # with it both networks reach about the same train loss


def train(method, epochs=15):
    torch.manual_seed(0)
    model = conv()
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = flatmin.wrap(base, method, rho=0.1, model=model)
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(32):

            def closure(index=index):
                optimizer.zero_grad()
                loss = loss_fn(model(x[index]), y[index])
                loss.backward()
                return loss

            optimizer.step(closure)
    return model.eval()


models = {name: train(name) for name in ("base", "sam")}  # "base" is the base optimizer alone, in the same loop

# %% [markdown]
# ## A problem is what is measured
#
# A `Problem` is the mean loss of a model over data, as a function of its weights. Any model, loss function and loader
# will do. For a saved network, load its weights first: `flatmin.load(run)` for a run of flatmin, or
# `model.load_state_dict(torch.load(path))` for your own.

# %%
loader = [(x[i : i + 300], y[i : i + 300]) for i in range(0, len(x), 300)]
problems = {name: Problem(model, loss_fn, loader, split="train") for name, model in models.items()}
for name, problem in problems.items():
    with torch.no_grad():
        accuracy = (models[name](data.test.x).argmax(1) == data.test.y).float().mean()
    print(f"{name:5} train loss {problem.value():.4f}   test accuracy {100 * accuracy:.1f} %")

# %% [markdown]
# ## Curvature
#
# The largest eigenvalue of the Hessian is the curvature in the sharpest direction; the trace is the sum of all
# eigenvalues. Both come from products with the Hessian: no matrix is formed.

# %%
for name, problem in problems.items():
    hessian = Hessian(problem)
    eigen = spectrum(hessian, top=2)
    estimate = trace(hessian, eigen, tol=0.03)
    print(f"{name:5} lambda_1 = {eigen.top[0]:.2f}   trace = {estimate.value:.1f} +- {estimate.error:.1f}")

# %% [markdown]
# ## Sharpness
#
# The worst case is the largest rise of the loss that is found within a distance rho; SAM works against it. The average
# case is the mean rise in random directions of that length.

# %%
radii = (0.1, 0.2, 0.4)
figure, axis = plt.subplots(figsize=(5, 3.2), layout="constrained")
for name, problem in problems.items():
    worst = [worst_case(problem, rho, steps=5).value for rho in radii]
    mean = [average_case(problem, rho, draws=20).value for rho in radii]
    color = {"base": "#6b7280", "sam": "#0072b2"}[name]
    axis.plot(radii, worst, "o-", color=color, label=f"{name}: worst case")
    axis.plot(radii, mean, "o--", color=color, label=f"{name}: average case")
axis.set(xlabel="rho", ylabel="rise of the loss")
_ = axis.legend(frameon=False)

# %% [markdown]
# The average case lies at 0 here: among tens of thousands of directions a random one is almost always flat.
#
# ## What may be concluded
#
# - Compare at equal train loss. The curvature of cross-entropy goes to 0 with the loss, so a network that fits better
#   can look flatter without being a better minimum.
# - One pair of networks is one pair. Measure several seeds: `flatmin measure digits --arm sgd --arm sam` does so for
#   the runs of `flatmin compare`, with paired differences.
# - Flatness in one sense need not go with flatness in another: [Measure](../measure/index.md) has all of them.
#
# For a saved run, one command does all of the above and writes a page: `flatmin measure RUN`.
