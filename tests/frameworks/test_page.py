"""The code of pages that need a framework runs. Its fences say `py`, since the ordinary tests run `python` ones."""

import re
from pathlib import Path

import pytest
import torch

import flatmin

DOCS = Path(__file__).parents[2] / "docs" / "loops"
# A page runs as a whole, since later blocks go on from earlier ones; of bases.md each section by itself.
NEEDS = {
    "lightning.md": "lightning",
    "hugging-face.md": "transformers",
    "accelerate.md": "accelerate",
    "skorch.md": "skorch",
    "adapters.md": "peft",
    "Muon": "pytorch_optimizer",
    "Lion": "lion_pytorch",
    "Schedule-free": "schedulefree",
    "8-bit": "bitsandbytes",
}


def sections():
    found = {page.name: page.read_text(encoding="utf-8") for page in DOCS.glob("*.md")}
    parts = re.split(r"^## (.*)\n", found.pop("bases.md"), flags=re.MULTILINE)[1:]
    found |= dict(zip(parts[::2], parts[1::2], strict=True))
    return {title: text for title, text in found.items() if "```py\n" in text}


def test_sections_are_known():
    assert set(sections()) == set(NEEDS)


def one_step(model, optimizer, x, y):
    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("title", NEEDS)
def test_python_runs(title, tmp_path, monkeypatch):
    pytest.importorskip(NEEDS[title], reason=f"needs {NEEDS[title]}: run make test-frameworks")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)

    class Module(torch.nn.Sequential):
        def __init__(self):
            super().__init__(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3))

    x, y = torch.randn(48, 6), torch.randint(3, (48,))
    model = Module()
    names = {
        "torch": torch,
        "flatmin": flatmin,
        "Module": Module,
        "model": model,
        "base": torch.optim.SGD(model.parameters(), lr=0.1),
        "loss_fn": torch.nn.CrossEntropyLoss(),
        "loader": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=12),
        "x": x,
        "y": y,
        "__name__": "page",
    }
    if NEEDS[title] in ("transformers", "peft"):
        from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, TrainingArguments

        if title == "adapters.md":
            sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
            model = names["language_model"] = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes))
        else:
            config = GPT2Config(vocab_size=20, n_positions=16, n_embd=16, n_layer=1, n_head=2)
            model = names["language_model"] = GPT2LMHeadModel(config)
        names["arguments"] = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], max_steps=2)
        names["sequences"] = [{"input_ids": row, "labels": row} for row in torch.randint(0, 20, (8, 10))]
    before = [p.detach().clone() for p in model.parameters()]
    for block in re.findall(r"^```py\n(.*?)^```", sections()[title], re.DOTALL | re.MULTILINE):
        exec(compile(block, title, "exec"), names)
    if title in ("Muon", "Lion", "8-bit"):  # which only build it
        one_step(names["model"], names["optimizer"], x, y)
    if "net" in names:
        assert names["net"].history[-1, "train_loss"] > 0
    else:
        assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
