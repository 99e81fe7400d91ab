"""Build the pocket base's tokenizer: CLIP's pipeline with an own BPE of at most 4,096 tokens.

The corpus is the world's captions, the names and tags of all emoji (emojibase-data, MIT), the
names of the 3D models, and the words of prompts that later worlds are to understand, so that
common nouns, colours and relations are single tokens. Deterministic; run once per world.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer
from world.captions import PLACES, STYLES
from world.plans import ScenePlanner
from world.sprites import SpriteBank

VOCABULARY = 4096
START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"

COMMON_WORDS = """
a an the of on in at with without and or next to beside between behind under above below over near
inside outside front back left right top bottom two three four five several many some one its his
her their wearing holding riding eating drinking sitting standing lying running jumping sleeping
flying swimming floating reading playing looking photo photograph picture image render drawing
painting illustration sketch icon cartoon style anime pixel art watercolour watercolor oil pencil
charcoal sticker mosaic origami lego plush clay stained glass comic poster neon vintage modern
minimalist realistic cute happy sad angry tiny small little big large huge giant tall short long
round square old young new red orange yellow green blue purple pink brown black white grey gray
gold golden silver turquoise beige violet magenta cyan dark bright light pale colourful colorful
striped spotted shiny wooden metal plastic furry fluffy soft hat crown glasses sunglasses
headphones scarf bow tie cape coat shirt dress shoes boots gloves backpack beach snow forest city
night day desert water sea ocean meadow space mountains sunset sunrise room kitchen street library
farm volcano rain castle stage garden park jungle bathroom bedroom office school beach tower bridge
river lake waterfall cave island moon mars planet stars sky clouds sun background flat plain
person man woman boy girl child baby people dog cat rabbit bear teddy toy doll robot figure statue
chair table sofa couch bed lamp clock vase bowl cup mug plate bottle teapot guitar piano violin
drum car bus train truck boat ship plane bicycle backpack bag suitcase umbrella book pen ball
flower tree plant leaf grass rose mushroom apple banana orange strawberry bread cake pizza
house building window door wall floor wood stone brick sand grass ice fire smoke close up portrait
view side angle full body centred professional studio high quality detailed
"""


def corpus(bank: SpriteBank, emoji: Path, captions: int) -> Iterator[str]:
    """Lines of text whose frequencies shape the merges."""
    planner, rng = ScenePlanner(bank.sprites, variants=1), np.random.default_rng(0)
    for _ in range(captions):
        yield planner.plan(rng).caption
    for entry in json.loads(emoji.read_text()):
        yield from 6 * [" ".join([entry["label"], *entry.get("tags", [])])]
    for phrases in (*PLACES.values(), *STYLES.values()):
        yield from 20 * [" ".join(phrases)]
    yield from 30 * [" ".join(COMMON_WORDS.split())]


def build(lines: Iterator[str]) -> CLIPTokenizer:
    """Learn merges through CLIP's own normalizer and pre-tokenizer.

    Ids in CLIP's order: the 256 byte letters, the same as word ends, merges, start, end.
    """
    letters = sorted(ByteLevel.alphabet())
    basic = letters + [letter + WORD_END for letter in letters]
    trainer = BpeTrainer(
        vocab_size=VOCABULARY - 2,
        initial_alphabet=letters,
        end_of_word_suffix=WORD_END,
        show_progress=False,
    )
    pipeline = CLIPTokenizer().backend_tokenizer
    pipeline.train_from_iterator(lines, trainer)
    merges = [tuple(m) for m in json.loads(pipeline.to_str())["model"]["merges"]]
    merges = merges[: VOCABULARY - 2 - len(basic)]
    words = [*basic, *("".join(m) for m in merges), START, END]
    assert len(set(words)) == len(words) <= VOCABULARY
    return CLIPTokenizer(
        vocab={word: index for index, word in enumerate(words)},
        merges=merges,
        model_max_length=77,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=Path, default=Path("build/world"))
    parser.add_argument("--emoji", type=Path, required=True, help="emojibase-data en/data.json")
    parser.add_argument("--captions", type=int, default=20_000)
    parser.add_argument("--out", type=Path, default=Path("sbora_diffusion/pocket/tokenizer"))
    args = parser.parse_args()
    bank = SpriteBank.load(args.world)
    build(corpus(bank, args.emoji, args.captions)).save_pretrained(args.out)


if __name__ == "__main__":
    main()
