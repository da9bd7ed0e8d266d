"""The stream of batches: what is in them, and that they replay whatever makes them."""

import json
import logging

import numpy as np
import pytest
from pictures import coordinates, write, write_caption, write_pairs
from skimage import data as photographs
from tiny import write_tokenizer

from faithdiff_jax.config import from_dict
from faithdiff_jax.data import loader as loader_module
from faithdiff_jax.data.degradation.degrade import DegradationConfig
from faithdiff_jax.data.loader import Loader, LoaderConfig
from faithdiff_jax.data.mixture import SourceConfig
from faithdiff_jax.data.samples import make_example
from faithdiff_jax.data.shard_writer import make_shards
from faithdiff_jax.data.sources import PairFolder
from faithdiff_jax.errors import InputError
from faithdiff_jax.files.images import to_float
from faithdiff_jax.files.tokenizers import Tokenizers


@pytest.fixture(scope="module")
def tokenize(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return Tokenizers.load([write_tokenizer(folder / "1"), write_tokenizer(folder / "2", pad_token="!")])


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Five photographs as JPEG, one of which is cut short; some have captions."""
    folder = tmp_path_factory.mktemp("photos")
    for name in ("astronaut", "cat", "coffee", "retina", "rocket"):
        write(folder / f"{name}.jpg", getattr(photographs, name)())
    whole = (folder / "rocket.jpg").read_bytes()
    (folder / "rocket.jpg").write_bytes(whole[: len(whole) // 2])
    write_caption(folder / "cat.json", "The image features the cat. It looks. It sleeps.")
    return folder


def config(*sources: SourceConfig, **settings) -> LoaderConfig:
    return LoaderConfig(**{"batch": 2, "crop": 32, "bad_file_limit": 0.2, "sources": sources, **settings})


def take(batches, count):
    return [next(batches) for _ in range(count)]


def same(left, right):
    return len(left) == len(right) and all(
        a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)
        for a, b in zip(left, right, strict=True)
    )


def test_batches(photos, tokenize):
    loader = Loader(config(SourceConfig(photos=str(photos)), batch=3, caption_dropout=0.0), tokenize)
    batch = next(iter(loader))
    shapes = {name: (array.shape, str(array.dtype)) for name, array in batch.items()}
    assert shapes == {
        "hq": ((3, 32, 32, 3), "float32"),
        "lq": ((3, 32, 32, 3), "float32"),
        "time_ids": ((3, 6), "float32"),
        "index": ((3, 3), "int32"),
        "token_ids_0": ((3, 77), "int32"),
        "token_ids_1": ((3, 77), "int32"),
    }
    for row in range(3):
        example, index, _ = loader.stream[row]
        assert np.array_equal(batch["hq"][row], to_float(example.hq))
        assert np.array_equal(batch["lq"][row], to_float(example.lq))
        assert np.array_equal(batch["time_ids"][row], example.time_ids)
        assert np.array_equal(batch["index"][row], index)
        expected = tokenize([example.caption])
        assert all(np.array_equal(batch[f"token_ids_{i}"][row], ids[0]) for i, ids in enumerate(expected))
    assert all(batch[name].min() >= -1 and batch[name].max() <= 1 for name in ("hq", "lq"))
    captions = {loader.stream[position][0].caption for position in range(5)}
    assert captions == {"", "The cat. It looks."}


def test_resuming_gives_the_same_batches_for_any_number_of_workers(photos, tokenize):
    """Zero, one and two workers hand the position on to one another; one of the photographs is bad."""
    source = SourceConfig(photos=str(photos))
    expected = take(iter(Loader(config(source), tokenize)), 11)
    got, state = [], None
    for workers, count in ((0, 3), (1, 3), (2, 3), (0, 2)):
        with iter(Loader(config(source, workers=workers, prefetch=2), tokenize)) as batches:
            if state is not None:
                batches.set_state(json.loads(state))
            got += take(batches, count)
            state = json.dumps(batches.get_state())
    assert len(state) < 200
    assert same(got, expected)
    assert not same(expected[:4], expected[4:8])


def test_two_processes_share_the_batch_of_one(photos, tokenize):
    settings = config(SourceConfig(photos=str(photos)), batch=6)
    whole = iter(Loader(settings, tokenize))
    parts = [iter(Loader(settings, tokenize, process_index=i, process_count=2)) for i in range(2)]
    for step in range(4):
        rows = [next(part) for part in parts]
        assert [len(part["hq"]) for part in rows] == [3, 3]
        assert same([{key: np.concatenate([part[key] for part in rows]) for key in rows[0]}], [next(whole)])
        if step == 1:  # both start again, from either's state
            state = parts[1].get_state()
            parts = [iter(Loader(settings, tokenize, process_index=i, process_count=2)) for i in range(2)]
            for part in parts:
                part.set_state(state)


def test_set_state_goes_back_and_another_batch_size_continues_the_stream(photos, tokenize):
    source = SourceConfig(photos=str(photos))
    batches = iter(Loader(config(source, batch=4), tokenize))
    start, first = batches.get_state(), next(batches)
    batches.set_state(start)
    assert same([next(batches)], [first])
    pairs = iter(Loader(config(source, batch=2), tokenize))
    pairs.set_state(batches.get_state())
    halves = take(pairs, 2)
    assert same([{key: np.concatenate([half[key] for half in halves]) for key in first}], [next(batches)])


def test_resuming_makes_nothing_of_what_was_skipped(tmp_path, tokenize, monkeypatch):
    made = []

    def counted(record, *arguments):
        made.append(record.name)
        return make_example(record, *arguments)

    monkeypatch.setattr(loader_module, "make_example", counted)
    batches = iter(Loader(config(SourceConfig(pairs=str(write_pairs(tmp_path))), batch=3), tokenize))
    batches.set_state({**batches.get_state(), "position": 3_000_000_000})
    next(batches)
    assert len(made) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "has seed 1, the data now has 0"),
        ({"records": [7]}, r"records \[7\]"),
        ({"weights": [0.5]}, "0.5"),
    ],
)
def test_a_state_of_other_data_is_refused(photos, tokenize, change, message):
    batches = iter(Loader(config(SourceConfig(photos=str(photos))), tokenize))
    with pytest.raises(InputError, match=message):
        batches.set_state({**batches.get_state(), **change})
    with pytest.raises(InputError, match="no 'position'"):
        batches.set_state({})


def test_the_same_record_differs_from_epoch_to_epoch(tmp_path, tokenize):
    stream = Loader(config(SourceConfig(pairs=str(write_pairs(tmp_path)))), tokenize).stream
    crops = {}
    for position in range(12):
        example, (_, _, record), _ = stream[position]
        crops.setdefault(int(record), set()).add(example.hq.tobytes())
    assert all(len(seen) == 4 for seen in crops.values())


def test_shards_give_the_stream_of_the_folder(tmp_path, tokenize):
    folder = write_pairs(tmp_path / "pairs", 5)
    make_shards(PairFolder(folder), "pairs", tmp_path / "shards", 2)
    streams = [
        iter(Loader(config(source), tokenize))
        for source in (SourceConfig(pairs=str(folder)), SourceConfig(shards=str(tmp_path / "shards")))
    ]
    assert same(take(streams[0], 4), take(streams[1], 4))


def test_bad_files_are_skipped_named_once_and_replaced(photos, tokenize, caplog):
    loader = Loader(config(SourceConfig(photos=str(photos)), batch=5), tokenize)
    with caplog.at_level(logging.WARNING):
        batches = take(iter(loader), 3)
    warned = [record.message for record in caplog.records if record.name == loader_module.__name__]
    assert len(warned) == 1
    assert "rocket.jpg" in warned[0]
    names = [photograph.name for photograph in sorted(photos.glob("*.jpg"))]
    bad = names.index("rocket.jpg")
    for batch in batches:  # an epoch each; the photograph after the bad one stands in for it
        records = [bad if record == (bad + 1) % 5 else record for record in batch["index"][:, 2]]
        assert sorted(records) == sorted([bad, bad, *(set(range(5)) - {bad, (bad + 1) % 5})])


@pytest.mark.parametrize("workers", [0, 1])
def test_training_stops_with_too_many_bad_files(photos, tokenize, workers):
    settings = config(SourceConfig(photos=str(photos)), batch=5, bad_file_limit=0.19, workers=workers)
    with (
        iter(Loader(settings, tokenize)) as batches,
        pytest.raises(InputError, match=r"1 unusable records, bad_file_limit 0\.19 allows 0"),
    ):
        take(batches, 2)


def test_too_many_bad_files_apart_from_each_other_stop_it_too(tmp_path, tokenize):
    for number in range(10):
        write(tmp_path / f"{number}.png", coordinates(40, 40))
    for number in (1, 4, 8):
        (tmp_path / f"{number}.png").write_bytes(b"")
    batches = iter(Loader(config(SourceConfig(photos=str(tmp_path)), bad_file_limit=0.2), tokenize))
    with pytest.raises(InputError, match=r"3 unusable records, bad_file_limit 0\.2 allows 2; see the log"):
        take(batches, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": []}, "sources is empty"),
        ({"sources": [{"photos": "a", "weight": 0.5}, {"pairs": "b", "weight": 0.4}]}, "sum to 0.9: must sum to 1"),
        ({"sources": [{"photos": "a", "pairs": "b"}]}, "photos=a, pairs=b: give one of"),
        ({"sources": [{}]}, "a source has no folder"),
        ({"sources": [{"photos": "a", "weight": 2}]}, r"weight 2\.0 of photos=a"),
        ({"sources": [{"photos": "a", "shorter_side": [512, 510]}]}, "shorter_side 512, 510"),
        ({"sources": [{"shards": "a", "captions": "b"}]}, "shards hold their captions"),
        ({"sources": [{"photo": "a"}]}, r"unknown key sources\[0\]\.photo"),
        ({"crop": 30}, "crop 30: must be a positive multiple"),
        ({"batch": 0}, "batch 0"),
        ({"seed": -1}, "seed -1"),
        ({"workers": -1}, "workers -1"),
        ({"prefetch": 0}, "prefetch 0"),
        ({"caption_dropout": 1.5}, "caption_dropout 1.5"),
        ({"bad_file_limit": -0.1}, "bad_file_limit -0.1"),
    ],
)
def test_settings_that_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        from_dict(LoaderConfig, {"sources": [{"photos": "a"}], "batch": 2, **changes}, "data.yaml")


def test_the_published_mixture_can_be_written_down():
    nature = {"photos": "/nature", "weight": 0.875}
    faces = {"pairs": "/faces", "weight": 0.125, "shorter_side": [512, 768]}
    settings = from_dict(LoaderConfig, {"sources": [nature, faces], "batch": 256}, "data.yaml")
    assert settings.sources[1].shorter_side == (512, 768)
    assert (settings.crop, settings.caption_dropout, settings.degradation) == (512, 0.2, DegradationConfig())


def test_what_the_loader_refuses(photos, tokenize):
    source = SourceConfig(photos=str(photos))
    with pytest.raises(InputError, match="batch 3: must be a multiple of the number of processes, 2"):
        Loader(config(source, batch=3), tokenize, process_count=2)
    with pytest.raises(ValueError, match="process_index 2: must be from 0 to 1"):
        Loader(config(source), tokenize, process_index=2, process_count=2)
    with pytest.raises(InputError, match="nowhere: no such folder"):
        Loader(config(SourceConfig(photos="nowhere")), tokenize)
    with pytest.raises(InputError, match="GB of shared memory"):
        Loader(config(source, crop=4096, batch=1024, workers=1000), tokenize)
