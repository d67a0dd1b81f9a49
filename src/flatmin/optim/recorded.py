"""Logits that were recorded some epochs ago: the reference of SAF's trajectory loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed


class RecordedLogits:
    r"""The logits of every training sample in the last epochs, by the sample's index.

    .. math::
        r_i = z_i \text{ as recorded E epochs ago}

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

    Both calls may stand in a closure: a sample's logits are recorded once in an epoch, those of the first pass, and a
    recall in the same epoch gives the same r in every pass. It takes samples x classes x (E + 1) numbers.

    Args:
        samples: N, how many there are; indices are 0 to N - 1.
        classes: K.
        epochs: E, how old the reference is, >= 1. Default 3 (the paper's code).
        device: where they are kept. Default the CPU.
        dtype: in which. Default float32.
        own_samples: says that with several processes each one sees the same samples in every epoch. Without it several
            processes are refused, since a sampler that deals the samples out anew in each epoch
            (`DistributedSampler(shuffle=True)`) brings a process samples that others have recorded. Default False.

    Raises:
        ValueError: a number below 1, or several processes without `own_samples`.

    Source: Du, Zhou, Feng, Tan & Zhou, Sharpness-Aware Training for Free, NeurIPS 2022 (SAF). Their code takes zero
    logits, a uniform distribution, for samples that have no record; here these have no part in the loss.
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
        several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
        if several and not own_samples:
            raise ValueError(
                "each of several processes records the samples that it sees; give every process the same samples in "
                "every epoch and say own_samples=True, or train with MESA, which records nothing."
            )
        self.epochs = epochs
        self._logits = torch.zeros(epochs + 1, samples, classes, device=device, dtype=dtype)
        # Before any epoch that is asked for: the first ones ask for -1, -2, ...
        self._epoch = torch.full((epochs + 1, samples), -epochs - 1, device=device, dtype=torch.int32)

    def __call__(self, index: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """What was recorded of these samples E epochs ago.

        Args:
            index: of the samples, shape (B,).
            epoch: the present one, counted from 0.

        Returns:
            r of shape (B, K), and which of them are known, shape (B,); zeros where they are not.

        Raises:
            IndexError, ValueError: indices or an epoch out of range.
        """
        index = self._checked(index, epoch)
        slot = (epoch + 1) % (self.epochs + 1)
        known = self._epoch[slot, index] == epoch - self.epochs
        return self._logits[slot, index].where(known[:, None], 0), known

    @torch.no_grad()
    def record(self, index: Tensor, logits: Tensor, epoch: int) -> None:
        """Keep the logits of these samples, unless they have been recorded in this epoch or are not finite.

        Args:
            index: of the samples, shape (B,).
            logits: of shape (B, K).
            epoch: the present one, counted from 0.

        Raises:
            IndexError, ValueError: indices, an epoch or a shape out of range.
        """
        index = self._checked(index, epoch)
        wanted = (len(index), self._logits.shape[2])
        if tuple(logits.shape) != wanted:
            raise ValueError(f"expected logits of shape {wanted}, got {tuple(logits.shape)}.")
        logits = logits.to(self._logits.device)
        slot = epoch % (self.epochs + 1)
        new = (self._epoch[slot, index] != epoch) & logits.isfinite().all(1)
        self._logits[slot, index[new]] = logits[new].to(self._logits.dtype)
        self._epoch[slot, index[new]] = epoch

    def _checked(self, index: Tensor, epoch: int) -> Tensor:
        if epoch < 0:
            raise ValueError(f"epochs are counted from 0, got {epoch!r}.")
        index = index.to(self._logits.device)
        samples = self._logits.shape[1]
        if index.device.type == "cpu" and len(index) and not 0 <= int(index.min()) <= int(index.max()) < samples:
            raise IndexError(
                f"sample indices must be from 0 to {samples - 1}, got {int(index.min())} to {int(index.max())}."
            )
        return index

    def state_dict(self) -> dict[str, Any]:
        """All that is recorded, on the CPU; with several processes each one saves its own."""
        return {"logits": self._logits.cpu(), "epoch": self._epoch.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave.

        Raises:
            ValueError: it is of another number of samples, classes or epochs.
        """
        if state["logits"].shape != self._logits.shape:
            raise ValueError(
                f"the checkpoint has recorded logits of shape {tuple(state['logits'].shape)} (epochs + 1, samples, "
                f"classes), and this has {tuple(self._logits.shape)}; build it with the checkpoint's numbers."
            )
        self._logits.copy_(state["logits"])
        self._epoch.copy_(state["epoch"])
