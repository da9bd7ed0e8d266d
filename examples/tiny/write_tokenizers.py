"""Write the small model's tokenizers: byte pair encoding in CLIP's format, learned from a list of words.

    python examples/tiny/write_tokenizers.py --output configs/tiny  # writes configs/tiny/tokenizer and tokenizer_2

Every word of the training captions, and other words that captions often have, is one token; any other text is spelled
in smaller pieces, down to bytes. Both tokenizers have the same tokens; they pad as CLIP-L's and bigG's do.
"""

import argparse
import collections
import itertools
import json
import pathlib
import re
import sys
from collections.abc import Iterable

from training_photos import CAPTIONS

START, END = "<|startoftext|>", "<|endoftext|>"
COMMON_WORDS = """
    a an the this that its their his her and or of in on at with by from to for near over under behind before beside
    between around through across above below into is are was has have stands sits lies looks holds wears shows fills
    walking standing sitting looking holding wearing lying flying running hanging
    one two three four five several many few some other each all no not very also
    image picture photograph photo view scene background foreground close up side front back left right middle edge top
    bottom corner row group pair piece part line lines circle circles square squares pattern texture surface detail
    man woman person people child face eye eyes hair hand hands head body skin coat dress hat shirt glasses
    cat dog bird horse fish insect butterfly flower flowers leaf leaves tree trees grass plant plants forest garden
    field fruit food bread cup plate bowl bottle glass spoon table chair bed sofa room floor wall window windows door
    roof house houses building buildings tower bridge church castle street road path car cars bus train bicycle boat
    ship airplane city town village water river lake sea ocean beach wave waves sand stone stones rock rocks mountain
    mountains hill snow ice sky cloud clouds sun moon star stars light lights shadow night day morning evening
    paper book page sign letter letters word words text number clock phone computer screen camera machine metal wood
    wooden brick cloth leather plastic
    black white gray red orange yellow green blue purple pink brown golden silver dark bright light pale colorful
    small large big little long short tall wide narrow round flat sharp soft smooth rough old new young clear blurred
    blurry clean dirty wet dry open closed empty full
"""


def main(argv: list[str] | None = None) -> int:
    """Write the tokenizers; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, required=True, help="the folder that gets tokenizer*/")
    output = parser.parse_args(argv).output
    words = {*COMMON_WORDS.split(), *(word for text in CAPTIONS for word in re.findall("[a-z]+", text.lower()))}
    merges = learn_merges(words)
    for name, pad_token in (("tokenizer", END), ("tokenizer_2", "!")):
        write_tokenizer(output / name, merges, pad_token)
    print(f"{len(words)} words, {len(vocabulary(merges))} tokens, the end token is {len(vocabulary(merges)) - 1}")
    return 0


def learn_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """The pairs to join, in order, until each word is one token: always the pair that most words have."""
    spelled = {word: (*word[:-1], f"{word[-1]}</w>") for word in sorted(words)}
    merges: list[tuple[str, str]] = []
    while True:
        pairs = collections.Counter(pair for symbols in spelled.values() for pair in itertools.pairwise(symbols))
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelled = {word: joined(symbols, best) for word, symbols in spelled.items()}


def joined(symbols: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """Join a pair wherever it stands, from the left."""
    result: list[str] = []
    for symbol in symbols:
        if result and (result[-1], symbol) == pair:
            result[-1] += symbol
        else:
            result.append(symbol)
    return tuple(result)


def vocabulary(merges: list[tuple[str, str]]) -> dict[str, int]:
    """Token -> id: the bytes, the bytes that end a word, the merges, start, end."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    symbols = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *("".join(pair) for pair in merges), START, END]
    return {token: i for i, token in enumerate(tokens)}


def write_tokenizer(folder: pathlib.Path, merges: list[tuple[str, str]], pad_token: str) -> None:
    """The three files of a CLIP tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "bos_token": START, "eos_token": END,
        "unk_token": END, "pad_token": pad_token,
    }  # fmt: skip
    lines = "".join(f"{left} {right}\n" for left, right in merges)
    (folder / "vocab.json").write_text(json.dumps(vocabulary(merges), ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "merges.txt").write_text(f"#version: 0.2\n{lines}", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
