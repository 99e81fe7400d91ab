"""Placeholder tokens in the text of a prompt."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

_TOKEN = re.compile(r"<[a-z0-9_-]{1,62}>", re.IGNORECASE | re.ASCII)
_VECTOR = re.compile(rf"({_TOKEN.pattern})(?=_\d)", re.IGNORECASE | re.ASCII)


def tokens_in(prompt: str) -> list[str]:
    """What looks like placeholder tokens, in lower case, each once, in the order of the prompt.

    A token counts inside other text too ("two <cat>s"), as it does for the tokenizer. The brackets
    belong to it, so no token is found inside another: "<cat2>" does not contain "<cat>".
    """
    return list(dict.fromkeys(match[0].lower() for match in _TOKEN.finditer(prompt)))


def spelled(prompt: str) -> str:
    """The prompt with its placeholder tokens as the vocabulary has them.

    The tokenizer finds "<Cat>" as "<cat>", but diffusers gives a placeholder its further vectors
    only where it is written in lower case. "<cat>_1" would be read as one of these vectors.
    """
    return _VECTOR.sub(r"\1 ", _TOKEN.sub(lambda match: match[0].lower(), prompt))


@dataclass(frozen=True)
class Replaced:
    """A prompt with nouns in the place of some tokens.

    Attributes:
        spans: token → where its nouns stand in the text, as (start, stop) of characters.
    """

    text: str
    spans: Mapping[str, list[tuple[int, int]]]


def with_nouns(prompt: str, nouns: Mapping[str, str]) -> Replaced:
    """Put nouns in the place of tokens (token → noun); other tokens stay."""
    text, end = "", 0
    spans: dict[str, list[tuple[int, int]]] = {token: [] for token in nouns}
    for match in _TOKEN.finditer(prompt):
        token = match[0].lower()
        if token in nouns:
            text += prompt[end : match.start()]
            spans[token].append((len(text), len(text) + len(nouns[token])))
            text += nouns[token]
            end = match.end()
    return Replaced(text + prompt[end:], spans)


def with_article(noun: str) -> str:
    """ "cat" → "a cat", "apple" → "an apple"."""
    return f"{'an' if noun.lower().startswith(tuple('aeiou')) else 'a'} {noun}"
