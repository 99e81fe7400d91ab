"""What the language tests share: a tiny Llama with random weights and a tokenizer of words."""

from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from sbora_diffusion.core.llm.data import Example

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def tiny_llama(seed: int = 0, width: int = 64):
    """Two layers, 64 wide: bitsandbytes' blocks of 64 divide every weight."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
    model.config.use_cache = False
    return model


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Single characters, and the marks of the chat template."""
    special = ["<pad>", "<s>", "</s>", "<unk>", "<end>", "<user>", "<assistant>"]
    letters = [chr(c) for c in range(32, 127)] + ["\n"]
    words = {token: number for number, token in enumerate([*special, *letters])}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<end>", "<user>", "<assistant>"],
    )
    made.chat_template = CHAT
    return made


def save_base(folder: Path, **options) -> Path:
    """The tiny model and its tokenizer as a folder that transformers reads."""
    tiny_llama(**options).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def examples(count: int = 12) -> list[Example]:
    return [Example(f"say {n} twice", f"{n} {n}", str(n)) for n in range(count)]
