"""Logits recorded in earlier epochs: the reference of SAF's trajectory loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flatmin.optim.support import processes


class RecordedLogits:
    """Stores the logits of every training sample in the last epochs, by the sample's index.

        r_i = z_i as recorded E epochs ago

        >>> import torch
        >>> from flatmin.methods.losses import trajectory
        >>> from flatmin.optim import RecordedLogits
        >>> memory = RecordedLogits(samples=100, classes=3)
        >>> index, z = torch.tensor([4, 17]), torch.randn(2, 3)
        >>> for epoch in range(4):
        ...     r, known = memory(index, epoch)
        ...     term = trajectory(z, r, known=known)
        ...     memory.record(index, z, epoch)
        >>> known
        tensor([True, True])

    Both calls may be made inside a closure: the logits of a sample are recorded once in an epoch, in the first pass,
    and all calls in one epoch return the same r. The memory holds N * K * (E + 1) numbers.

    Args:
        samples: N, the number of samples. Indices are 0 to N - 1.
        classes: K, the number of classes.
        epochs: E, the age of the reference in epochs, >= 1. Default 3 (the paper's code).
        device: where the logits are stored. Default: the CPU.
        dtype: the dtype in which they are stored. Default float32.
        own_samples: set it to True if several processes train and each one sees the same samples in every epoch.
            Without it several processes are an error, since `DistributedSampler(shuffle=True)` gives a process samples
            that other processes have recorded. Default False.

    Raises:
        ValueError: a number below 1, or several processes without `own_samples`.

    Source: Du, Zhou, Feng, Tan & Zhou, Sharpness-Aware Training for Free, NeurIPS 2022 (SAF). For samples without a
    record their code uses zero logits (a uniform distribution); here such samples do not enter the loss.
    """

    def __init__(
        self,
        samples: int,
        classes: int,
        epochs: int = 3,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        own_samples: bool = False,
    ) -> None:
        for name, value in (("samples", samples), ("classes", classes), ("epochs", epochs)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value!r}.")
        if processes() > 1 and not own_samples:
            raise ValueError(
                "each process records only the samples that it sees; give every process the same samples in every "
                "epoch and pass own_samples=True, or train with MESA, which records nothing."
            )
        self.epochs = epochs
        self._logits = torch.zeros(epochs + 1, samples, classes, device=device, dtype=dtype)
        # Smaller than all epochs that are looked up: the first ones look up -1, -2, ...
        self._epoch = torch.full((epochs + 1, samples), -epochs - 1, device=device, dtype=torch.int32)

    def __call__(self, index: Tensor | Sequence[int] | int, epoch: int) -> tuple[Tensor, Tensor]:
        """The logits of these samples that were recorded E epochs ago.

        Args:
            index: indices of the samples: whole numbers of shape (B,), a list, or a single number.
            epoch: the current epoch, counted from 0.

        Returns:
            r of shape (B, K), and booleans of shape (B,): whether there is a record. r is zero where there is none.

        Raises:
            IndexError, ValueError: indices or epoch out of range, or indices of another shape.
            TypeError: indices that are not whole numbers, such as a mask.
        """
        index = self._checked(index, epoch)
        slot = (epoch + 1) % (self.epochs + 1)
        known = self._epoch[slot, index] == epoch - self.epochs
        return self._logits[slot, index].where(known[:, None], 0), known

    @torch.no_grad()
    def record(self, index: Tensor | Sequence[int] | int, logits: Tensor, epoch: int) -> None:
        """Record the logits of these samples; further calls for a sample in the same epoch have no effect.

        If the logits of a sample are not finite in the dtype of the memory, the sample has no record of this epoch.

        Args:
            index: indices of the samples: whole numbers of shape (B,), a list, or a single number.
            logits: shape (B, K).
            epoch: the current epoch, counted from 0.

        Raises:
            IndexError, ValueError, TypeError: bad indices (as above), or logits of another shape.
        """
        index = self._checked(index, epoch)
        wanted = (len(index), self._logits.shape[2])
        if tuple(logits.shape) != wanted:
            raise ValueError(f"expected logits of shape {wanted}, got {tuple(logits.shape)}.")
        logits = logits.to(self._logits.device, self._logits.dtype)
        slot = epoch % (self.epochs + 1)
        # Marks a sample whose logits in this epoch were not finite; smaller than all epochs that are looked up.
        none = -self.epochs - 2 - epoch
        last = self._epoch[slot, index]
        new, finite = (last != epoch) & (last != none), logits.isfinite().all(1)
        self._epoch[slot, index[new & ~finite]] = none
        kept = index[new & finite]
        self._logits[slot, kept] = logits[new & finite]
        self._epoch[slot, kept] = epoch

    def _checked(self, index: Tensor | Sequence[int] | int, epoch: int) -> Tensor:
        if epoch < 0:
            raise ValueError(f"epochs are counted from 0, got {epoch!r}.")
        index = torch.as_tensor(index, device=self._logits.device)
        if index.dtype == torch.bool or index.is_floating_point() or index.is_complex():
            raise TypeError(f"expected sample indices that are whole numbers, got {index.dtype}.")
        if index.ndim > 1:
            raise ValueError(f"expected indices of shape (B,), got {tuple(index.shape)}.")
        index = index.reshape(-1).long()
        samples = self._logits.shape[1]
        if index.device.type == "cpu" and len(index) and not 0 <= int(index.min()) <= int(index.max()) < samples:
            raise IndexError(
                f"sample indices must be from 0 to {samples - 1}, got {int(index.min())} to {int(index.max())}."
            )
        return index

    def state_dict(self) -> dict[str, Any]:
        """Copies of all records on the CPU. With several processes each process must save its own."""
        return {"logits": self._logits.to("cpu", copy=True), "epoch": self._epoch.to("cpu", copy=True)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the result of `state_dict`.

        Raises:
            ValueError: the number of samples, classes or epochs differs.
        """
        if state["logits"].shape != self._logits.shape:
            raise ValueError(
                f"the checkpoint has recorded logits of shape {tuple(state['logits'].shape)} (epochs + 1, samples, "
                f"classes), but this object has {tuple(self._logits.shape)}; build it with the checkpoint's numbers."
            )
        self._logits.copy_(state["logits"])
        self._epoch.copy_(state["epoch"])
