"""Without this package, the SHiRA export works, and loading a SpIEL adapter fails with a clear message."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.adapters import adapted
from support.models import IDS, logits, tiny_llama

from spiel_peft.convert import export_shira

from .helpers import in_plain_peft

SCRIPT = """
import sys, torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, LlamaForCausalLM
folder = sys.argv[1] + "/"
base = LlamaForCausalLM.from_pretrained(folder + "base")
for load in (
    lambda: PeftModel.from_pretrained(base, folder + "adapter"),
    lambda: PeftConfig.from_pretrained(folder + "adapter"),
    lambda: AutoPeftModelForCausalLM.from_pretrained(folder + "adapter"),
    lambda: base.load_adapter(folder + "adapter"),
):
    try:
        load()
        print("loaded")
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
model = PeftModel.from_pretrained(base, folder + "shira").eval()
with torch.no_grad():
    torch.save(model(torch.load(folder + "ids.pt")).logits, folder + "out.pt")
assert not [name for name in sys.modules if name.startswith("spiel")]
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor, list[str]]:
    """A folder with both adapters, the logits with the adapter, and what the script printed."""
    folder = tmp_path_factory.mktemp("plain")
    tiny_llama().save_pretrained(folder / "base")
    model = adapted(r=2, modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.add_(0.1)
    model.save_pretrained(folder / "adapter")
    result = export_shira(folder / "adapter", folder / "shira", folder / "base")
    assert result.num_deltas == 2 * 2 * (2 * 16 + 16 + 24) and result.notes == []
    torch.save(IDS, folder / "ids.pt")
    done = in_plain_peft(SCRIPT, folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, logits(model), done.stdout.splitlines()


def test_the_exported_shira_adapter_computes_the_same(run: tuple[Path, torch.Tensor, list[str]]) -> None:
    folder, expected, _ = run
    assert torch.equal(torch.load(folder / "out.pt"), expected)


def test_every_way_of_loading_the_adapter_names_the_method(run: tuple[Path, torch.Tensor, list[str]]) -> None:
    folder, _, printed = run
    assert printed == ["KeyError: 'SPIEL'"] * 4
    # The message ends there, so the card beside the adapter has to say what to do about it.
    card = (folder / "adapter" / "README.md").read_text()
    assert printed[0] in card and "pip install spiel-peft" in card and "import spiel_peft" in card
