"""Training and test examples from local JSON, in the formats that such data comes in."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sbora_diffusion.core.errors import DataError

MAX_FILE = 1 << 30
_CALCULATION = re.compile(r"<<[^>]*>>")


@dataclass(frozen=True)
class Example:
    """One instruction and its answer.

    Attributes:
        output: what a model learns to say; may be empty in a test set.
        answer: what counts as right in a test; empty where the data does not name it.
    """

    instruction: str
    output: str
    answer: str = ""


def read_examples(path: Path) -> list[Example]:
    """All examples of a `.json` (a list) or `.jsonl` file.

    Formats, told by their fields: LLM-Adapters and Alpaca (`instruction`, `input`, `output`,
    `answer`), GSM8K (`question`, `answer` with "####"), MAWPS (`original_text`, `equation`, `ans`),
    MMLU items (`input`, `output`, `subject`), conversations (`messages`, the last an assistant's).

    Raises:
        DataError: the file cannot be read, is empty, or an item has none of these forms.
    """
    items = _read(path)
    if not items:
        raise DataError(f"{path} has no examples", "give a file with at least one")
    return [_example(item, f"{path}, item {number}") for number, item in enumerate(items, 1)]


def read_all(paths: Iterable[Path]) -> list[Example]:
    """The examples of several files, one after another."""
    return [example for path in paths for example in read_examples(path)]


def _read(path: Path) -> list[Any]:
    try:
        if path.stat().st_size > MAX_FILE:
            raise DataError(f"{path} is larger than {MAX_FILE >> 20} MiB", "split it")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", "check the path") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8", "convert it") from error
    try:
        return list(_parsed(text))
    except (ValueError, RecursionError) as error:
        remedy = "give a list in one JSON document, or one JSON object a line"
        raise DataError(f"{path} is not JSON: {error}", remedy) from error


def _parsed(text: str) -> Iterator[Any]:
    if text.lstrip().startswith("["):
        yield from json.loads(text)
    else:
        yield from (json.loads(line) for line in text.splitlines() if line.strip())


def _example(item: Any, place: str) -> Example:
    for fields, read in _FORMATS:
        if isinstance(item, dict) and fields <= item.keys():
            try:
                example = read(item)
            except (KeyError, TypeError, ValueError, IndexError) as error:
                raise DataError(f"{place} cannot be read: {error}", _REMEDY) from error
            if not example.instruction or not (example.output or example.answer):
                raise DataError(f"{place} has an empty instruction or output", _REMEDY)
            return example
    names = sorted(item) if isinstance(item, dict) else type(item).__name__
    raise DataError(f"{place} has the fields {names}", _REMEDY)


def _instruction(item: dict[str, Any]) -> Example:
    parts = _text(item["instruction"]), _text(item.get("input", ""))
    output = _text(item["output"])
    return Example("\n".join(p for p in parts if p), output, _text(item.get("answer", "")))


def _gsm8k(item: dict[str, Any]) -> Example:
    """The rationale without the calculator's marks, and the answer as the tests ask for it."""
    rationale, mark, answer = _text(item["answer"]).rpartition("####")
    if not mark:
        raise ValueError("'answer' has no '####'")
    answer, steps = answer.strip().replace(",", ""), _CALCULATION.sub("", rationale).strip()
    return Example(_text(item["question"]), f"{steps}\nThe answer is {answer}.", answer)


def _mawps(item: dict[str, Any]) -> Example:
    answer, equation = _number(float(item["ans"])), _text(item["equation"])
    right = equation.rpartition("=")[2].replace(".0", "")
    return Example(
        _text(item["original_text"]), f"{right} = {answer}. The answer is {answer}.", answer
    )


def _mmlu(item: dict[str, Any]) -> Example:
    return Example(_text(item["input"]), _text(item["output"]), _text(item["output"]))


def _conversation(item: dict[str, Any]) -> Example:
    turns = item["messages"]
    roles = [turn["role"] for turn in turns]
    if roles[-2:] != ["user", "assistant"]:
        raise ValueError("'messages' must end with a user's and an assistant's turn")
    told = "\n".join(_text(turn["content"]) for turn in turns[:-1])
    return Example(told, _text(turns[-1]["content"]))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a text, found {value!r:.60}")
    return value.strip()


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)


_FORMATS: tuple[tuple[set[str], Callable[[dict[str, Any]], Example]], ...] = (
    ({"instruction", "output"}, _instruction),
    ({"question", "answer"}, _gsm8k),
    ({"original_text", "ans", "equation"}, _mawps),
    ({"subject", "input", "output"}, _mmlu),
    ({"messages"}, _conversation),
)
_REMEDY = (
    "known are: instruction and output (input and answer may stand beside them); question and "
    "answer; original_text, equation and ans; subject, input and output; messages"
)
