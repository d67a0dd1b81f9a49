# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Comparing methods fairly
#
# Many gains of sharpness-aware methods vanish when the baseline gets the same care. A fair comparison has four things:
# paired seeds, a baseline of equal cost, cheap regularisers beside it, and a correction for the number of tests.
# `flatmin compare` does all four. Here it runs on data and a network of our own.
#
# This page needs `pip install '.[demo]'` in a clone of flatmin, and runs in a minute on one CPU core.
#
# ## Your data and your network
#
# A module with two functions is all that is needed: one returns the data, one builds the network.

# %%
from pathlib import Path

Path("my_task.py").write_text('''
import torch
from sklearn.datasets import load_wine


def load():
    """Training, validation and test data, each as a pair of inputs and labels."""
    x, y = load_wine(return_X_y=True)
    x, y = torch.as_tensor(x, dtype=torch.float32), torch.as_tensor(y)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    train, validation, test = order[:80], order[80:110], order[110:]
    x = (x - x[train].mean(0)) / x[train].std(0)
    return (x[train], y[train]), (x[validation], y[validation]), (x[test], y[test])


def build(num_classes):
    return torch.nn.Sequential(torch.nn.Linear(13, 64), torch.nn.ReLU(), torch.nn.Linear(64, num_classes))
''')

# %% [markdown]
# ## Run it
#
# In a terminal:
#
#     flatmin compare --data my_task:load --model my_task:build --noise 0.3 -m sgd -m sam -m asam --tune --seeds 5
#
# `--tune` chooses rho of each method on validation data, with the seeds of the table; nothing is chosen on test data.
# To choose with other seeds, write a study with `choose_seeds` ([Studies](../studies/your-own.md)). Three rows that
# take one gradient a step are added: more weight decay, a shorter schedule, and twice the epochs.

# %%
import subprocess
import sys

command = (
    "flatmin compare --data my_task:load --model my_task:build --noise 0.3 -m sgd -m sam -m asam --tune --seeds 5 "
    "epochs=20 timing=false measure=false --out wine --no-report"
)
done = subprocess.run([sys.executable, "-m", *command.split()], capture_output=True, text=True)
print(done.stdout[done.stdout.index("arm ") :] if done.returncode == 0 else done.stderr)

# %% [markdown]
# ## Read it
#
# - **vs sgd (paired)** is the mean difference over seeds with its 95 % interval. If the interval covers 0, no
#   difference is shown, however the means look.
# - **p (Holm)** is corrected for all tests of the column: the more methods one tries, the more often one wins by luck.
# - **vs plain, equal grads** compares with plain training for twice the epochs, which costs what SAM costs.
# - The sentences below the table say what follows, and no more.
#
# The numbers of every seed are in a CSV that pandas reads in one line:

# %%
rows = Path("wine/studies/comparison.seeds.csv").read_text().splitlines()
print("\n".join(rows[:4]))

# %% [markdown]
# ## Before you believe a difference
#
# - Five seeds show differences of a few points. Use `--seeds 10` for one point.
# - Finished runs are kept: the same command with more seeds trains only what is missing. With `--tune` the choice is
#   made again over all seeds, so that a row may change its setting. Decide the number of seeds before you look.
# - Add a method later and Holm's correction grows with it: decide the list before you look.
#
# [Compare](../studies/compare.md) explains every column, [Studies](../studies/index.md) larger comparisons.
