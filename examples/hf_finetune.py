"""Hugging Face Trainer: fine-tunes a tiny causal language model on Blake's Tyger, by AdamW and by AdamW with SAM.

Run it in a clone of flatmin:

    pip install '.[hf]'
    python examples/hf_finetune.py

The model is built from a configuration and its tokens are single characters, so nothing is downloaded. It is trained on
one verse, then fine-tuned on another; the printed perplexity is that of a third verse.
"""

import copy
import math
import tempfile

from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments, set_seed

from flatmin.integrations.hf import SAMTrainer  # was: from transformers import Trainer

VERSES = (
    "When the stars threw down their spears, and water'd heaven with their tears, did he smile his work to see? ",
    "Tyger Tyger, burning bright, in the forests of the night; what immortal hand or eye, could frame thy fearful "
    "symmetry? In what distant deeps or skies, burnt the fire of thine eyes? On what wings dare he aspire? ",
    "What the hand, dare seize the fire? What the hammer? What the chain, in what furnace was thy brain? ",
)
LETTERS = sorted(set("".join(VERSES)))


def blocks(text, length=32, stride=4):
    ids = [LETTERS.index(c) for c in text]
    cut = [ids[i : i + length] for i in range(0, len(ids) - length + 1, stride)]
    return [{"input_ids": c, "labels": c} for c in cut]


def train(model, method, text, steps):
    args = TrainingArguments(
        tempfile.mkdtemp(), max_steps=steps, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        learning_rate=3e-3, max_grad_norm=1.0, logging_steps=steps // 4, report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = SAMTrainer(model=model, args=args, train_dataset=blocks(text), recipe=method, rho=0.05)  # new: two words
    trainer.train()
    return trainer


set_seed(0)
config = LlamaConfig(
    vocab_size=len(LETTERS), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
)
start = train(LlamaForCausalLM(config), "sgd", VERSES[0], 60).model
for method in ("sgd", "sam"):
    set_seed(0)
    trainer = train(copy.deepcopy(start), method, VERSES[1], 60)
    loss = trainer.evaluate(blocks(VERSES[2]))["eval_loss"]
    print(f"{'adamw' if method == 'sgd' else method:5} perplexity of the last verse {math.exp(loss):.2f}")
