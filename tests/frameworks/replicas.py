"""Run under torchrun by test_hf.py: each process trains on its half of the data; the first saves the weights."""

import os
import sys

import torch


def main(folder, recipe):
    from tests.frameworks.test_hf import trained

    torch.set_num_threads(1)
    trainer = trained(folder, recipe, size=1, n=2)
    if trainer.args.process_index == 0:
        torch.save(trainer.model.state_dict(), f"{folder}/weights.pt")
    torch.distributed.barrier()
    # Taking the process group down can hang: torch waits, holding the GIL, for a gloo thread that wants it.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
