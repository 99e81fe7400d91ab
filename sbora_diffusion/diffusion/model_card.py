"""What an export says about itself: a model card, and the metadata that other tools show."""

from collections.abc import Sequence
from typing import Literal

from sbora_diffusion.core.concept import ARCHITECTURES
from sbora_diffusion.core.folded_set import Weighted
from sbora_diffusion.core.lora import LoraLayer

Form = Literal["kohya", "diffusers", "peft", "checkpoint", "file"]

ENCODERS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}
"""A text encoder's key in an embedding for several of them."""

RESOLUTIONS = {"pocket": 128, "sd1": 512, "sd2": 768, "sdxl": 1024}
"""Pixels a side that a family was made for; 1024 for all newer ones."""

_USE = {
    "kohya": """\
**A1111, Forge**: copy `{file}` to `models/Lora` and the files of `embeddings/` to `embeddings`.
Prompt: `a photo of {words} <lora:{stem}:1>`

**ComfyUI**: copy `{file}` to `models/loras` and the files of `embeddings/` to `models/embeddings`.
A *Load LoRA* node with both strengths at 1; prompt: `a photo of {comfy}`

The embeddings are part of what was learned: without them the words mean nothing.
""",
    "diffusers": """\
```python
pipe.load_lora_weights("{folder}", weight_name="{file}")
{embeddings}
pipe("a photo of {tokens}")
```
""",
    "peft": """\
```python
from peft import PeftModel
pipe.unet = PeftModel.from_pretrained(pipe.unet, "{folder}/unet")  # and so for each folder here
{embeddings}
pipe("a photo of {tokens}")
```
""",
    "file": """\
**A1111, Forge**: copy `{file}` to `models/Stable-diffusion` and the files of `embeddings/` to
`embeddings`. Prompt: `a photo of {words}`

**ComfyUI**: copy `{file}` to `models/checkpoints` and the files of `embeddings/` to
`models/embeddings`. Prompt: `a photo of {comfy}`

The embeddings are part of what was learned: without them the words mean nothing.
""",
    "checkpoint": """\
```python
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("{folder}")
pipe("a photo of {tokens}")
```
""",
}


def title_of(concepts: Sequence[Weighted]) -> str:
    """A name for files and lists: of one concept its own, of several all or their number."""
    names = sorted(concept.meta.name for concept, _ in concepts)
    return "+".join(names) if len(names) <= 3 else f"{len(names)}_concepts"


def words_of(concepts: Sequence[Weighted]) -> list[str]:
    """The placeholder tokens of all concepts, sorted."""
    return sorted(entry.token for concept, _ in concepts for entry in concept.meta.tokens)


def model_metadata(concepts: Sequence[Weighted], adapter: str = "") -> dict[str, str]:
    """modelspec 1.0.1 and the name of the base's kind, without time, host or path.

    Args:
        adapter: "lora", or nothing for a whole model.
    """
    family, side = concepts[0][0].meta.family, RESOLUTIONS.get(concepts[0][0].meta.family, 1024)
    architecture, kohya = ARCHITECTURES.get(family, (family, family))
    nouns = ", ".join(sorted(concept.meta.class_noun for concept, _ in concepts))
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/{adapter}".rstrip("/"),
        "modelspec.implementation": "sbora-diffusion",
        "modelspec.title": title_of(concepts),
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.description": f"{nouns}, learned with SBoRA (arXiv 2407.05413)",
        "modelspec.trigger_phrase": " ".join(words_of(concepts)),
        "ss_base_model_version": kohya,
    }


def lora_metadata(concepts: Sequence[Weighted], lora: LoraLayer) -> dict[str, str]:
    """`model_metadata`, and what kohya's trainer says about a LoRA.

    Args:
        lora: any layer of the LoRA; all have the same rank and alpha.
    """
    return {
        **model_metadata(concepts, "lora"),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(lora.rank),
        "ss_network_alpha": f"{lora.alpha:g}",
        "ss_output_name": title_of(concepts),
    }


def card(concepts: Sequence[Weighted], form: Form, file: str = "") -> str:
    """A README.md with the header that the model hub reads.

    Args:
        file: name of the file with the weights, where one file holds them.
    """
    ordered = sorted(concepts, key=lambda pair: pair[0].meta.name)
    title, tokens = title_of(concepts), words_of(concepts)
    rows = [
        f"| {c.meta.name} | {' '.join(f'`{t.token}`' for t in c.meta.tokens)} | {c.meta.class_noun}"
        f" | {c.meta.variant.upper()}, rank {c.meta.rank}, alpha {c.meta.alpha:g} | {weight:g} |"
        for c, weight in ordered
    ]
    bare = [token.strip("<>") for token in tokens]
    learned = [(f"{title}/embeddings/{word}.safetensors", f"<{word}>") for word in bare]
    use = _USE[form].format(
        file=file,
        stem=file.removesuffix(".safetensors"),
        folder=title,
        words=" and ".join(bare),
        comfy=" and ".join(f"embedding:{word}" for word in bare),
        tokens=" and ".join(tokens),
        embeddings="\n".join(_loading(path, token, concepts) for path, token in learned),
    )
    return "\n".join(
        [
            *_front_matter(concepts, form, tokens),
            f"# {title}",
            f"Learned with SBoRA ([arXiv 2407.05413](https://arxiv.org/abs/2407.05413)), for "
            f"{_base(concepts)}.",
            "",
            "| concept | token | what it is | adapter | weight |",
            "|---|---|---|---|---|",
            *rows,
            "",
            "## Use",
            use,
            "## Licence",
            "That of the pictures and of the base model; state it here before you share this.",
            "",
        ]
    )


def _front_matter(concepts: Sequence[Weighted], form: Form, tokens: list[str]) -> list[str]:
    base = concepts[0][0].meta.base_name
    whole = form in ("checkpoint", "file")
    kind = "merge" if whole else "adapter"
    named = [f"base_model: {base}", f"base_model_relation: {kind}"] if "/" in base else []
    tags = ["text-to-image", "sbora", *([] if whole else ["lora"])]
    phrase = [f'instance_prompt: "{" ".join(tokens)}"'] if tokens else []
    return ["---", "library_name: diffusers", f"tags: [{', '.join(tags)}]", *named, *phrase, "---"]


def _loading(file: str, token: str, concepts: Sequence[Weighted]) -> str:
    """Python that loads a token's embeddings in stock diffusers."""
    keys = {key.partition(".")[0] for concept, _ in concepts for key in concept.embeddings}
    if len(keys) == 1:
        return f'pipe.load_textual_inversion("{file}", token="{token}")'
    lines = [f'vectors = safetensors.torch.load_file("{file}")']
    for encoder in sorted(keys):
        tokenizer = encoder.replace("text_encoder", "tokenizer")
        lines.append(
            f'pipe.load_textual_inversion(vectors["{ENCODERS[encoder]}"], token="{token}", '
            f"text_encoder=pipe.{encoder}, tokenizer=pipe.{tokenizer})"
        )
    return "\n".join(lines)


def _base(concepts: Sequence[Weighted]) -> str:
    meta = concepts[0][0].meta
    known, _ = ARCHITECTURES.get(meta.family, (meta.family, ""))
    return f"`{meta.base_name}`" if meta.base_name else f"one base model of the kind {known}"
