"""examples/distill.py: the student it makes, its losses, and a run from end to end on a tiny model."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from support.models import tiny_llama
from support.tensors import assert_same_bits
from support.text import tokenizer
from support.trainer_runs import QUIET
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig

import distill
from spiel_peft import SpIELConfig


def batch(labels: bool = True) -> dict[str, Tensor]:
    ids = torch.randint(1, 40, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    targets = ids.masked_fill(mask == 0, -100)
    targets[:, :4] = -100
    return {"input_ids": ids, "attention_mask": mask, **({"labels": targets} if labels else {})}


def llama_with_attentions(layers: int) -> nn.Module:
    """A Llama that returns its attention probabilities, which only the eager implementation does."""
    return tiny_llama(num_hidden_layers=layers, attn_implementation="eager")


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    data = batch(labels=False)
    return model.eval()(**data, use_cache=False).logits[data["attention_mask"].bool()]


def test_student_takes_every_nth_layer_and_the_last() -> None:
    assert distill.teacher_layers(30, 15) == list(range(1, 30, 2))
    assert distill.teacher_layers(12, 4) == [2, 5, 8, 11]
    assert distill.teacher_layers(7, 3) == [1, 3, 6]
    with pytest.raises(ValueError, match="a student of 4 layers needs a teacher of more, this one has 4"):
        distill.teacher_layers(4, 4)


def test_student_is_the_teacher_without_the_other_layers() -> None:
    teacher = tiny_llama(num_hidden_layers=4)
    student = distill.make_student(teacher, [1, 3])
    assert student.config.num_hidden_layers == 2 and teacher.config.num_hidden_layers == 4
    cut = copy.deepcopy(teacher)
    cut.model.layers = nn.ModuleList([cut.model.layers[i] for i in (1, 3)])
    cut.config.num_hidden_layers = 2
    assert_same_bits(logits(student), logits(cut))
    owned = {parameter.data_ptr() for parameter in teacher.parameters()}
    assert not owned & {parameter.data_ptr() for parameter in student.parameters()}


def test_losses_are_zero_for_the_teacher_itself_and_ignore_padding() -> None:
    teacher = llama_with_attentions(4)
    data = batch()
    assert float(distill.distillation_loss(teacher, teacher, data, range(4))) == pytest.approx(0, abs=1e-6)
    student = distill.make_student(teacher, [1, 3])
    loss = distill.distillation_loss(student, teacher, data, [1, 3])
    assert float(loss.detach()) > 0.01
    changed = {**data, "input_ids": data["input_ids"].clone()}
    changed["input_ids"][0, 6:] = 7
    again = distill.distillation_loss(student, teacher, changed, [1, 3])
    assert float(again.detach()) == pytest.approx(float(loss.detach()), rel=1e-5)


def test_losses_are_what_they_say() -> None:
    torch.manual_seed(0)
    heads = [torch.rand(3, 2, 9, 9).softmax(-1) for _ in range(2)]
    states, logits = ([torch.randn(3, 9, size) for _ in range(2)] for size in (16, 40))
    places = list(itertools.product(range(3), range(9)))
    s, t = heads
    expected = [sum(float(((s[b, h, q] - t[b, h, q]) ** 2).sum()) for h in range(2)) / 2 for b, q in places]
    assert distill.attention_error(s, t).flatten().tolist() == pytest.approx(expected, rel=1e-4)
    s, t = states
    expected = [float((s[x] - t[x]).square().mean() / t[x].square().mean()) for x in places]
    assert distill.hidden_error(s, t).flatten().tolist() == pytest.approx(expected, rel=1e-4)
    # A label is predicted from the token before it.
    learnt = torch.tensor([[3 <= t < (5 if b == 0 else 8) for t in range(9)] for b in range(3)])
    s, t = (scores[learnt] for scores in logits)
    expected = nn.functional.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="batchmean")
    assert float(distill.divergence(*logits, batch()["labels"])) == pytest.approx(float(expected), rel=1e-4)
    # Means over real tokens, and over the student's layers.
    teacher, student = llama_with_attentions(2), llama_with_attentions(1)
    data, shown = batch(), {"output_hidden_states": True, "output_attentions": True}
    seen = {name: data[name] for name in ("input_ids", "attention_mask")}
    mine, theirs = student(**seen, **shown), teacher(**seen, **shown)
    real = data["attention_mask"].bool()
    expected = distill.hidden_error(mine.hidden_states[1], theirs.hidden_states[2])[real].mean()
    expected += distill.attention_error(mine.attentions[0], theirs.attentions[1])[real].mean()
    expected += distill.divergence(mine.logits, theirs.logits, data["labels"])
    loss = distill.distillation_loss(student, teacher, data, [1])
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


WORDS = ["what", "comes", "after", "then", *(f"n{i}" for i in range(30))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of four layers with a word-level tokenizer, and pairs."""
    folder = tmp_path_factory.mktemp("distill")
    vocabulary = ["<pad>", "<unk>", "<end>", "User", "Assistant", ":", *WORDS]
    assert len(vocabulary) == 40
    made = tokenizer(vocabulary, eos="<end>", split_punctuation=True, max_length=None)
    made.save_pretrained(folder / "model")
    tiny_llama(num_hidden_layers=4).save_pretrained(folder / "model")
    lines = [json.dumps({"question": f"what comes after n{i}", "answer": f"then n{(i + 1) % 30}"}) for i in range(30)]
    (folder / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, float], Path]:
    """The held-out losses of a run, and its folder; what each distillation learns is checked on the way."""
    out = tmp_path_factory.mktemp("out")
    train = distill.Distiller.train

    def checked(self: distill.Distiller) -> None:
        train(self)
        first, *_, last = (entry["loss"] for entry in self.state.log_history if "loss" in entry)
        assert last < 0.9 * first

    paths = ["--model", str(folder / "model"), "--data", str(folder / "pairs.jsonl"), "--output-dir", str(out)]
    steps = ["--teacher-steps", "25", "--distillation-steps", "25", "--student-steps", "25", "--layers", "2"]
    rates = [word for phase in ("teacher", "distillation", "student") for word in (f"--{phase}-learning-rate", "1e-2")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill.Distiller, "train", checked)
        return distill.main([*paths, *steps, *rates, "--r", "2"]), out


def test_run_from_end_to_end(run: tuple[dict[str, float], Path], folder: Path) -> None:
    losses, out = run
    assert losses["teacher"] < losses["base"] - 0.1
    assert losses["student_tuned"] < losses["student_distilled"] - 0.1

    student = AutoModelForCausalLM.from_pretrained(out / "student")
    assert isinstance(student, LlamaForCausalLM) and student.config.num_hidden_layers == 2
    before = logits(student)
    tuned = PeftModel.from_pretrained(student, out / "student_adapter")
    adapted = {name.rpartition(".")[2] for name in tuned.peft_config["default"].target_modules}
    assert adapted >= {"q_proj", "down_proj"}
    assert not torch.equal(logits(tuned), before)
    teacher = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "model"), out / "teacher_adapter")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "student")
    ids = torch.tensor([tokenizer("what comes after n3 then n4")["input_ids"]])
    data = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    for model in (tuned, teacher, student):
        model.set_attn_implementation("eager")
    untuned = AutoModelForCausalLM.from_pretrained(out / "student", attn_implementation="eager")
    with torch.no_grad():
        assert distill.distillation_loss(tuned, teacher, data, [1, 3]) < distill.distillation_loss(
            untuned, teacher, data, [1, 3]
        )


def test_embeddings_stay_the_teachers(run: tuple[dict[str, float], Path], folder: Path) -> None:
    student, base = (AutoModelForCausalLM.from_pretrained(path) for path in (run[1] / "student", folder / "model"))
    for layer in ("get_input_embeddings", "get_output_embeddings"):
        assert_same_bits(getattr(student, layer)().weight, getattr(base, layer)().weight, layer)
    assert not torch.equal(student.model.layers[0].mlp.up_proj.weight, base.model.layers[1].mlp.up_proj.weight)


def test_only_deltas_are_trained_in_the_last_step(folder: Path, tmp_path: Path) -> None:
    base = tiny_llama(num_hidden_layers=4)
    base.set_attn_implementation("eager")
    student = distill.make_student(base, [1, 3])
    before = copy.deepcopy(student).state_dict()
    teacher = get_peft_model(base, SpIELConfig(r=2, target_modules="all-linear", init_weights=False))
    teachers = {name: value.clone() for name, value in teacher.state_dict().items()}
    rows = Dataset.from_list([{"input_ids": list(range(1, 9)), "labels": list(range(1, 9))}] * 8)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "model")
    trainer = distill.Distiller(
        model=student,
        args=SFTConfig(str(tmp_path), max_steps=6, learning_rate=1e-2, bf16=False, logging_steps=1, **QUIET),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=SpIELConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", accumulation_steps=2),
    )
    trainer.teacher, trainer.chosen = teacher, [1, 3]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    for name, value in trainer.model.base_model.model.state_dict().items():
        if "spiel_" not in name:
            assert_same_bits(value, before[name.replace(".base_layer", "")], name)
    for name, value in teacher.state_dict().items():
        assert_same_bits(value, teachers[name], name)
    assert {name.rpartition(".")[2] for name, p in trainer.model.named_parameters() if p.requires_grad} == {"values"}


def test_too_many_layers_are_refused(folder: Path, tmp_path: Path) -> None:
    paths = ["--model", str(folder / "model"), "--data", str(folder / "pairs.jsonl"), "--output-dir", str(tmp_path)]
    with pytest.raises(ValueError, match="--layers: a student of 4 layers needs a teacher of more"):
        distill.main([*paths, "--layers", "4"])
