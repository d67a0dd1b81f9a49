"""PEFT: low-rank adapters of a tiny causal language model by AdamW, LoRA-SAM and Flat-LoRA, in float32 and bfloat16.

Run it in a clone of flatmin:

    pip install '.[hf]' peft
    python examples/peft_adapters.py

The model is built from a configuration, so nothing is downloaded. The whole model is first trained to count in steps of
one. Then only the adapters learn to count in steps of three, with a tenth of the tokens replaced at random.
"""

import contextlib
import copy

import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import flatmin
from flatmin.optim import FlatLoRA

TOKENS, STEPS = 16, 60


def batch(stride, wrong=0.1, size=16, length=12):
    ids = (torch.randint(TOKENS, (size, 1)) + stride * torch.arange(length)) % TOKENS
    return torch.where(torch.rand(ids.shape) < wrong, torch.randint(TOKENS, ids.shape), ids)


def loss_of(model, ids):
    return F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.no_grad()
def accuracy(model):
    ids = batch(3, wrong=0)
    right = model.eval()(input_ids=ids).logits[:, 2:-1].argmax(-1) == ids[:, 3:]
    model.train()
    return 100 * right.float().mean()


def train(model, optimizer, stride, noise, show=True):
    for step in range(STEPS):
        ids = batch(stride)

        def closure(ids=ids):
            optimizer.zero_grad()
            loss = loss_of(model, ids)
            loss.backward()
            return loss

        with noise:  # Flat-LoRA: noise during all passes of the step
            loss = optimizer.step(closure)
        if show and step % (STEPS // 4) == STEPS // 4 - 1:
            print(f"step {step + 1:3}: loss {loss.item():.3f}")


torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=TOKENS, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
)
start = LlamaForCausalLM(config)
train(start, torch.optim.AdamW(start.parameters(), lr=1e-2), 1, contextlib.nullcontext(), show=False)
print(f"accuracy before: {accuracy(start):.1f} %")
for dtype in (torch.float32, torch.bfloat16):
    for name in ("adamw", "lora-sam", "flat-lora"):
        torch.manual_seed(1)
        lora = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear")
        model = get_peft_model(copy.deepcopy(start).to(dtype), lora)  # adapters of bfloat16 models stay in float32
        adapters = [p for p in model.parameters() if p.requires_grad]
        base = torch.optim.AdamW(adapters, lr=4e-3)
        optimizer = flatmin.wrap(base, "sam" if name == "lora-sam" else "base", rho=0.05, model=model)  # new
        flat = FlatLoRA(model, rho=0.05 if name == "flat-lora" else 0.0, total=STEPS)  # new
        train(model, optimizer, 3, flat)
        print(f"{name}-{str(dtype).removeprefix('torch.')} test accuracy {accuracy(model):.1f} %")
