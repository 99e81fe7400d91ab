"""The same concept under another placeholder token or name, where two concepts clash."""

import re
from collections.abc import Collection, Mapping
from itertools import count

from pydantic import ValidationError

from sbora_diffusion.core.concept import Concept, ConceptMeta, sealed
from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.core.schema import EMBEDDING_KEY, NAME_PATTERN, TOKEN_PATTERN


def renamed(concept: Concept, tokens: Mapping[str, str], name: str | None = None) -> Concept:
    """A copy with other tokens and, if given, another name; factors and indices are the same.

    Args:
        tokens: old token → new token; others stay.

    Returns:
        The concept with its new digest.

    Raises:
        ConfigError: a token is not the concept's, or the new token or name is not allowed.
    """
    own = [entry.token for entry in concept.meta.tokens]
    if unknown := sorted(tokens.keys() - set(own)):
        raise ConfigError(f"{concept.meta.name!r} has no token {unknown[0]!r}", f"it has {own}")
    document = concept.meta.model_dump()
    document["name"] = concept.meta.name if name is None else name
    for entry in document["tokens"]:
        entry["token"] = tokens.get(entry["token"], entry["token"])
    try:
        meta = ConceptMeta.model_validate(document)
    except ValidationError as error:
        new = ", ".join([*tokens.values(), document["name"]])
        raise ConfigError(
            f"{concept.meta.name!r} cannot be called {new}",
            "a token is e.g. <my-dog>: small letters, digits, - and _; one concept's tokens differ",
        ) from error
    embeddings = {_rekeyed(key, tokens): value for key, value in concept.embeddings.items()}
    return sealed(Concept(meta, concept.layers, embeddings))


def free_token(token: str, taken: Collection[str]) -> str:
    """`<dog>` → the first of `<dog-2>`, `<dog-3>` … that is not taken."""
    words = (f"<{token[1:-1][:56]}-{k}>" for k in count(2))
    return next(word for word in words if word not in taken and re.match(TOKEN_PATTERN, word))


def free_name(name: str, taken: Collection[str]) -> str:
    """`dog` → the first of `dog-2`, `dog-3` … that is not taken."""
    words = (f"{name[:58]}-{k}" for k in count(2))
    return next(word for word in words if word not in taken and re.match(NAME_PATTERN, word))


def _rekeyed(key: str, tokens: Mapping[str, str]) -> str:
    match = EMBEDDING_KEY.fullmatch(key)
    assert match, key
    return f"{match[1]}.{tokens.get(match[2], match[2])}"
