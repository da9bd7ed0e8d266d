"""Token ids against hand-made and published tokenizers, and folders that are damaged."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import END, START, TOKENIZER_VOCAB_SIZE, write_tokenizer

from faithdiff_jax.errors import InputError
from faithdiff_jax.files.tokenizers import Tokenizers

LENGTH = 77
START_ID, END_ID = 516, 517


@pytest.fixture
def folders(tmp_path) -> list[Path]:
    return [write_tokenizer(tmp_path / "one"), write_tokenizer(tmp_path / "two", pad_token="!")]


def row(ids: list[int], padding: int) -> list[int]:
    return [START_ID, *ids, END_ID] + [padding] * (LENGTH - 2 - len(ids))


def test_token_ids_by_hand(folders):
    """Bytes from "!" on count from 0, those that end a word from 256, and the four merges from 512."""
    captions = ["The CAT", "a  cab", "", "cat é"]
    ids = [[515, 513], [256 + 64, 512, 256 + 65], [], [513, 0xC3 - 0xAE + 106, 256 + 0xA9 - 0xA1 + 94]]
    first, second = Tokenizers.load(folders)(captions)
    assert first.dtype == second.dtype == np.int32
    np.testing.assert_array_equal(first, [row(part, END_ID) for part in ids])
    np.testing.assert_array_equal(second, [row(part, 0) for part in ids])


def test_padding_symbol_in_a_caption(folders):
    """The padding token of bigG is the symbol "!": transformers cuts every "!" of a caption out as token 0."""
    first, second = Tokenizers.load(folders)(["a!!"])
    assert first[0].tolist() == row([256 + 64, 0, 256], END_ID)
    assert second[0].tolist() == row([256 + 64, 0, 0], 0)


def test_long_captions_keep_their_end_token(folders):
    for ids in Tokenizers.load(folders)(["cat " * 100, "cat " * 75, "cat " * 74]):
        np.testing.assert_array_equal(ids[0], [START_ID, *[513] * 75, END_ID])
        np.testing.assert_array_equal(ids[1], ids[0])
        assert ids[2].tolist() == row([513] * 74, int(ids[2, -1]))


def test_matches_transformers(folders):
    """The call the published pipeline makes, on text with marks, digits and the padding symbol in it."""
    captions = ["Wow! the cat's 2 cabs!!", "", f"x{END}y", "naïve 猫 🐈", "the " * 90]
    for folder, ids in zip(folders, Tokenizers.load(folders)(captions), strict=True):
        theirs = transformers.CLIPTokenizer.from_pretrained(str(folder))
        expected = theirs(captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
        np.testing.assert_array_equal(ids, expected.input_ids.numpy())
        assert 0 <= ids.min() <= ids.max() < TOKENIZER_VOCAB_SIZE


def test_no_captions_give_no_rows(folders):
    assert [ids.shape for ids in Tokenizers.load(folders)([])] == [(0, LENGTH)] * 2


def test_one_string_is_refused(folders):
    with pytest.raises(TypeError, match="captions is one string"):
        Tokenizers.load(folders[:1])("a cat")


def test_no_tokenizers_are_refused():
    with pytest.raises(ValueError, match="0 tokenizers, at least 1"):
        Tokenizers.load([])


def test_saved_tokenizers_load_again(folders, tmp_path):
    captions = ["Wow! the cat!", "", "the " * 90]
    tokenizers = Tokenizers.load(folders)
    saved = tokenizers.save(tmp_path / "model")
    assert saved == [tmp_path / "model" / "tokenizer", tmp_path / "model" / "tokenizer_2"]
    for ours, again in zip(tokenizers(captions), Tokenizers.load(saved)(captions), strict=True):
        np.testing.assert_array_equal(ours, again)


def test_bad_tokenizer_folders_are_named(folders, tmp_path):
    with pytest.raises(InputError, match="nowhere: no such tokenizer folder"):
        Tokenizers.load([tmp_path / "nowhere"])
    (folders[0] / "merges.txt").unlink()
    with pytest.raises(InputError, match=r"one: a tokenizer folder needs vocab\.json and merges\.txt"):
        Tokenizers.load(folders)
    (folders[1] / "vocab.json").write_text("{broken", encoding="utf-8")
    with pytest.raises(InputError, match="two: the tokenizer cannot be loaded"):
        Tokenizers.load(folders[1:])


@pytest.mark.parametrize("damage", ["words", "list", "config"])
def test_broken_tokenizer_files_are_named(folders, damage):
    folder = folders[0]
    if damage == "words":
        (folder / "vocab.json").write_text(json.dumps({START: 0, END: 1}), encoding="utf-8")
    elif damage == "list":
        (folder / "vocab.json").write_text("[1, 2]", encoding="utf-8")
    else:
        (folder / "tokenizer_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="one: the tokenizer cannot be loaded"):
        Tokenizers.load([folder])


def test_unstated_length_is_named(folders):
    path = folders[0] / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    del settings["model_max_length"]
    path.write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(InputError, match="states no model_max_length"):
        Tokenizers.load(folders[:1])


def test_works_and_is_silent_without_torch(folders):
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from faithdiff_jax.files.tokenizers import Tokenizers\n"
        f"print(Tokenizers.load([{str(folders[0])!r}])(['cat'])[0][0, 1])\n"
    )
    environment = {"PYTHONPATH": str(Path(__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "513\n", "")


def test_a_link_out_of_the_model_is_refused(tmp_path):
    folder = write_tokenizer(tmp_path / "model" / "tokenizer")
    for target, message in ((tmp_path / "secret", "outside the model"), (Path("/dev/null"), "not a regular file")):
        (tmp_path / "secret").write_text("{}")
        (folder / "special_tokens_map.json").unlink(missing_ok=True)
        (folder / "special_tokens_map.json").symlink_to(target)
        with pytest.raises(InputError, match=rf"special_tokens_map\.json: .*{message}"):
            Tokenizers.load([folder])


def test_a_link_into_the_cache_of_the_hub_is_followed(tmp_path):
    folder = write_tokenizer(tmp_path / "models--a--b" / "snapshots" / "1" / "tokenizer")
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (folder / "merges.txt").rename(tmp_path / "models--a--b" / "blobs" / "0123")
    (folder / "merges.txt").symlink_to(tmp_path / "models--a--b" / "blobs" / "0123")
    assert Tokenizers.load([folder])(["the cat"])[0].shape == (1, LENGTH)


@settings(max_examples=50)
@given(data=st.data())
def test_a_damaged_tokenizer_is_loaded_or_refused_in_one_line(data, tmp_path_factory):
    folder = write_tokenizer(tmp_path_factory.mktemp("damaged") / "tokenizer")
    path = folder / data.draw(st.sampled_from(sorted(path.name for path in folder.iterdir())))
    content = bytearray(path.read_bytes())
    values = st.sampled_from(b'{}[],:"0129-e\\ \xff')
    for place, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(content) - 1), values), min_size=1, max_size=4)
    ):
        content[place] = value
    path.write_bytes(content)
    try:
        Tokenizers.load([folder])
    except InputError as error:
        message = str(error)
    else:
        message = ""
    assert "\n" not in message


@pytest.mark.parametrize(
    ("caption", "word", "expected"),
    [
        ("the cat sat", "cat", [2]),
        ("the cat sat", "CAT", [2]),
        ("the cat, the Cat", "cat", [2, 5]),  # both times
        ("the cat sat", "the cat", [1, 2]),
        ("the cat sat", "sat", [3, 4, 5]),  # three tokens: s, a, t
        ("the the the", "the the", [1, 2, 3]),
        ("cat " * 100, "cat", [*range(1, 76)]),
        ("x " * 74 + "the cat sat", "the", [75]),
    ],
)
def test_positions_of_a_word(folders, caption, word, expected):
    tokenizers = Tokenizers.load(folders)
    assert tokenizers.positions(caption, word) == expected
    word_ids = tokenizers([word])[0][0].tolist()
    row = tokenizers([caption])[0][0].tolist()
    assert {row[position] for position in expected} <= set(word_ids[1 : word_ids.index(END_ID)])


@pytest.mark.parametrize(
    ("caption", "word", "message"),
    [
        ("the cat sat", "ca", "word is 'ca': must be in the caption, 'the cat sat'"),  # of "cat" a part only
        ("the cat sat", "dog", "word is 'dog': must be in the caption"),
        ("", "dog", "word is 'dog': must be in the caption, ''"),
        ("the cat sat", " ", "word is ' ': must not be empty"),
        ("x " * 74 + "the cat", "cat", "word is 'cat': must be among the caption's first 75 tokens, which are read"),
        ("the cat", "\udcff", r"word is '\udcff': must be Unicode text"),
        ("\udcff", "cat", r"caption is '\udcff': must be Unicode text"),
    ],
)
def test_words_that_have_no_position(folders, caption, word, message):
    with pytest.raises(InputError) as caught:
        Tokenizers.load(folders).positions(caption, word)
    assert message in str(caught.value)


def test_a_caption_that_is_not_unicode(folders):
    with pytest.raises(InputError, match="must be Unicode text"):
        Tokenizers.load(folders)(["the cat", "\udcff"])
