"""skorch: digits with 40 % wrong labels, SGD and SAM compared. The optimizer is passed by its class.

Run it in a clone of flatmin:

pip install '.[skorch,digits]'
python examples/skorch_digits.py
"""

import torch
from skorch import NeuralNetClassifier
from skorch.callbacks import LRScheduler

import flatmin
from flatmin.data.digits import load_digits
from flatmin.data.noise import symmetric_noise
from flatmin.models.small import mlp

data = load_digits()
noisy = symmetric_noise(data.train.y, 0.4, data.num_classes, seed=0)

for method in ("sgd", "sam"):
    torch.manual_seed(0)
    net = NeuralNetClassifier(
        mlp,
        criterion=torch.nn.CrossEntropyLoss,
        optimizer=flatmin.SAM,  # was: torch.optim.SGD
        optimizer__base_optimizer=torch.optim.SGD,  # new
        optimizer__recipe=method,  # new
        optimizer__rho=0.2,  # new; a grid search may vary it
        optimizer__momentum=0.9,
        lr=0.05,
        batch_size=64,
        max_epochs=40,
        iterator_train__shuffle=True,
        train_split=None,
        callbacks=[LRScheduler("CosineAnnealingLR", T_max=40)],
        verbose=0,
    )
    net.fit(data.train.x, noisy)
    for epoch in range(9, 40, 10):
        print(f"{method:4} epoch {epoch + 1:3}: loss {net.history[epoch, 'train_loss']:.3f}")
    print(f"{method:4} test accuracy {100 * net.score(data.test.x, data.test.y):.1f} %")
