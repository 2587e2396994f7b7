"""examples/finetune.py: data, splitting, labels, argument errors, and one run from end to end."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import _args
import _data
import _model
import finetune
from _data import IGNORED_LABEL, Example, InputError

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
COLOURS = ["red", "green", "blue", "black", "white", "grey", "pink", "brown"]
THINGS = ["sky", "sea", "rose", "grass", "snow", "coal", "bear", "stone", "door", "car"]
WORDS = ["what", "colour", "is", "the", "it", "?", ".", *COLOURS, *THINGS]


def pair(question: str, answer: str) -> Example:
    return Example((("user", question),), answer)


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer with a chat template whose turns end in <end> and a line break."""
    special = ["<pad>", "<unk>", "<end>", "<user>", "<assistant>", "<system>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<end>")
    fast.add_special_tokens({"additional_special_tokens": special[3:]})
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A checkpoint of a random Llama of two layers, with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    """A jsonl file of 80 pairs that a tiny model can learn."""
    records = [
        {"question": f"what colour is the {thing} {second}?", "answer": f"it is {COLOURS[i % len(COLOURS)]}."}
        for i, thing in enumerate(THINGS)
        for second in THINGS[:8]
    ]
    return write_jsonl(tmp_path / "pairs.jsonl", records)


# -- reading ---------------------------------------------------------------------------------------


def test_jsonl_forms_may_be_mixed(tmp_path: Path) -> None:
    chat = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c?"},
        {"role": "assistant", "content": "d"},
    ]
    records = [{"question": " q ", "answer": "a"}, {"prompt": "p", "completion": "c"}, {"messages": chat}]
    path = write_jsonl(tmp_path / "mixed.jsonl", records)
    first_turn = (("system", "be brief"), ("user", "a?"))
    assert _data.read_jsonl(path) == [
        pair("q", "a"),
        pair("p", "c"),
        Example(first_turn, "b"),
        Example((*first_turn, ("assistant", "b"), ("user", "c?")), "d"),
    ]


def test_blank_lines_blank_pairs_and_repetitions_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    record = '{"question": "q", "answer": "a"}\n'
    path.write_bytes(f'\n{record}   \n{record}{{"question": "", "answer": "a"}}\r\n'.encode("utf-8-sig"))
    corpus = _data.load_corpus(path)
    assert (corpus.examples, corpus.duplicates, corpus.blank) == ([pair("q", "a")], 1, 1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "q"', r"x\.jsonl:2: not a JSON object: .*column"),
        ("[1]", r"x\.jsonl:2: expected a JSON object, got list"),
        ('{"question": "q", "text": "t"}', r"x\.jsonl:2: expected \"question\".*found 'question', 'text'"),
        ('{"question": "q", "answer": 3}', r'x\.jsonl:2: "answer" must be a string, got int'),
        ('{"messages": "hello"}', r'x\.jsonl:2: "messages" must be a list, got str'),
        ('{"messages": [{"role": "robot", "content": "c"}]}', r'x\.jsonl:2: every message needs a "role"'),
        ('{"messages": [{"role": "user"}]}', r'x\.jsonl:2: "content" must be a string, got NoneType'),
        ("\udcff", r"x\.jsonl:2: not UTF-8 text"),
    ],
)
def test_malformed_line_names_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "x.jsonl"
    good = b'{"question": "q", "answer": "a"}\n'
    path.write_bytes(good + line.encode("utf-8", "surrogateescape") + b"\n" + good)
    with pytest.raises(InputError, match=message):
        _data.read_jsonl(path)


def test_file_without_pairs_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    with pytest.raises(InputError, match=r"empty\.jsonl: no question-answer pairs in 2 lines"):
        _data.load_corpus(empty)
    blank = write_jsonl(tmp_path / "blank.jsonl", [{"question": "q", "answer": " "}])
    with pytest.raises(InputError, match=r"blank\.jsonl: no usable question-answer pairs \(1 read"):
        _data.load_corpus(blank)


def test_default_corpus_has_distinct_pairs_and_a_fixed_split() -> None:
    pytest.importorskip("chatterbot_corpus")
    corpus = _data.load_corpus(None)
    train, held_out = _data.split_examples(corpus.examples, 0.1)
    assert len(corpus.examples) > 500 and corpus.duplicates > 0
    assert 0.05 < len(held_out) / len(corpus.examples) < 0.15
    assert not {e.question.casefold() for e in train} & {e.question.casefold() for e in held_out}


# -- splitting -------------------------------------------------------------------------------------


def test_all_answers_and_spellings_of_a_question_are_on_one_side() -> None:
    spellings = ["Who are you?", "who are you", " WHO  are you ?!"]
    positions = {_data.split_position(pair(q, a)) for q in spellings for a in ("x", "y")}
    assert len(positions) == 1
    # sha256 of "who are you": the split depends neither on the machine nor on the process.
    assert positions == {0xB8F820FB0861AD0C / 2**64}
    chat = Example((("system", "s"), ("user", "Who are you?"), ("assistant", "x"), ("user", "And I?")), "y")
    assert _data.split_position(chat) in positions


def test_split_does_not_depend_on_the_order_of_the_data() -> None:
    examples = [pair(f"question {i}", "a") for i in range(300)]
    train, held_out = _data.split_examples(examples, 0.2)
    assert len(train) + len(held_out) == 300 and 30 < len(held_out) < 90
    assert _data.split_examples(examples[::-1], 0.2)[1] == held_out


def test_split_with_an_empty_side_is_refused() -> None:
    with pytest.raises(InputError, match="no (held-out|training) examples: 2 examples do not split"):
        _data.split_examples([pair("q", "a"), pair("q", "b")], 0.5)


# -- labels ----------------------------------------------------------------------------------------


def test_labels_cover_the_answer_and_its_end_only(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = _data.encode(pair("what colour is the sky?", "it is blue."), tokenizer, 64)
    assert tokens is not None
    learnt = [label for label in tokens["labels"] if label != IGNORED_LABEL]
    assert tokenizer.decode(learnt).split() == ["it", "is", "blue", ".", "<end>"]
    assert tokens["labels"][-len(learnt) :] == tokens["input_ids"][-len(learnt) :]
    # Generation starts from exactly the tokens whose labels are ignored.
    prompt, _ = _data.render(pair("what colour is the sky?", ""), tokenizer)
    assert _data.encode_prompt(prompt, tokenizer) == tokens["input_ids"][: -len(learnt)]


def test_too_long_answers_are_cut_and_too_long_prompts_dropped(tokenizer: PreTrainedTokenizerFast) -> None:
    example = pair("what colour is the sky?", "it is blue.")
    whole = _data.encode(example, tokenizer, 64)
    assert whole is not None
    learnt = _data.answer_tokens([whole])
    cut = _data.encode(example, tokenizer, len(whole["input_ids"]) - 2)
    assert cut is not None and cut["input_ids"] == whole["input_ids"][:-2]
    assert _data.encode(example, tokenizer, len(whole["input_ids"]) - learnt) is None
    with pytest.raises(InputError, match="every training prompt is longer than --max-length 2"):
        _data.encode_all([example], tokenizer, 2, "training")


def test_model_without_chat_template_gets_plain_turns(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    prompt, completion = _data.render(pair("what is it?", "the sky."), tokenizer)
    assert (prompt, completion) == ("User: what is it?\nAssistant:", " the sky.<end>")


def test_collator_pads_right_and_ignores_padding() -> None:
    batch = _data.AnswerCollator(pad_token_id=9)(
        [
            {"input_ids": [1, 2, 3], "labels": [IGNORED_LABEL, 2, 3]},
            {"input_ids": [4], "labels": [4]},
        ]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED_LABEL, 2, 3], [4, IGNORED_LABEL, IGNORED_LABEL]]


def test_held_out_loss_weighs_every_answer_token_the_same(model_dir: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    examples = [pair("what is the sky?", "blue."), pair("the sea?", "it is blue blue blue grey.")]
    encoded = _data.encode_all(examples, tokenizer, 64, "held-out")
    collator = _data.AnswerCollator(tokenizer.pad_token_id)
    sums, count = 0.0, 0
    with torch.no_grad():
        for tokens in encoded:
            logits = model(torch.tensor([tokens["input_ids"]])).logits[0, :-1].log_softmax(-1)
            for position, label in enumerate(tokens["labels"][1:]):
                if label != IGNORED_LABEL:
                    sums, count = sums - float(logits[position, label]), count + 1
    for batch_size in (1, 2):
        loss = _model.held_out_loss(model, encoded, collator, batch_size)
        assert loss == pytest.approx(sums / count, rel=1e-5)


# -- arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--r", "0"], "--r: must be at least 1, got 0"),
        (["--r", "8", "--density", "0.1"], "not allowed with argument"),
        (["--max-steps", "5", "--epochs", "1"], "not allowed with argument"),
        (["--held-out", "1"], "--held-out: must be between 0 and 1, got 1"),
        (["--learning-rate", "nan"], "--learning-rate: must be a number above 0, got nan"),
        (["--batch-size", "many"], "--batch-size: invalid positive_int value: 'many'"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_wrong_argument_is_one_line_and_exit_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        _args.parse_args(arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error and error.count("\n") == 1


BAD_INPUT = {
    # Arguments that parse but name something unusable, and the message that each must give.
    "missing data": ("--model {model} --data {tmp}/no.jsonl", "no.jsonl: No such file"),
    "data is a folder": ("--model {model} --data {tmp}", "Is a directory"),
    "empty data": ("--model {model} --data {tmp}/empty.jsonl", "no question-answer pairs"),
    "missing model": ("--model {tmp}/none --data {pairs}", "no such file or folder"),
    "model is a text file": ("--model {tmp}/file --data {pairs}", "not a .gguf"),
    "folder without model": ("--model {tmp}/void --data {pairs}", "has no config.json"),
    "unknown hub id": ("--model no-such-owner/no-such-model --data {pairs}", "no-such-owner/no-such-model"),
    "output is a file": ("--model {model} --data {pairs} --output-dir {tmp}/file", "--output-dir"),
    "output under a file": ("--model {model} --data {pairs} --output-dir {tmp}/file/x", "--output-dir"),
    "density above one": ("--model {model} --data {pairs} --density 1.5", "density"),
    "unknown growth": ("--model {model} --data {pairs} --growth sideways", "sideways"),
    "prompts too long": ("--model {model} --data {pairs} --max-length 3", "--max-length 3: raise it"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_one_line_and_2_before_the_model_is_loaded(
    arguments: str,
    message: str,
    tmp_path: Path,
    model_dir: Path,
    pairs_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(finetune, "load_base", lambda *a, **k: pytest.fail("the model was loaded"))
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "void").mkdir()
    (tmp_path / "empty.jsonl").touch()
    names = {"tmp": tmp_path, "model": model_dir, "pairs": pairs_file}
    status = finetune.main(["--output-dir", str(tmp_path / "out"), *arguments.format(**names).split()])
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith("finetune.py: error: ") and error.count("\n") == 1
    assert message in error


def test_4bit_of_a_gguf_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.gguf").touch()
    arguments = ["--model", str(tmp_path), "--output-dir", str(tmp_path / "out"), "--load-in-4bit"]
    assert finetune.main(arguments) == 2
    assert "--load-in-4bit cannot quantize a GGUF file (model.gguf)" in capsys.readouterr().err


def test_unknown_target_module_is_one_line(
    tmp_path: Path, model_dir: Path, pairs_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(model_dir), "--data", str(pairs_file), "--output-dir", str(tmp_path / "out")]
    assert finetune.main([*arguments, "--target-modules", "no_such_proj"]) == 2
    assert "no_such_proj" in capsys.readouterr().err


# -- end to end ------------------------------------------------------------------------------------


def test_whole_run_on_a_tiny_model(
    tmp_path: Path, model_dir: Path, pairs_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["--model", str(model_dir), "--data", str(pairs_file), "--output-dir", str(out)]
    arguments += ["--density", "0.2", "--max-steps", "16", "--regrow-every", "5", "--accumulation-steps", "2"]
    arguments += [
        "--learning-rate",
        "3e-2",
        "--batch-size",
        "8",
        "--max-new-tokens",
        "4",
        "--eval-every",
        "8",
    ]
    assert finetune.main(arguments) == 0

    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 16 and len(summary["train_loss"]) == 16
    assert summary["held_out_loss_after"] < summary["held_out_loss_before"] - 0.3
    assert set(summary["held_out_loss"]) == {"0", "8", "16"}
    assert [row["step"] for row in summary["cycle"]] == [2, 7, 12]
    churn = [row["churn"] for row in summary["cycle"]]
    assert churn[0] > churn[1] > churn[2] > 0
    assert summary["merge_max_logit_difference"] < 1e-5

    for picture in ("loss_curve.png", "deltas.png"):
        assert (out / picture).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    saved = load_file(out / "adapter" / "adapter_model.safetensors")
    values = sum(t.numel() for name, t in saved.items() if name.endswith("spiel_delta.values"))
    assert values == summary["trainable_parameters"] > 0
    merged = AutoModelForCausalLM.from_pretrained(out / "merged")
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    changed = sum(int((a != b).sum()) for a, b in zip(merged.parameters(), base.parameters(), strict=True))
    assert 0 < changed <= values

    text = capsys.readouterr().out
    for expected in ("trainable params:", "held out", "Cycle", "before", "after", "reference", "Saved"):
        assert expected in text


@pytest.mark.parametrize(
    "options",
    ["--load-in-4bit", "--bf16 --gradient-checkpointing --grad-accum 2", "--growth momentum --epochs 0.2 --no-merge"],
    ids=["4bit", "bf16", "momentum"],
)
def test_other_ways_to_run(
    options: str, tmp_path: Path, model_dir: Path, pairs_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "4bit" in options:
        pytest.importorskip("bitsandbytes")
    arguments = ["--model", str(model_dir), "--data", str(pairs_file), "--output-dir", str(tmp_path), *options.split()]
    if "--epochs" not in options:
        arguments += ["--max-steps", "3"]
    assert finetune.main([*arguments, "--density", "0.2", "--learning-rate", "1e-2", "--max-new-tokens", "2"]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["held_out_loss_after"] < summary["held_out_loss_before"]
    unmerged = "4bit" in options or "--no-merge" in options
    assert (tmp_path / "merged").exists() != unmerged
    text = capsys.readouterr().out
    assert ("not saved: rounding back to 4 bits" in text) == ("4bit" in options)
