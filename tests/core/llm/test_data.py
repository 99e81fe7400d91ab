"""Reading examples, and what of them a model sees and learns."""

import json

import pytest
import torch

from sbora_diffusion.core.errors import ConfigError, DataError
from sbora_diffusion.core.llm.data import Example, read_examples
from sbora_diffusion.core.llm.prompts import IGNORED, Collator, Encoder, packed
from tests.core.llm.tiny import examples, tiny_llama, tokenizer


def written(folder, content, name="data.json"):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    "item, expected",
    [
        (
            {"instruction": " How many? ", "input": "", "output": "\nA: 3.", "answer": "3.0"},
            Example("How many?", "A: 3.", "3.0"),
        ),
        (
            {"instruction": "Translate", "input": "hello", "output": "hallo"},
            Example("Translate\nhello", "hallo"),
        ),
        (
            {"question": "2 + 2?", "answer": "It is 2+2=<<2+2=4>>4.\n#### 1,004"},
            Example("2 + 2?", "It is 2+2=4.\nThe answer is 1004.", "1004"),
        ),
        (
            {"original_text": "Six times two?", "equation": "x=6.0*2.0", "ans": 12.0},
            Example("Six times two?", "6*2 = 12. The answer is 12.", "12"),
        ),
        ({"subject": "law", "input": "Q? A. B.", "output": "B"}, Example("Q? A. B.", "B", "B")),
        (
            {
                "messages": [
                    {"role": "user", "content": "hi"},
                    {"role": "assistant", "content": "ho"},
                ]
            },
            Example("hi", "ho"),
        ),
    ],
    ids=["llm-adapters", "alpaca", "gsm8k", "mawps", "mmlu", "messages"],
)
def test_each_format_is_known_by_its_fields(tmp_path, item, expected):
    assert read_examples(written(tmp_path, [item, item])) == [expected, expected]
    lines = "\n".join([json.dumps(item)] * 2)
    assert read_examples(written(tmp_path, lines, "data.jsonl")) == [expected, expected]


@pytest.mark.parametrize(
    "content, told",
    [
        ([{"prompt": "a", "completion": "b"}], r"item 1 has the fields \['completion', 'prompt'\]"),
        ([{"instruction": "a", "output": 3}], "item 1 cannot be read: expected a text, found 3"),
        ([{"instruction": "a", "output": " "}], "empty instruction or output"),
        ([{"question": "a", "answer": "12"}], "has no '####'"),
        ([{"original_text": "a", "equation": "x=1", "ans": "one"}], "could not convert"),
        ([{"messages": [{"role": "user", "content": "a"}]}], "must end with a user's"),
        (["a"], "item 1 has the fields str"),
        ([], "has no examples"),
        ("[{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_wrong_data_is_refused_in_one_line(tmp_path, content, told):
    with pytest.raises(DataError, match=told) as caught:
        read_examples(written(tmp_path, content))
    assert "\n" not in str(caught.value)


def test_missing_and_binary_files_are_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_examples(tmp_path / "none.json")
    (tmp_path / "b.json").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not UTF-8"):
        read_examples(tmp_path / "b.json")


@pytest.mark.parametrize("template", ["alpaca", "llm-adapters", "plain", "chat"])
def test_only_the_answer_is_learned(template):
    encoder = Encoder(tokenizer(), template, 400)
    row = encoder.row(Example("add 2 and 3", "it is 5"))
    learned = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label >= 0]
    text = tokenizer().decode(learned).replace(" ", "")
    assert text == ("itis5<end>" if template == "chat" else "itis5</s>")
    prompt = encoder.prompt_ids("add 2 and 3")
    assert row["input_ids"][: len(prompt)] == prompt
    assert row["labels"][: len(prompt)] == [IGNORED] * len(prompt)


def test_the_prompt_is_learned_too_where_that_is_wanted():
    row = Encoder(tokenizer(), "plain", 100, completion_only=False).row(Example("a", "b"))
    assert row["labels"] == row["input_ids"]


def test_long_examples_are_cut_and_those_without_an_answer_left_out():
    encoder = Encoder(tokenizer(), "plain", 8)
    rows = encoder.rows([Example("abc", "defghij"), Example("abcdefghij", "k")])
    assert [len(row["input_ids"]) for row in rows] == [8]
    with pytest.raises(DataError, match="no answer begins within 8 tokens"):
        encoder.rows([Example("abcdefghij", "k")])


def test_a_tokenizer_without_a_chat_template_is_refused():
    bare = tokenizer().__class__(tokenizer_object=tokenizer().backend_tokenizer, eos_token="</s>")
    with pytest.raises(ConfigError, match="no chat template"):
        Encoder(bare, "chat", 64).row(Example("a", "b"))


def test_packed_examples_do_not_see_each_other():
    rows = Encoder(tokenizer(), "plain", 64, completion_only=False).rows(examples(7))
    one_by_one, counts = [], []
    model, collate = tiny_llama(), Collator(0)
    for row in rows:
        batch = collate([row])
        one_by_one.append(model(**batch).loss.item())
        counts.append((batch["labels"][:, 1:] >= 0).sum().item())
    together = packed(rows, 64)
    assert 1 < len(together) < len(rows)
    batch = collate(together)
    assert (batch["labels"][:, 1:] >= 0).sum().item() == sum(counts)
    expected = sum(loss * n for loss, n in zip(one_by_one, counts, strict=True)) / sum(counts)
    assert model(**batch).loss.item() == pytest.approx(expected, rel=1e-5)


def test_padding_does_not_change_a_loss():
    rows = Encoder(tokenizer(), "plain", 64).rows([Example("a", "b"), Example("long one", "c d e")])
    batch = Collator(0)(rows)
    assert batch["attention_mask"].sum().item() == sum(len(row["input_ids"]) for row in rows)
    logits = tiny_llama()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    alone = tiny_llama()(torch.tensor([rows[0]["input_ids"]])).logits
    torch.testing.assert_close(logits[0, : alone.shape[1]], alone[0], atol=1e-5, rtol=1e-5)
