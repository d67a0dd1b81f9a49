"""One thread for torch: the nets are tiny, and results are then equal bit for bit from process to process."""

import torch

torch.set_num_threads(1)
