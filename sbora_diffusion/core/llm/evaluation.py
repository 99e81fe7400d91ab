"""Accuracy in the paper's protocol: a model writes an answer, which is read and compared.

Greedily, or with the paper's four beams. (Its scripts also set a temperature of 0.1, top-p and
top-k, which do nothing without sampling.)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sbora_diffusion.core.llm.data import Example
from sbora_diffusion.core.llm.prompts import Encoder, padding_id
from sbora_diffusion.core.llm.tasks import Task

Report = Callable[[int, int], None]
NEW_TOKENS = {"commonsense": 32, "arithmetic": 256, "mmlu": 4}
"""Longest answers of the published scripts, by group of tasks."""


@dataclass(frozen=True)
class Writing:
    """How answers are written.

    Attributes:
        beams: 1 is greedy.
        new_tokens: longest answer.
        batch_size: questions at once; those of like length go together.
    """

    beams: int = 1
    new_tokens: int = 32
    batch_size: int = 32


@dataclass(frozen=True)
class Score:
    """What a model reached on one task.

    Attributes:
        answered: how many texts have an answer at all.
        texts: what the model wrote, in the order of the questions.
    """

    task: str
    right: int
    answered: int
    total: int
    texts: tuple[str, ...] = ()

    @property
    def accuracy(self) -> float:
        return self.right / self.total


def evaluate(
    model: Any,
    encoder: Encoder,
    task: Task,
    examples: Sequence[Example],
    writing: Writing,
    report: Report = lambda _done, _total: None,
) -> Score:
    """Ask a model all questions of a task."""
    prompts = [encoder.prompt_ids(example.instruction) for example in examples]
    texts = write(model, encoder.tokenizer, prompts, writing, report)
    pairs = list(zip(texts, examples, strict=True))
    right = sum(task.is_right(text, example.answer) for text, example in pairs)
    answered = sum(bool(task.read(text)) for text in texts)
    return Score(task.name, right, answered, len(examples), tuple(texts))


@torch.inference_mode()
def write(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    writing: Writing,
    report: Report = lambda _done, _total: None,
) -> list[str]:
    """What a model writes after each prompt, without the prompt."""
    order = sorted(range(len(prompts)), key=lambda k: len(prompts[k]))
    texts, padding = [""] * len(prompts), padding_id(tokenizer)
    was = model.training
    model.eval()
    for start in range(0, len(order), writing.batch_size):
        some = order[start : start + writing.batch_size]
        ids, mask = _padded_left([prompts[k] for k in some], padding, model.device)
        written = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            num_beams=writing.beams,
            max_new_tokens=writing.new_tokens,
            pad_token_id=padding,
            eos_token_id=tokenizer.eos_token_id,
            use_cache=True,
        )
        answers = tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
        for k, text in zip(some, answers, strict=True):
            texts[k] = text
        report(min(start + writing.batch_size, len(order)), len(order))
    model.train(was)
    return texts


def _padded_left(
    prompts: list[list[int]], padding: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids and mask, (prompts, longest): answers begin in one column."""
    longest = max(map(len, prompts))
    ids = [[padding] * (longest - len(p)) + p for p in prompts]
    mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
