"""Accelerate: digits with 40 % wrong labels, SGD and SAM compared, with two micro-batches in each step.

Run it in a clone of flatmin:

pip install '.[hf,digits]'
python examples/accelerate_loop.py
"""

import contextlib
import itertools

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import flatmin
from flatmin.data.digits import load_digits
from flatmin.data.noise import symmetric_noise
from flatmin.models.small import mlp

data = load_digits()
noisy = symmetric_noise(data.train.y, 0.4, data.num_classes, seed=0)
accelerator = Accelerator(cpu=True)

for method in ("sgd", "sam"):
    set_seed(0)
    model = mlp(data.num_classes)
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    sam = flatmin.wrap(base, method, rho=0.2, model=model, scaler=accelerator.scaler)  # new
    loader = DataLoader(TensorDataset(data.train.x, noisy), batch_size=32, shuffle=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(sam, 40 * len(loader))
    model, optimizer, loader, schedule = accelerator.prepare(model, sam, loader, schedule)
    for epoch in range(40):
        losses, batches = [], iter(loader)
        while held := list(itertools.islice(batches, 2)):
            for evaluation in sam.passes():  # new: every pass sees every micro-batch
                with evaluation:
                    for i, (x, y) in enumerate(held):
                        last = i == len(held) - 1
                        with contextlib.nullcontext() if last else accelerator.no_sync(model):
                            loss = F.cross_entropy(model(x), y) / len(held)
                            accelerator.backward(loss)
                        if evaluation.index == 0:
                            losses.append(len(held) * loss.item())
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        if epoch % 10 == 9:
            print(f"{method:4} epoch {epoch + 1:3}: loss {sum(losses) / len(losses):.3f}")
    with torch.no_grad():
        right = (model(data.test.x).argmax(1) == data.test.y).float().mean()
    print(f"{method:4} test accuracy {100 * right:.1f} %")
