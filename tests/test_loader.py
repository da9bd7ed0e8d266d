"""The stream of batches: what is in them, and that they replay whatever makes them."""

import dataclasses
import json
import logging
import multiprocessing
import os
import re
import signal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import coordinates, write, write_caption, write_pairs
from skimage import data as photographs
from tiny import write_tokenizer

from faithdiff_jax.config import from_dict
from faithdiff_jax.data import loader as loader_module
from faithdiff_jax.data.degradation.degrade import DegradationConfig
from faithdiff_jax.data.loader import DataConfig, Loader
from faithdiff_jax.data.mixture import SourceConfig
from faithdiff_jax.data.samples import make_sample
from faithdiff_jax.data.shard_writer import make_shards
from faithdiff_jax.data.sources import PairFolder
from faithdiff_jax.data.workers import WorkerError
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


def load(tokenize, *sources: SourceConfig, batch=2, process_index=0, process_count=1, **settings) -> Loader:
    config = DataConfig(**{"crop": 32, "bad_file_limit": 0.2, "sources": sources, **settings})
    return Loader(config, tokenize, batch=batch, process_index=process_index, process_count=process_count)


def take(batches, count):
    return [next(batches) for _ in range(count)]


def same(left, right):
    return len(left) == len(right) and all(
        a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)
        for a, b in zip(left, right, strict=True)
    )


def test_batches(photos, tokenize):
    loader = load(tokenize, SourceConfig(photos=str(photos)), batch=3, caption_dropout=0.0)
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
        sample, index, _ = loader.stream[row]
        assert np.array_equal(batch["hq"][row], to_float(sample.hq))
        assert np.array_equal(batch["lq"][row], to_float(sample.lq))
        assert np.array_equal(batch["time_ids"][row], sample.time_ids)
        assert np.array_equal(batch["index"][row], index)
        expected = tokenize([sample.caption])
        assert all(np.array_equal(batch[f"token_ids_{i}"][row], ids[0]) for i, ids in enumerate(expected))
    assert all(batch[name].min() >= -1 and batch[name].max() <= 1 for name in ("hq", "lq"))
    captions = {loader.stream[position][0].caption for position in range(5)}
    assert captions == {"", "The cat. It looks."}


def test_resuming_gives_the_same_batches_for_any_number_of_workers(photos, tokenize):
    """Zero, one and two workers hand the position on to one another; one of the photographs is bad."""
    source = SourceConfig(photos=str(photos))
    expected = take(iter(load(tokenize, source)), 11)
    got, state = [], None
    for workers, count in ((0, 3), (1, 3), (2, 3), (0, 2)):
        with iter(load(tokenize, source, workers=workers, prefetch=2)) as batches:
            if state is not None:
                batches.set_state(json.loads(state))
            got += take(batches, count)
            state = json.dumps(batches.get_state())
    assert len(state) < 200
    assert same(got, expected)
    assert not same(expected[:4], expected[4:8])


def test_two_processes_share_the_batch_of_one(photos, tokenize):
    source = SourceConfig(photos=str(photos))
    whole = iter(load(tokenize, source, batch=6))
    parts = [iter(load(tokenize, source, batch=6, process_index=i, process_count=2)) for i in range(2)]
    for step in range(4):
        rows = [next(part) for part in parts]
        assert [len(part["hq"]) for part in rows] == [3, 3]
        assert same([{key: np.concatenate([part[key] for part in rows]) for key in rows[0]}], [next(whole)])
        if step == 1:  # both start again, from either's state
            state = parts[1].get_state()
            parts = [iter(load(tokenize, source, batch=6, process_index=i, process_count=2)) for i in range(2)]
            for part in parts:
                part.set_state(state)


def test_set_state_goes_back_and_another_batch_size_continues_the_stream(photos, tokenize):
    source = SourceConfig(photos=str(photos))
    batches = iter(load(tokenize, source, batch=4))
    start, first = batches.get_state(), next(batches)
    batches.set_state(start)
    assert same([next(batches)], [first])
    pairs = iter(load(tokenize, source, batch=2))
    pairs.set_state(batches.get_state())
    halves = take(pairs, 2)
    assert same([{key: np.concatenate([half[key] for half in halves]) for key in first}], [next(batches)])


def test_a_photograph_that_was_replaced_is_noticed(tmp_path, tokenize):
    """By its name and size; a state from before there were fingerprints is taken as it is."""
    for name in ("a", "b"):
        write(tmp_path / f"{name}.png", coordinates(40, 40))
    source = SourceConfig(photos=str(tmp_path))
    state = json.loads(json.dumps(iter(load(tokenize, source)).get_state()))
    iter(load(tokenize, source)).set_state(state)
    write(tmp_path / "b.png", coordinates(44, 40))
    changed = iter(load(tokenize, source))
    with pytest.raises(InputError, match="files were replaced, renamed or exchanged since the position was saved"):
        changed.set_state(state)
    del state["fingerprints"]
    changed.set_state(state)


def test_resuming_makes_nothing_of_what_was_skipped(tmp_path, tokenize, monkeypatch):
    made = []

    def counted(record, *arguments):
        made.append(record.name)
        return make_sample(record, *arguments)

    monkeypatch.setattr(loader_module, "make_sample", counted)
    batches = iter(load(tokenize, SourceConfig(pairs=str(write_pairs(tmp_path))), batch=3))
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
    batches = iter(load(tokenize, SourceConfig(photos=str(photos))))
    with pytest.raises(InputError, match=message):
        batches.set_state({**batches.get_state(), **change})
    with pytest.raises(InputError, match="no 'position'"):
        batches.set_state({})


def test_the_same_record_differs_from_epoch_to_epoch(tmp_path, tokenize):
    stream = load(tokenize, SourceConfig(pairs=str(write_pairs(tmp_path)))).stream
    crops = {}
    for position in range(12):
        sample, (_, _, record), _ = stream[position]
        crops.setdefault(int(record), set()).add(sample.hq.tobytes())
    assert all(len(seen) == 4 for seen in crops.values())


def test_shards_give_the_stream_of_the_folder(tmp_path, tokenize):
    folder = write_pairs(tmp_path / "pairs", 5)
    make_shards(PairFolder(folder), "pairs", tmp_path / "shards", 2)
    streams = [
        iter(load(tokenize, source))
        for source in (SourceConfig(pairs=str(folder)), SourceConfig(shards=str(tmp_path / "shards")))
    ]
    assert same(take(streams[0], 4), take(streams[1], 4))


def test_bad_files_are_skipped_named_once_and_replaced(photos, tokenize, caplog):
    loader = load(tokenize, SourceConfig(photos=str(photos)), batch=5)
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


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGKILL, "data: a worker died (SIGKILL, as the system sends when memory runs out"),
        (signal.SIGSTOP, "data: no batch came for 2 s (data.timeout): the workers hang"),
    ],
)
def test_training_stops_without_its_workers(photos, tokenize, number, message):
    """One that is killed, and one that hangs; that which a scheduler sends them is not theirs to follow."""
    with iter(load(tokenize, SourceConfig(photos=str(photos)), workers=1)) as batches:
        next(batches)
        batches._loader.config = dataclasses.replace(batches._loader.config, timeout=2)
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, number)
        with pytest.raises(WorkerError, match=re.escape(message)):
            take(batches, 10_000)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 1])
def test_training_stops_with_too_many_bad_files(photos, tokenize, workers):
    source = SourceConfig(photos=str(photos))
    with (
        iter(load(tokenize, source, batch=5, bad_file_limit=0.19, workers=workers)) as batches,
        pytest.raises(InputError, match=r"1 unusable records, bad_file_limit 0\.19 allows 0"),
    ):
        take(batches, 2)


def test_too_many_bad_files_apart_from_each_other_stop_it_too(tmp_path, tokenize):
    for number in range(10):
        write(tmp_path / f"{number}.png", coordinates(40, 40))
    for number in (1, 4, 8):
        (tmp_path / f"{number}.png").write_bytes(b"")
    batches = iter(load(tokenize, SourceConfig(photos=str(tmp_path)), bad_file_limit=0.2))
    with pytest.raises(InputError, match=r"3 unusable records, bad_file_limit 0\.2 allows 2; see the log"):
        take(batches, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": [{"photos": "a", "weight": 0.5}, {"pairs": "b", "weight": 0.4}]}, "sum to 0.9: must sum to 1"),
        ({"sources": [{"photos": "a", "pairs": "b"}]}, "photos=a, pairs=b: give one of"),
        ({"sources": [{}]}, "a source has no folder"),
        ({"sources": [{"photos": "a", "weight": 2}]}, r"weight 2\.0 of photos=a"),
        ({"sources": [{"photos": "a", "shorter_side": [512, 510]}]}, "shorter_side 512, 510"),
        ({"sources": [{"shards": "a", "captions": "b"}]}, "shards hold their captions"),
        ({"sources": [{"photo": "a"}]}, r"unknown key sources\[0\]\.photo"),
        ({"crop": 30}, "crop is 30: must be a positive multiple"),
        ({"sources": [{"photos": "a", "weight": float("nan")}]}, "weight nan of photos=a"),
        ({"sources": [{"photos": "a", "shorter_side": [4, 1 << 40]}]}, "shorter_side 4, 1099511627776"),
        ({"crop": 1_000_000_000}, "crop is 1000000000: must be a whole number up to 8192"),
        ({"crop": -4}, "crop is -4: must be a positive multiple"),
        ({"crop": "x"}, "crop"),
        ({"workers": -1}, "workers is -1: must be a whole number from 0 to 1024"),
        ({"prefetch": 0}, "prefetch is 0"),
        ({"caption_dropout": 1.5}, "caption_dropout is 1.5"),
        ({"caption_dropout": float("nan")}, "caption_dropout is nan"),
        ({"bad_file_limit": -0.1}, "bad_file_limit is -0.1"),
        ({"bad_file_limit": float("inf")}, "bad_file_limit is inf"),
    ],
)
def test_settings_that_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        from_dict(DataConfig, {"sources": [{"photos": "a"}], **changes}, "data.yaml")


def test_the_published_mixture_can_be_written_down():
    nature = {"photos": "/nature", "weight": 0.875}
    faces = {"pairs": "/faces", "weight": 0.125, "shorter_side": [512, 768]}
    settings = from_dict(DataConfig, {"sources": [nature, faces]}, "data.yaml")
    assert settings.sources[1].shorter_side == (512, 768)
    assert (settings.crop, settings.caption_dropout, settings.degradation) == (512, 0.2, DegradationConfig())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 3, "process_count": 2}, "batch is 3: must be a multiple of the number of processes, 2"),
        ({"batch": 0}, "batch is 0: must be a whole number from 1"),
        ({"batch": 1 << 21}, "batch is 2097152: must be a whole number"),
        ({"batch": 1 << 20, "crop": 8192}, "1,048,576 samples with crop 8192 take 1688849.9 GB in each process"),
        ({"batch": 64, "workers": 1000, "crop": 1024}, "GB of shared memory"),
        ({"sources": ()}, "sources is empty"),
    ],
)
def test_what_the_loader_refuses(photos, tokenize, settings, message):
    with pytest.raises(InputError, match=message):
        load(tokenize, SourceConfig(photos=str(photos)), **settings)


def test_seeds_processes_and_folders_that_are_refused(photos, tokenize):
    source = SourceConfig(photos=str(photos))
    with pytest.raises(ValueError, match="process_index is 2: must be from 0 to 1"):
        load(tokenize, source, process_index=2, process_count=2)
    with pytest.raises(InputError, match="nowhere: no such folder"):
        load(tokenize, SourceConfig(photos="nowhere"))
    for seed in (-1, 1 << 32, 0.5, True):
        with pytest.raises(InputError, match=f"seed is {seed}: must be a whole number from 0"):
            Loader(DataConfig(sources=(source,)), tokenize, batch=1, seed=seed)


@pytest.mark.parametrize("position", [-1, "1", 1.0, True, None, 1 << 64])
def test_a_position_of_nonsense_is_refused(photos, tokenize, position):
    batches = iter(load(tokenize, SourceConfig(photos=str(photos))))
    with pytest.raises(InputError, match="the saved data position has position"):
        batches.set_state({**batches.get_state(), "position": position})


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.floats() | st.integers(), max_size=3),
    st.dictionaries(st.sampled_from(["probability", "scale", "sizes", "photos", "weight"]), st.floats() | st.none()),
)


@settings(max_examples=200)
@given(key=st.sampled_from([field.name for field in dataclasses.fields(DataConfig)]), value=VALUES)
def test_a_configuration_of_nonsense_is_one_line_or_within_its_ranges(key, value):
    try:
        config = from_dict(DataConfig, {"sources": [{"photos": "a"}], key: value}, "data.yaml")
    except InputError as error:
        config, message = DataConfig(), str(error)
    else:
        message = ""
    assert "\n" not in message
    assert 4 <= config.crop <= 8192
    assert 0 <= config.caption_dropout <= 1
    assert 0 <= config.bad_file_limit <= 1
    assert 0 <= config.workers <= 1024 >= config.prefetch >= 1
