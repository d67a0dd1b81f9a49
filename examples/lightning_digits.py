"""Lightning: digits with 40 % wrong labels, SGD and SAM compared, with two micro-batches in each step.

Run it in a clone of flatmin:

pip install '.[lightning,digits]'
python examples/lightning_digits.py
"""

import logging
import warnings

import lightning as L
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import flatmin
from flatmin.data.digits import load_digits
from flatmin.data.noise import symmetric_noise
from flatmin.integrations.lightning import SharpnessAware  # new
from flatmin.models.small import mlp

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", module="lightning")  # hints on data loader workers and logging
data = load_digits()
noisy = symmetric_noise(data.train.y, 0.4, data.num_classes, seed=0)


class Digits(SharpnessAware, L.LightningModule):  # new: SharpnessAware
    def __init__(self, method):
        super().__init__()
        self.net, self.method = mlp(data.num_classes), method

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def on_train_epoch_end(self):
        if self.current_epoch % 10 == 9:
            print(f"{self.method:4} epoch {self.current_epoch + 1:3}: loss {self.trainer.callback_metrics['loss']:.3f}")

    def configure_optimizers(self):
        base = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        optimizer = flatmin.wrap(base, self.method, rho=0.2, model=self)  # new
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)]


for method in ("sgd", "sam"):
    L.seed_everything(0, verbose=False)
    net = Digits(method)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(max_epochs=40, accumulate_grad_batches=2, gradient_clip_val=1.0, accelerator="cpu", **quiet)
    trainer.fit(net, DataLoader(TensorDataset(data.train.x, noisy), batch_size=32, shuffle=True))
    with torch.no_grad():
        right = (net.net(data.test.x).argmax(1) == data.test.y).float().mean()
    print(f"{method:4} test accuracy {100 * right:.1f} %")
