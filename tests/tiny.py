"""The smallest things a test can load."""

import json
from pathlib import Path

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = (("c", "a"), ("ca", "t</w>"), ("t", "h"), ("th", "e</w>"))
TOKENIZER_VOCAB_SIZE = 2 * 256 + len(MERGES) + 2


def write_tokenizer(folder: Path, pad_token: str = END, length: int = 77, *, pad_in_map: str | None = None) -> Path:
    """Write a byte-level CLIP tokenizer of 518 tokens in the published layout, and return its folder.

    Ids: 0..255 the bytes, 256..511 the bytes that end a word, 512..515 "ca", "cat", "th", "the", 516 start, 517 end.
    Id 0 is "!", as in CLIP's own vocabulary: give `pad_token="!"` for bigG's padding, or `pad_in_map="!"` for SD 2.1's,
    whose special_tokens_map.json says another than its tokenizer_config.json, and counts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    symbols = byte_symbols()
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *("".join(pair) for pair in MERGES), START, END]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    assert len(vocabulary) == TOKENIZER_VOCAB_SIZE
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": length,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": pad_token,
    }
    merges = "".join(f"{left} {right}\n" for left, right in MERGES)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    if pad_in_map is not None:
        tokens = {"bos_token": START, "eos_token": END, "pad_token": pad_in_map, "unk_token": END}
        (folder / "special_tokens_map.json").write_text(json.dumps(tokens), encoding="utf-8")
    return folder


def byte_symbols() -> list[str]:
    """One visible character for each byte: the printable ones stand for themselves and come first."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(hidden)]
