"""The paper's test tasks: how an answer is read, when it is right, and what is contaminated.

Answers are read as in the LLM-Adapters scripts (arXiv 2304.01933): the last number of a text for
arithmetic, the first of the allowed words for multiple choice.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sbora_diffusion.core.errors import ConfigError, DataError
from sbora_diffusion.core.llm.data import Example, read_examples
from sbora_diffusion.core.llm.word_problems import normalized
from sbora_diffusion.core.settings import nearest

NUMBER = re.compile(r"-?\d+\.?\d*")
TOLERANCE = 0.001


@dataclass(frozen=True)
class Task:
    """One test set.

    Attributes:
        pattern: of an answer; none for a number.
        contaminated: share of its questions that a training set of the field contains, and which.
    """

    name: str
    group: Literal["commonsense", "arithmetic", "mmlu"]
    pattern: str = ""
    contaminated: str = ""

    def read(self, text: str) -> str:
        """The answer that a model's text gives; empty if it gives none."""
        if self.pattern:
            found = re.search(self.pattern, text.strip())
            return found[0] if found else ""
        numbers = NUMBER.findall(text.replace(",", ""))
        return numbers[-1] if numbers else ""

    def is_right(self, text: str, answer: str) -> bool:
        """Whether a model's text gives the answer."""
        found = self.read(text)
        if self.pattern or not found:
            return bool(found) and found == answer
        return abs(float(found) - float(answer)) <= TOLERANCE


_ANSWERS = "answer1|answer2|answer3|answer4|answer5"
_MAWPS = "{} questions are in the MAWPS training set, a part of math_10k"
TASKS = {
    task.name: task
    for task in (
        Task("boolq", "commonsense", "true|false"),
        Task("piqa", "commonsense", "solution1|solution2"),
        Task("social_i_qa", "commonsense", _ANSWERS),
        Task("hellaswag", "commonsense", "ending1|ending2|ending3|ending4"),
        Task("winogrande", "commonsense", "option1|option2"),
        Task("ARC-Easy", "commonsense", _ANSWERS),
        Task("ARC-Challenge", "commonsense", _ANSWERS),
        Task("openbookqa", "commonsense", _ANSWERS),
        Task("MultiArith", "arithmetic", contaminated=_MAWPS.format("490 of 600")),
        Task("gsm8k", "arithmetic"),
        Task("AddSub", "arithmetic", contaminated=_MAWPS.format("327 of 395")),
        Task("AQuA", "arithmetic", "A|B|C|D|E"),
        Task("SingleEq", "arithmetic", contaminated=_MAWPS.format("436 of 508")),
        Task("SVAMP", "arithmetic"),
        Task("mmlu_val", "mmlu", "A|B|C|D"),
    )
}
"""By name, in the order of the paper's columns."""


def find_task(name: str) -> Task:
    """A task by its name.

    Raises:
        ConfigError: there is none.
    """
    if name not in TASKS:
        raise ConfigError(f"no task {name!r}", nearest(name, list(TASKS), what="tasks"))
    return TASKS[name]


def read_test(task: Task, folder: Path) -> list[Example]:
    """A task's questions from `<folder>/<name>/test.json`, or a folder that is the task's own.

    Raises:
        DataError: there is no such file, or an item has no answer.
    """
    file = folder / task.name / "test.json"
    examples = read_examples(file)
    for number, example in enumerate(examples, 1):
        if not example.answer or (not task.pattern and not NUMBER.fullmatch(example.answer)):
            raise DataError(
                f"{file}, item {number}: {example.answer!r} is no answer of {task.name}",
                "give the test set in the LLM-Adapters format",
            )
    return examples


def overlap(test: Sequence[Example], trained: Sequence[Example]) -> int:
    """How many test questions are also in a training set, by their letters and digits."""
    known = {normalized(example.instruction) for example in trained}
    return sum(normalized(example.instruction) in known for example in test)
