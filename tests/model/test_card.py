"""Model cards: their contents, that no text of a user is lost, and which card is uploaded."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model
from support.adapters import adapted, layers_of, spiel_config
from support.docs_blocks import code_blocks
from support.models import IDS, logits, tiny_llama
from transformers import Trainer, TrainingArguments

from spiel_peft import card as cards
from spiel_peft.card import BEGIN, END, TAGS, with_section
from spiel_peft.files.adapter_file import read_adapter, write_adapter


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def section_of(text: str) -> str:
    assert text.count(BEGIN) == text.count(END) == 1
    return text[text.index(BEGIN) : text.index(END)]


def test_it_says_method_budget_base_and_how_to_load(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    base = type(tiny_llama()).from_pretrained(tmp_path / "base")
    model = adapted(base, r=2, modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path / "adapter")
    card = card_of(tmp_path / "adapter")
    assert card.data.library_name == "peft" and card.data.base_model == str(tmp_path / "base")
    assert set(TAGS) <= set(card.data.tags) and "transformers" in card.data.tags
    text = section_of(card.text)
    k = sum(layer.spiel_delta["default"].k for layer in layers_of(model))
    size = sum(layer.info.numel for layer in layers_of(model))
    row = f"| default | SpIEL, growth accumulated_gradient | r=2 | {k} in 4 modules ({k / size:.2%} of their weights) |"
    assert row in text and "| lm_head |" in text and f"| {tmp_path / 'base'} |" in text
    assert "pip install spiel-peft" in text and "KeyError: 'SPIEL'" in text
    # The code in it loads the adapter.
    (code,) = code_blocks(text)
    names: dict[str, Any] = {}
    exec(code.replace("FOLDER_OR_HUB_ID", str(tmp_path / "adapter")), names)
    assert torch.equal(logits(names["model"]), logits(model))


def test_saving_again_changes_nothing(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    first = (tmp_path / "README.md").read_text()
    model.save_pretrained(tmp_path)
    model.create_or_update_model_card(str(tmp_path))
    cards.install()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == first


WRITTEN = """---
license: mit
tags:
- mine
---

A line above.

```bash
# no title
```

# My model

What I wrote. | a | table |

### Framework versions

- Torch 2
"""


def test_what_is_in_a_card_is_kept(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(WRITTEN)
    adapted().save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert card.data.license == "mit"
    lines = card.text.splitlines()
    kept = [line for line in WRITTEN.split("---\n")[-1].splitlines() if line]
    others = card.text.replace(section_of(card.text), "").splitlines()
    assert [line for line in others if line in kept] == kept
    assert lines.index("# My model") < lines.index(BEGIN) < lines.index("What I wrote. | a | table |")
    assert f"- PEFT {peft.__version__}" in lines


@pytest.mark.parametrize("text", ["", "no title", "# title", "# title\n\ntext", "a\n# b\nc"])
def test_the_section_comes_below_the_title_and_is_replaced_in_place(text: str) -> None:
    once = with_section(text, f"{BEGIN}\nold\n{END}")
    assert once.count(BEGIN) == 1 and all(line in once.splitlines() for line in text.splitlines())
    again = with_section(once, f"{BEGIN}\nnew\n{END}")
    assert again == once.replace("old", "new")


def test_several_adapters_share_a_card_and_other_methods_have_none_of_it(tmp_path: Path) -> None:
    model = adapted(density=0.1)
    model.add_adapter("french", spiel_config(num_deltas=50, growth="random"))
    model.save_pretrained(tmp_path / "two")
    text = section_of(card_of(tmp_path / "two").text)
    assert "| default | SpIEL, growth accumulated_gradient | density=0.1 |" in text
    assert "| french | SpIEL, growth random | num_deltas=50 | 50 in 4 modules" in text
    named = adapted(adapter="french")
    named.save_pretrained(tmp_path / "named")
    assert 'subfolder="french")' in section_of(card_of(tmp_path / "named").text)
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    assert BEGIN not in (tmp_path / "lora" / "README.md").read_text()
    assert not set(TAGS) & set(card_of(tmp_path / "lora").data.tags)


def test_a_name_cannot_break_the_table(tmp_path: Path) -> None:
    model = adapted()
    model.peft_config["default"].base_model_name_or_path = "a|b\n<script>"
    model.save_pretrained(tmp_path)
    rows = [line for line in section_of(card_of(tmp_path).text).splitlines() if line.startswith("| default")]
    assert len(rows) == 1 and rows[0].endswith("| a\\|b &lt;script> |")


def test_a_trainer_that_writes_its_own_card_keeps_the_section(tmp_path: Path) -> None:
    model = adapted()
    settings = {"output_dir": str(tmp_path), "max_steps": 1, "report_to": "none", "use_cpu": True}
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    trainer = Trainer(model, TrainingArguments(**settings, disable_tqdm=True), train_dataset=rows)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(model_name="my model")
    card = card_of(tmp_path)
    assert "## Training procedure" in card.text and "### Training hyperparameters" in card.text
    assert "pip install spiel-peft" in section_of(card.text) and set(TAGS) <= set(card.data.tags)


@pytest.mark.parametrize("on_hub", [False, True])
def test_the_card_is_in_the_folder_that_is_uploaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_hub: bool
) -> None:
    """`push_to_hub` writes the card of the hub, or an empty one, over the one of `save_pretrained`."""
    from transformers.utils import hub

    class Api:
        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return type("Url", (), {"repo_id": repo_id})

        def create_commit(self, repo_id: str, operations: list[Any], **_: Any) -> str:
            for operation in operations:
                target = tmp_path / "uploaded" / operation.path_in_repo
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(operation.path_or_fileobj, target)
            return "url"

    def load(repo_id_or_path: Any, *args: Any, **kwargs: Any) -> ModelCard:
        if str(repo_id_or_path) != "me/adapter":
            return real_load(repo_id_or_path, *args, **kwargs)
        if not on_hub:
            raise EntryNotFoundError("no card")
        return ModelCard(WRITTEN)

    real_load = ModelCard.load
    monkeypatch.setattr(ModelCard, "load", load)
    monkeypatch.setattr(hub, "hf_api", lambda: Api(), raising=False)
    monkeypatch.setattr(hub, "create_repo", Api().create_repo, raising=False)
    monkeypatch.setattr(hub, "create_commit", Api().create_commit, raising=False)
    adapted().push_to_hub("me/adapter", tags=["wanted"])
    uploaded = tmp_path / "uploaded"
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in uploaded.iterdir()}
    card = card_of(uploaded)
    assert 'PeftModel.from_pretrained(base, "me/adapter")' in section_of(card.text)
    assert "pip install spiel-peft" in section_of(card.text)
    assert card.data.library_name == "peft" and {*TAGS, "wanted"} <= set(card.data.tags)
    assert ("What I wrote. | a | table |" in card.text.splitlines()) == on_hub


def test_folders_written_without_a_model_have_cards_too(tmp_path: Path) -> None:
    adapted(num_deltas=50).save_pretrained(tmp_path / "adapter")
    write_adapter(read_adapter(tmp_path / "adapter"), tmp_path / "copy")
    assert "| num_deltas=50 | 50 in 4 modules |" in section_of(card_of(tmp_path / "copy").text)
    text = (tmp_path / "copy" / "README.md").read_text()
    (tmp_path / "copy" / "README.md").write_text(f"{text}\nMy remark.\n")
    write_adapter(read_adapter(tmp_path / "adapter"), tmp_path / "copy", overwrite=True)
    assert "My remark." in section_and_rest(tmp_path / "copy")


def section_and_rest(folder: Path) -> str:
    text = card_of(folder).text
    section_of(text)
    return text


def test_models_with_the_wrapped_methods_can_be_copied(tmp_path: Path) -> None:
    model = copy.deepcopy(adapted())
    assert PeftModel.create_or_update_model_card.__name__ == "create_or_update_model_card"
    model.save_pretrained(tmp_path)
    assert BEGIN in card_of(tmp_path).text
