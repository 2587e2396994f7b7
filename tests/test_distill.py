"""examples/distill.py: the student it makes, its losses, and a run from end to end on a tiny model."""

from __future__ import annotations

import copy
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from helpers import assert_same_bits, tiny_llama

import distill
from _data import IGNORED_LABEL, AnswerCollator


def batch(labels: bool = True) -> dict[str, Tensor]:
    ids = torch.randint(1, 40, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    targets = ids.masked_fill(mask == 0, IGNORED_LABEL)
    targets[:, :4] = IGNORED_LABEL
    return {"input_ids": ids, "attention_mask": mask, **({"labels": targets} if labels else {})}


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    data = batch(labels=False)
    return model.eval()(**data, use_cache=False).logits[data["attention_mask"].bool()]


def test_student_takes_every_nth_layer_and_the_last() -> None:
    assert distill.teacher_layers(30, 15) == list(range(1, 30, 2))
    assert distill.teacher_layers(12, 4) == [2, 5, 8, 11]
    assert distill.teacher_layers(7, 3) == [1, 3, 6]
    with pytest.raises(ValueError, match="a student of 4 layers needs a teacher of more, this one has 4"):
        distill.teacher_layers(4, 4)


def test_student_is_the_teacher_without_the_other_layers() -> None:
    teacher = tiny_llama(layers=4)
    student = distill.make_student(teacher, [1, 3])
    assert student.config.num_hidden_layers == 2 and teacher.config.num_hidden_layers == 4
    cut = copy.deepcopy(teacher)
    cut.model.layers = torch.nn.ModuleList([cut.model.layers[i] for i in (1, 3)])
    cut.config.num_hidden_layers = 2
    assert_same_bits(logits(student), logits(cut))
    owned = {parameter.data_ptr() for parameter in teacher.parameters()}
    assert not owned & {parameter.data_ptr() for parameter in student.parameters()}


def test_losses_are_zero_for_the_teacher_itself_and_ignore_padding() -> None:
    teacher = tiny_llama(layers=4)
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
    teacher, student = tiny_llama(layers=1), tiny_llama(layers=1)
    torch.nn.init.normal_(student.model.layers[0].self_attn.q_proj.weight)
    torch.nn.init.normal_(student.lm_head.weight)
    data = batch()
    mine, theirs = distill.look(student, data), distill.look(teacher, data)
    real = data["attention_mask"].bool()
    tokens = [(b, t) for b, t in itertools.product(range(3), range(9)) if real[b, t]]
    s, t = mine.attention[0], theirs.attention[0]
    expected = sum(float(((s[b, h, q] - t[b, h, q]) ** 2).sum()) for b, q in tokens for h in range(2))
    assert float(distill.attention_loss(mine, theirs, real)) == pytest.approx(expected / len(tokens) / 2, rel=1e-4)
    s, t = mine.hidden[0], theirs.hidden[0]
    expected = sum(float((s[x] - t[x]).square().mean() / t[x].square().mean()) for x in tokens)
    assert float(distill.hidden_loss(mine, theirs, real)) == pytest.approx(expected / len(tokens), rel=1e-4)
    # A label is predicted from the token before it.
    learnt = distill.predicts_labels(data)
    assert learnt.tolist() == [[3 <= t < (5 if b == 0 else 8) for t in range(9)] for b in range(3)]
    expected = torch.nn.functional.kl_div(
        mine.logits[learnt].log_softmax(-1), theirs.logits[learnt].softmax(-1), reduction="batchmean"
    )
    assert float(distill.output_loss(mine, theirs, learnt)) == pytest.approx(float(expected), rel=1e-4)


WORDS = ["what", "comes", "after", "then", *(f"n{i}" for i in range(30))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of four layers with a word-level tokenizer, and pairs."""
    folder = tmp_path_factory.mktemp("distill")
    vocabulary = ["<pad>", "<unk>", "<end>", "User", "Assistant", ":", *WORDS]
    assert len(vocabulary) == 40
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<end>"
    ).save_pretrained(folder / "model")
    tiny_llama(layers=4).save_pretrained(folder / "model")
    lines = [json.dumps({"question": f"what comes after n{i}", "answer": f"then n{(i + 1) % 30}"}) for i in range(30)]
    (folder / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def arguments(folder: Path, output: Path, *more: str) -> list[str]:
    paths = ["--model", str(folder / "model"), "--data", str(folder / "pairs.jsonl"), "--output-dir", str(output)]
    return [*paths, "--r", "2", "--learning-rate", "1e-2", *more]


def test_run_from_end_to_end(folder: Path, tmp_path: Path) -> None:
    steps = ["--teacher-steps", "25", "--distillation-steps", "25", "--student-steps", "25", "--layers", "2"]
    assert distill.main(arguments(folder, tmp_path, *steps)) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["layers"] == [1, 3]
    assert results["teacher"] < results["base"] - 0.1
    for losses in (results["distillation_losses"], results["student_losses"]):
        assert len(losses) == 25 and sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert results["student_tuned"] < results["student_distilled"] - 0.1

    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert isinstance(student, LlamaForCausalLM) and student.config.num_hidden_layers == 2
    before = logits(student)
    tuned = PeftModel.from_pretrained(student, tmp_path / "student_adapter")
    adapted = {name.rpartition(".")[2] for name in tuned.peft_config["default"].target_modules}
    assert adapted >= {"q_proj", "down_proj"}
    assert not torch.equal(logits(tuned), before)
    teacher = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder / "model"), tmp_path / "teacher_adapter"
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "student")
    collator = AnswerCollator(tokenizer.pad_token_id)
    ids = tokenizer("what comes after n3 then n4")["input_ids"]
    data = collator([{"input_ids": ids, "labels": ids}])
    for model in (tuned, teacher, student):
        model.set_attn_implementation("eager")
    untuned = AutoModelForCausalLM.from_pretrained(tmp_path / "student", attn_implementation="eager")
    with torch.no_grad():
        assert distill.distillation_loss(tuned, teacher, data, [1, 3]) < distill.distillation_loss(
            untuned, teacher, data, [1, 3]
        )


def test_only_deltas_are_trained_in_the_last_step(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    args = distill.parse_args(arguments(folder, tmp_path, "--student-steps", "6"))
    base = tiny_llama(layers=4)
    base.set_attn_implementation("eager")
    student = distill.make_student(base, [1, 3])
    before = copy.deepcopy(student).state_dict()
    teacher = distill.with_deltas(base, args)
    teachers = {name: value.clone() for name, value in teacher.state_dict().items()}
    tuned, losses = distill.tune_student(student, teacher, itertools.repeat(batch()), [1, 3], args)
    assert losses[-1] < losses[0]
    for name, value in tuned.base_model.model.state_dict().items():
        if "spiel_" not in name:
            assert_same_bits(value, before[name.replace(".base_layer", "")], name)
    for name, value in teacher.state_dict().items():
        assert_same_bits(value, teachers[name], name)
    assert {name.rpartition(".")[2] for name, p in tuned.named_parameters() if p.requires_grad} == {"values"}


def test_bad_input_is_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert distill.main(arguments(folder, tmp_path, "--layers", "4")) == 2
    assert "--layers: a student of 4 layers needs a teacher of more" in capsys.readouterr().err
    (tmp_path / "empty.txt").write_text("\n")
    assert distill.main(arguments(folder, tmp_path, "--text", str(tmp_path / "empty.txt"))) == 2
    assert "empty.txt: no line with at least two tokens" in capsys.readouterr().err
