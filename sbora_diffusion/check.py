"""May these concepts live in one model? Everything that speaks against it, not only the first."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, Literal

from sbora_diffusion.core.compatibility import crossings, overlaps, same_base
from sbora_diffusion.core.concept import Concept
from sbora_diffusion.core.errors import BaseMismatch
from sbora_diffusion.core.fingerprint import Fingerprint, compare
from sbora_diffusion.core.layers import kind
from sbora_diffusion.ownership import COUNTED, price


@dataclass(frozen=True)
class Member:
    """One of the concepts that shall live together.

    Attributes:
        label: its name, with a number behind it if an earlier one has that name too.
        place: the file, or the name in the library, as the user gave it.
    """

    label: str
    place: str
    concept: Concept
    weight: float = 1.0

    @property
    def tokens(self) -> list[str]:
        return [entry.token for entry in self.concept.meta.tokens]

    def row(self) -> list[str]:
        """Label, tokens, variant, rank, indices, weight and place, for a table."""
        meta = self.concept.meta
        indices = f"{meta.start}–{meta.stop - 1}"
        tokens = " ".join(self.tokens)
        weight = f"{self.weight:g}"
        return [self.label, tokens, meta.variant, str(meta.rank), indices, weight, self.place]

    def document(self) -> dict[str, Any]:
        """The same for JSON."""
        meta = self.concept.meta
        return {
            "label": self.label,
            "name": meta.name,
            "place": self.place,
            "digest": meta.digest,
            "tokens": self.tokens,
            "variant": meta.variant,
            "rank": meta.rank,
            "start": meta.start,
            "stop": meta.stop,
            "weight": self.weight,
        }


@dataclass(frozen=True)
class Finding:
    """One line about two or more concepts.

    Attributes:
        blocks: whether they cannot be merged because of it.
        facts: the figures in it, for JSON.
    """

    kind: Literal["base", "overlap", "mixed", "token", "name", "vocabulary"]
    blocks: bool
    text: str
    facts: dict[str, Any] = field(default_factory=dict)


def members(given: Sequence[tuple[str, Concept, float]]) -> list[Member]:
    """Label concepts that come as (place, concept, weight): `dog`, and `dog#2` for a namesake."""
    labelled: list[Member] = []
    for place, concept, weight in given:
        name = concept.meta.name
        number = 1 + sum(member.concept.meta.name == name for member in labelled)
        label = name if number == 1 else f"{name}#{number}"
        labelled.append(Member(label, place, concept, weight))
    return labelled


def static_findings(
    group: Sequence[Member], base: Fingerprint | None = None, allow_overlap: bool = False
) -> list[Finding]:
    """All that can be known without running a model, problems first.

    Args:
        base: of the model they shall be merged into, if that is at hand.
        allow_overlap: shared indices do not block.
    """
    found = [
        *_base_findings(group, base),
        *_overlap_findings(group, allow_overlap),
        *_mixed_findings(group),
        *_clashes(group),
    ]
    return sorted(found, key=lambda finding: not finding.blocks)


def prices(group: Sequence[Member]) -> list[str]:
    """What the concepts own together, a line for each variant."""
    lines = []
    for variant in sorted({member.concept.meta.variant for member in group}):
        metas = [m.concept.meta for m in group if m.concept.meta.variant == variant]
        widths = {layer: width for meta in metas for layer, width in meta.widths.items()}
        lines.append(f"SBoRA-{variant.upper()}: {price(variant, metas, widths)}")
    return lines


def _base_findings(group: Sequence[Member], base: Fingerprint | None) -> list[Finding]:
    """Against the base if there is one; else the concepts are held against each other."""
    if base is not None:
        found = [_against_base(member, base) for member in group]
    else:
        found = [_against_each_other(a, b) for a, b in combinations(group, 2)]
    return [finding for finding in found if finding]


def _against_base(member: Member, base: Fingerprint) -> Finding | None:
    try:
        relation = compare(member.concept.meta.fingerprint, base)
    except BaseMismatch as error:
        facts = {"concepts": [member.label]}
        return Finding("base", True, f"{member.label}: {error.problem}", facts)
    return _rounded([member], "this base") if relation == "rounded" else None


def _against_each_other(first: Member, second: Member) -> Finding | None:
    pair = [first, second]
    try:
        relation = same_base(*(_relabelled(member) for member in pair))
    except BaseMismatch as error:
        return Finding("base", True, error.problem, {"concepts": [m.label for m in pair]})
    return _rounded(pair, "the other's base") if relation == "rounded" else None


def _rounded(who: Sequence[Member], what: str) -> Finding:
    labels = [member.label for member in who]
    text = f"{' or '.join(labels)} was trained on a rounded copy of {what}"
    return Finding("base", False, text, {"concepts": labels, "rounded": True})


def _overlap_findings(group: Sequence[Member], allowed: bool) -> list[Finding]:
    found = []
    for pair, layers in overlaps([_relabelled(member) for member in group]).items():
        counted = COUNTED[_variant(group, pair[0])]
        text = (
            f"{pair[0]} and {pair[1]} share {sum(layers.values())} {counted} in "
            f"{_by_kind(layers)}, the first is {min(layers)}"
        )
        facts = {"concepts": list(pair), "layers": layers}
        found.append(Finding("overlap", not allowed, text, facts))
    return found


def _mixed_findings(group: Sequence[Member]) -> list[Finding]:
    """One for all pairs of an FA and an FB concept, since all such pairs cross."""
    pairs: list[dict[str, Any]] = [
        {"concepts": sorted(pair, key=lambda label: _variant(group, label)), "layers": layers}
        for pair, layers in crossings([_relabelled(member) for member in group]).items()
        if layers
    ]
    if not pairs:
        return []
    own = {v: [m.label for m in group if m.concept.meta.variant == v] for v in COUNTED}
    each = sorted({count for pair in pairs for count in pair["layers"].values()})
    total = sum(count for pair in pairs for count in pair["layers"].values())
    text = (
        f"{', '.join(own['fa'])} of SBoRA-FA and {', '.join(own['fb'])} of SBoRA-FB cross: two of "
        f"them share r_a·r_b = {' or '.join(map(str, each))} entries of a layer, {total} in all; "
        "such entries are summed in the order of the digests"
    )
    return [Finding("mixed", False, text, {"pairs": pairs})]


def _clashes(group: Sequence[Member]) -> list[Finding]:
    found = []
    for a, b in combinations(group, 2):
        labels = [a.label, b.label]
        if a.concept.meta.digest == b.concept.meta.digest:
            text = f"{labels[0]} and {labels[1]} are one and the same concept; leave one out"
            found.append(Finding("name", True, text, {"concepts": labels, "same": True}))
            continue
        if a.concept.meta.name == b.concept.meta.name:
            text = f"{labels[0]} and {labels[1]} have one name"
            found.append(Finding("name", True, text, {"concepts": labels}))
        for token in sorted(set(a.tokens) & set(b.tokens)):
            text = f"{labels[0]} and {labels[1]} have one token, {token}"
            found.append(Finding("token", True, text, {"concepts": labels, "token": token}))
    return found


def _relabelled(member: Member) -> Concept:
    """Under a name that no other concept of the group has."""
    meta = member.concept.meta.model_copy(update={"name": member.label})
    return replace(member.concept, meta=meta)


def _variant(group: Sequence[Member], label: str) -> str:
    return next(m.concept.meta.variant for m in group if m.label == label)


def _by_kind(layers: dict[str, int]) -> str:
    """E.g. "72 layers (28 cross-attention, 28 self-attention, 16 text encoder)"."""
    kinds = [kind(layer) for layer in layers]
    counts = ", ".join(f"{kinds.count(name)} {name}" for name in sorted(set(kinds)))
    return f"{len(layers)} layer{'s' * (len(layers) > 1)} ({counts})"
