"""From examples to token ids: prompts, chat templates, labels, packed rows and batches."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from sbora_diffusion.core.errors import ConfigError, DataError
from sbora_diffusion.core.llm.config import Template
from sbora_diffusion.core.llm.data import Example

IGNORED = -100
"""The label of a token that no loss is taken on, as transformers has it."""

_TASK = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request."
)
_ALPACA = _TASK + "\n\n### Instruction:\n{0}\n\n### Response:\n"
# LLM-Adapters' scripts have the indentation of their source in the prompt, and so do the models.
_INDENT = " " * 16
_LLM_ADAPTERS = f"{_TASK} \n\n{_INDENT}### Instruction:\n{_INDENT}{{0}}\n\n{_INDENT}### Response:\n"
TEMPLATES: dict[str, str] = {
    "alpaca": _ALPACA,
    "llm-adapters": _LLM_ADAPTERS + _INDENT,
    "plain": "{0}\n",
}


def check_template(name: str) -> Template:
    """A template's name.

    Raises:
        ConfigError: there is none of this name.
    """
    for known in get_args(Template):
        if name == known:
            return known
    raise ConfigError(f"no template {name!r}", f"known are {', '.join(get_args(Template))}")


Row = dict[str, list[int]]
"""input_ids and labels of one example; position_ids too where a row packs several."""


@dataclass(frozen=True)
class Encoder:
    """How examples become rows.

    Attributes:
        tokenizer: of transformers; one without a padding token pads with its end token.
        template: "chat" takes the tokenizer's own.
    """

    tokenizer: Any
    template: Template
    max_length: int
    completion_only: bool = True

    def prompt(self, instruction: str) -> str:
        """What a model reads before it answers.

        Raises:
            ConfigError: the tokenizer has no chat template.
        """
        if self.template == "chat":
            return self._chat([{"role": "user", "content": instruction}], True)
        return TEMPLATES[self.template].format(instruction)

    def prompt_ids(self, instruction: str) -> list[int]:
        """The prompt's tokens, the same in training and in a test."""
        special = self.template != "chat"  # a chat template spells them itself
        return self.tokenizer(self.prompt(instruction), add_special_tokens=special)["input_ids"]

    def row(self, example: Example) -> Row:
        """Prompt, answer and end; cut off at `max_length`.

        Raises:
            DataError: the example has no output.
        """
        if not example.output:
            told = f"{example.instruction[:60]!r} has no output to learn"
            raise DataError(told, "give a training set, not a test set")
        prompt = self.prompt_ids(example.instruction)
        answer = self._answer_ids(example)
        ids = [*prompt, *answer][: self.max_length]
        skipped = len(prompt) if self.completion_only else 0
        return {"input_ids": ids, "labels": [IGNORED] * min(skipped, len(ids)) + ids[skipped:]}

    def rows(self, examples: Iterable[Example]) -> list[Row]:
        """All rows that have something to learn.

        Raises:
            DataError: no answer begins within `max_length`.
        """
        rows = [row for row in map(self.row, examples) if set(row["labels"]) - {IGNORED}]
        if not rows:
            raise DataError(f"no answer begins within {self.max_length} tokens", "raise max_length")
        return rows

    def _answer_ids(self, example: Example) -> list[int]:
        if self.template == "chat":
            turns = [
                {"role": "user", "content": example.instruction},
                {"role": "assistant", "content": example.output},
            ]
            text, prompt = self._chat(turns, False), self.prompt(example.instruction)
            if not text.startswith(prompt):
                raise ConfigError(
                    "the tokenizer's chat template changes the prompt once it is answered",
                    "choose another template",
                )
            return self._ids(text.removeprefix(prompt))
        return [*self._ids(example.output), self.tokenizer.eos_token_id]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _chat(self, turns: list[dict[str, str]], asks: bool) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            raise ConfigError("the tokenizer has no chat template", "choose template = 'alpaca'")
        return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=asks)


def packed(rows: Sequence[Row], length: int) -> list[Row]:
    """Rows of up to `length` tokens that hold several examples each, in their order.

    Positions count from 0 in each example, by which transformers keeps examples from attending to
    each other; the first label of each is ignored, so that none is asked to follow from another.
    """
    full: list[Row] = []
    for row in rows:
        ids, labels = row["input_ids"], [IGNORED, *row["labels"][1:]]
        if not full or len(full[-1]["input_ids"]) + len(ids) > length:
            full.append({"input_ids": [], "labels": [], "position_ids": []})
        last = full[-1]
        last["input_ids"] += ids
        last["labels"] += labels
        last["position_ids"] += range(len(ids))
    return full


@dataclass(frozen=True)
class Collator:
    """Rows to one batch, (rows, longest row), padded on the right."""

    padding: int

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        fills = {"input_ids": self.padding, "labels": IGNORED}
        batch = {
            key: torch.tensor([_filled(row[key], longest, fill) for row in rows])
            for key, fill in fills.items()
        }
        if "position_ids" in rows[0]:  # a mask would switch the separation of examples off
            positions = [[*r["position_ids"], *range(longest - len(r["input_ids"]))] for r in rows]
            batch["position_ids"] = torch.tensor(positions)
        else:
            lengths = torch.tensor([len(row["input_ids"]) for row in rows])
            batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
        return batch


def padding_id(tokenizer: Any) -> int:
    """The padding token, or the end token of a tokenizer without one."""
    found = tokenizer.pad_token_id
    return tokenizer.eos_token_id if found is None else found


def _filled(values: list[int], length: int, fill: int) -> list[int]:
    return values + [fill] * (length - len(values))
