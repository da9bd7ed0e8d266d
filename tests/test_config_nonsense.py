"""Structured nonsense thrown at the readers of configurations: a config comes out, or one line of what is wrong."""

import copy
import dataclasses
import math
import string

import hypothesis
import pytest
from hypothesis import strategies

from faithdiff_jax.config import Range, check_ranges, from_dict, load_yaml, override, to_dict
from faithdiff_jax.errors import InputError, shown
from faithdiff_jax.files.yaml_text import SIZE_LIMIT
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.training.autoencoder import AutoencoderConfig
from faithdiff_jax.training.config import TrainConfig, load_train_config

SETTINGS = hypothesis.settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
GROUPS = {"all": {"parameters": ["unet.*"], "learning_rate": 1e-4}}
VALID = {
    TrainConfig: {"steps": 600, "groups": GROUPS},
    FaithDiffConfig: {},
    AutoencoderConfig: {"model": "m.yaml", "tokenizers": ".", "steps": 200},
}


def names(config: dict) -> list[str]:
    """The keys of a config at its top and one level down, dotted."""
    found = []
    for key, value in config.items():
        found += [key, *(f"{key}.{inner}" for inner in (value if isinstance(value, dict) else ()))]
    return found


def _hashable(value: object) -> bool:
    return not isinstance(value, float) or not math.isnan(value)


scalars = strategies.one_of(
    strategies.none(),
    strategies.booleans(),
    strategies.integers(),
    strategies.sampled_from([0, -1, 2**31, 2**63, 10**400]),
    strategies.floats(),
    strategies.text(max_size=8),
    strategies.dates(),
    strategies.binary(max_size=4),
)
DEFAULTS = {cls: to_dict(from_dict(cls, given, "test")) for cls, given in VALID.items()}
NAMES = {cls: names(given) for cls, given in DEFAULTS.items()}
keys = strategies.sampled_from(sorted({name for found in NAMES.values() for key in found for name in key.split(".")}))
nested = strategies.recursive(
    scalars,
    lambda inner: strategies.one_of(
        strategies.lists(inner, max_size=3),
        strategies.dictionaries(keys | scalars.filter(_hashable), inner, max_size=3),
    ),
    max_leaves=12,
)


def a_config_or_one_line(read) -> None:
    message = "fine"
    try:
        read()
    except InputError as error:
        message = str(error)
    assert "\n" not in message
    assert 0 < len(message) < 2000


@pytest.mark.parametrize("cls", VALID, ids=lambda cls: cls.__name__)
@SETTINGS
@hypothesis.given(data=strategies.data())
def test_from_dict(cls, data):
    """A valid config with some of its values replaced, at the top or one level down."""
    changes = data.draw(strategies.dictionaries(strategies.sampled_from(NAMES[cls]), nested, max_size=3))
    given = copy.deepcopy(DEFAULTS[cls])
    for key, value in changes.items():
        *parents, name = key.split(".")
        node = given
        for parent in parents:
            node = node[parent] if isinstance(node.get(parent), dict) else {}
        node[name] = value
    a_config_or_one_line(lambda: from_dict(cls, given, "test"))


@SETTINGS
@hypothesis.given(given=nested)
def test_from_dict_of_anything(given):
    a_config_or_one_line(lambda: from_dict(TrainConfig, given, "test"))


@SETTINGS
@hypothesis.given(key=keys | strategies.text("ab.=[]{}", max_size=6), value=strategies.text(max_size=12))
def test_override(key, value):
    a_config_or_one_line(lambda: from_dict(TrainConfig, override(VALID[TrainConfig], [f"{key}={value}"]), "test"))


tokens = strategies.sampled_from(
    [*"[]{}:,&*!|>%@`?-#'\"\n\t ", "a", "steps", "groups", "extends", "<<", ": ", "- ", "&a ", "*a", "!!int ", "!!set ",
     "!!binary ", "2024-13-45", "1e999", ".nan", ".inf", "0x" + "f" * 40, "---\n", "...\n", "~", "null", "\x00", "\x85"]
)  # fmt: skip


@SETTINGS
@hypothesis.given(
    text=strategies.lists(tokens | strategies.text(string.printable, max_size=3), max_size=20).map("".join)
)
def test_yaml_text(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_bytes(text.encode())
    a_config_or_one_line(lambda: load_yaml(path))
    a_config_or_one_line(lambda: load_train_config(path, [f"steps={text}"]))
    a_config_or_one_line(lambda: override({}, [f"a={text}"]))


@SETTINGS
@hypothesis.given(data=strategies.binary(max_size=30))
def test_bytes(tmp_path, data):
    (tmp_path / "run.yaml").write_bytes(data)
    a_config_or_one_line(lambda: load_train_config(tmp_path / "run.yaml"))


BOMB = "\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))])
MERGES = "\n".join(
    ["a0: &a0 {k: 1}", *(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 12))]
)
HOSTILE = {
    "alias bomb": (BOMB, "by its aliases"),
    "merged alias bomb": (MERGES, "by its aliases"),
    "an alias of itself": ("a: &a [*a]", "an alias inside of what it stands for"),
    "a chain of aliases": ("\n".join(f"a{i}: &a{i} [{f'*a{i - 1}' if i else 1}]" for i in range(50)), "levels"),
    "lists": ("steps: " + "[" * 5000, "nested too deep"),
    "lists that end": ("steps: " + "[" * 1000 + "]" * 1000, "nested too deep"),
    "mappings": ("steps: " + "{a: " * 1000, "nested too deep"),
    "blocks": ("\n".join(" " * i + "- - -" for i in range(200)), "YAML"),
    "a date": ("steps: 2024-13-45", "month must be in 1..12"),
    "a good date": ("steps: 2024-10-10\ngroups: {}", "steps is datetime.date(2024, 10, 10): must be a whole number"),
    "digits": ("steps: " + "9" * 5000, "cannot be used"),
    "hexadecimal digits": ("groups: {}\nsteps: 0x" + "f" * 5000, "steps is a int: must be a whole number from 1"),
    "a key twice": ("steps: 1\nsteps: 2", "the key 'steps' occurs twice"),
    "not text": (b"steps: \xff", "is not UTF-8"),
    "too large": ("#" * 300_000, "too large for a YAML file"),
    "many values": ("a: [" + "1," * (SIZE_LIMIT + 1) + "]", "20,000 values"),
    "python": ("a: !!python/object/apply:os.system [echo]", "is not YAML"),
    "a list for a key": ("? [a]\n: b", "is not YAML"),
    "nothing": ("", "holds NoneType, a mapping"),
    "extends a list": ("extends: [a]", "extends is ['a']: must be the name of a file or"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(tmp_path, name):
    text, message = HOSTILE[name]
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as caught:
        load_train_config(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_hostile_overrides():
    for value in ("2024-13-45", "9" * 5000, "[" * 1000, BOMB, "#" * 300_000):
        with pytest.raises(InputError) as caught:
            override({}, [f"steps={value}"])
        assert "override 'steps=" in str(caught.value)
        assert len(str(caught.value)) < 400
    with pytest.raises(InputError, match="a key has at most 32 names"):
        override({}, [f"{'a.' * 2000}b=1"])
    nest: list = []
    for _ in range(5000):
        nest = [nest]
    for read in (lambda: override({"a": nest}, []), lambda: from_dict(TrainConfig, {"steps": nest}, "test")):
        with pytest.raises(InputError, match="nested too deep"):
            read()


def test_files_that_extend_in_a_circle_or_for_ever(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.yaml").write_text(f"extends: {i + 1}.yaml\n")
    with pytest.raises(InputError, match="more than 16 files extend one another"):
        load_train_config(tmp_path / "0.yaml")
    (tmp_path / "0.yaml").write_text("extends: 0.yaml")
    with pytest.raises(InputError, match=r"0.yaml: extends itself"):
        load_train_config(tmp_path / "0.yaml")


def numbers(config: object, prefix: str = "") -> list[str]:
    """The dotted keys of a config's numbers."""
    found = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found += numbers(value, f"{prefix}{field.name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append(prefix + field.name)
    return found


COMPLETE = {
    "steps": 600,
    "groups": GROUPS,
    "lora": {"rank": 2},
    "validation": {"photos": "photos"},
    "watch": {"peak_tflops": 100.0},
    "checkpoint": {"keep_every": 1000},
    "data": {"sources": [{"photos": "photos"}]},
}


@pytest.mark.parametrize(
    "value", [".nan", ".inf", "-.inf", "true", "-7", "1" + "0" * 30, "1.0e+300", "[]", "2024-01-01"]
)
def test_no_number_takes_nonsense(value):
    """Every number of a run's configuration is refused outside its range, by its full name."""
    config = from_dict(TrainConfig, COMPLETE, "test")
    found = [key for key in numbers(config) if not key.startswith("data.degradation.")]
    assert len(found) > 30
    for key in [*found, "groups.all.learning_rate", "groups.all.weight_decay"]:
        with pytest.raises(InputError) as caught:
            from_dict(TrainConfig, override(COMPLETE, [f"{key}={value}"]), "test")
        assert key.rpartition(".")[2] in str(caught.value)


def test_ranges():
    assert 1 in Range(0, 1)
    assert 1 not in Range(0, 1, below=True)
    assert 0 not in Range(0, 1, above=True)
    assert math.nan not in Range(-math.inf, math.inf)
    assert True not in Range(0, 1)
    assert 1.0 not in Range(0, 1, whole=True)
    assert None not in Range(0, 1)
    assert None in Range(0, 1, optional=True)
    assert str(Range(0, 1e-30, above=True, optional=True)) == "must be above 0 and at most 1e-30, or null"
    assert str(Range(1, 2**31, whole=True)) == "must be a whole number from 1 to 2147483648"

    @dataclasses.dataclass(frozen=True)
    class Config:
        rate: float

    with pytest.raises(InputError, match=r"^rate is nan: must be from 0 to 1$"):
        check_ranges(Config(math.nan), rate=Range(0, 1))


def test_shown():
    assert shown("a\nb") == r"'a\nb'"
    assert len(shown("x" * 1000)) < 70
    assert shown(10**5000) == "a int"


def test_the_largest_file_is_read(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("a: [" + "1, " * 15_000 + "1]", encoding="utf-8")
    assert len(load_yaml(path)["a"]) == 15_001
