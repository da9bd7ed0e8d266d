"""Which files are read or fetched, of folders and of repositories; no test touches the network."""

import shutil

import huggingface_hub
import pytest
import torch
from converted import convert_files
from huggingface_hub import errors
from published import write_published

from faithdiff_jax import SMALL_MODEL
from faithdiff_jax.errors import InputError
from faithdiff_jax.weights import hub
from faithdiff_jax.weights.model_directory import ModelDirectory

UNET = "unet/diffusion_pytorch_model"


@pytest.mark.parametrize(
    ("names", "variant", "chosen"),
    [
        (["safetensors", "fp16.safetensors", "bin"], None, "safetensors"),
        (["safetensors", "fp16.safetensors", "bin"], "fp16", "fp16.safetensors"),
        (["safetensors"], "fp16", "safetensors"),
        (["fp16.safetensors", "fp16.bin"], None, "fp16.safetensors"),
        (["bin", "fp16.safetensors"], None, "bin"),
        (["fp16.bin"], None, "fp16.bin"),
        (["safetensors.index.json", "bin"], None, "safetensors.index.json"),
        (["bin.index.json"], None, "bin.index.json"),
        (["safetensors.index.fp16.json"], None, "safetensors.index.fp16.json"),
        (["safetensors.index.fp16.json", "bin"], "fp16", "safetensors.index.fp16.json"),
        (["fp16.safetensors.index.json"], "fp16", "fp16.safetensors.index.json"),
        (["non_ema.safetensors"], None, None),
        (["non_ema.safetensors"], "non_ema", "non_ema.safetensors"),
    ],
)
def test_choice_of_weights(names, variant, chosen):
    names = [f"{UNET}.{name}" for name in names] + ["vae/diffusion_pytorch_model.safetensors"]
    wanted = None if chosen is None else f"{UNET}.{chosen}"
    assert hub.choose_weights(names, "unet", hub.DIFFUSERS, variant) == wanted


def test_text_encoders_have_other_names():
    names = ["text_encoder/pytorch_model.bin", "text_encoder/model.fp16.safetensors", "text_encoder/flax_model.msgpack"]
    assert hub.choose_weights(names, "text_encoder", hub.TRANSFORMERS, None) == names[0]
    assert hub.choose_weights(names, "text_encoder", hub.TRANSFORMERS, "fp16") == names[1]


@pytest.mark.parametrize("folder", ["", "unet/"])
def test_shards_of_an_index(folder):
    full = [f"{folder}model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    half = [f"{folder}model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    old = [f"{folder}model-0000{i}-of-00002.bin" for i in (1, 2)]
    names = [*full, *half, *old, "elsewhere/model-00001-of-00002.safetensors"]
    for index, shards in (
        ("model.safetensors.index.json", full),
        ("model.safetensors.index.fp16.json", half),
        ("model.fp16.safetensors.index.json", half),
        ("model.bin.index.json", old),
    ):
        assert hub.with_shards(names, folder + index) == [folder + index, *shards]
    assert hub.with_shards(names, old[0]) == [old[0]]


class Hub:
    """Repositories in a folder, and a record of what was fetched of them."""

    def __init__(self, root, cache):
        self.root, self.cache = root, cache
        self.fetched: list[str] = []

    def list_repo_files(self, repo):
        folder = self.root / repo
        if not folder.is_dir():
            raise errors.LocalEntryNotFoundError("cannot reach it\nand more lines")
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())

    def snapshot_download(self, repo, *, allow_patterns=None, local_files_only=False):
        target = self.cache / repo
        if local_files_only:
            if not target.is_dir():
                raise errors.LocalEntryNotFoundError("nothing cached")
            return str(target)
        assert set(allow_patterns) <= set(self.list_repo_files(repo))
        for name in allow_patterns:
            self.fetched.append(f"{repo}/{name}")
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.root / repo / name, target / name)
        return str(target)


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "hub", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "list_repo_files", hub.list_repo_files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


def test_conversion_from_repositories_fetches_only_what_it_reads(fake_hub, tmp_path):
    models = write_published(tmp_path / "full")
    write_published(tmp_path / "half", variant="fp16", dtype=torch.float16)
    for source, owner, name in (("sdxl", "someone", "SDXL"), ("vae", "another", "vae-fix")):
        shutil.copytree(tmp_path / "full" / source, fake_hub.root / owner / name)
        shutil.copytree(tmp_path / "half" / source, fake_hub.root / owner / name, dirs_exist_ok=True)
    (fake_hub.root / "authors/FaithDiff/more").mkdir(parents=True)
    for name in ("FaithDiff.bin", "more/other.bin", "README.md"):
        shutil.copy(models.faithdiff, fake_hub.root / "authors/FaithDiff" / name)
    repos = {"sdxl": "someone/SDXL", "vae": "another/vae-fix"}

    convert_files(tmp_path / "model", **repos, faithdiff="authors/FaithDiff")
    encoders, tokenizers = ("text_encoder", "text_encoder_2"), ("tokenizer", "tokenizer_2")
    tokenizer_files = ("vocab.json", "merges.txt", "tokenizer_config.json")
    wanted = {
        "authors/FaithDiff/FaithDiff.bin",
        "another/vae-fix/config.json",
        "another/vae-fix/diffusion_pytorch_model.safetensors",
        "someone/SDXL/unet/config.json",
        "someone/SDXL/vae/config.json",
        "someone/SDXL/scheduler/scheduler_config.json",
        *(f"someone/SDXL/{name}/{file}" for name in encoders for file in ("config.json", "model.safetensors")),
        *(f"someone/SDXL/{name}/{file}" for name in tokenizers for file in tokenizer_files),
    }
    assert set(fake_hub.fetched) == wanted
    assert len(fake_hub.fetched) == len(wanted)
    assert ModelDirectory.open(tmp_path / "model").config.unet.context_dim == 40

    fake_hub.fetched.clear()
    convert_files(tmp_path / "start", sdxl=repos["sdxl"], variant="fp16")
    fetched = [name for name in fake_hub.fetched if name.endswith(".safetensors")]
    assert sorted(fetched) == sorted(
        f"someone/SDXL/{name}.fp16.safetensors"
        for name in (UNET, "vae/diffusion_pytorch_model", *(f"{encoder}/model" for encoder in encoders))
    )

    # Without a connection, what was fetched before serves.
    shutil.rmtree(fake_hub.root)
    convert_files(tmp_path / "offline", **repos, faithdiff="authors/FaithDiff/FaithDiff.bin")
    assert ModelDirectory.open(tmp_path / "offline").config == ModelDirectory.open(tmp_path / "model").config


def test_a_file_of_a_repository(fake_hub):
    folder = fake_hub.root / "authors/FaithDiff"
    (folder / "weights").mkdir(parents=True)
    (folder / "weights/stage2.safetensors").write_bytes(b"2")
    found = hub.weight_file("authors/FaithDiff/weights/stage2.safetensors", hub.FAITHDIFF, None)
    assert found == fake_hub.cache / "authors/FaithDiff/weights/stage2.safetensors"
    assert hub.weight_file("authors/FaithDiff", hub.FAITHDIFF, None) == found  # its only weight file
    (folder / "stage1.bin").write_bytes(b"1")
    with pytest.raises(InputError, match=r"holds stage1\.bin, weights/stage2\.safetensors: name one of them"):
        hub.weight_file("authors/FaithDiff", hub.FAITHDIFF, None)
    with pytest.raises(InputError, match=r"the repository authors/FaithDiff has no file stage3\.bin"):
        hub.weight_file("authors/FaithDiff/stage3.bin", hub.FAITHDIFF, None)


@pytest.mark.parametrize(
    "find", [hub.local_folder, lambda given, variant: hub.weight_file(given, hub.FAITHDIFF, variant)]
)
def test_repositories_that_cannot_be_had(fake_hub, monkeypatch, find):
    with pytest.raises(InputError, match=r"^no/one: no such .*: it cannot be reached \(cannot reach it\)$"):
        find("no/one", None)

    for kind, message in (
        (errors.RepositoryNotFoundError, "there is none of that name"),
        (errors.GatedRepoError, "its terms must be accepted"),
    ):
        refused = kind.__new__(kind, "401 Client Error")  # its initialiser wants a whole HTTP response

        def list_repo_files(repo, error=refused):
            raise error

        monkeypatch.setattr(huggingface_hub, "list_repo_files", list_repo_files)
        with pytest.raises(InputError, match=message):
            find("no/one", None)


@pytest.mark.parametrize("given", ["nothing here", "a/b/c d", "/no/such/place"])
def test_neither_path_nor_repository(fake_hub, given):
    with pytest.raises(InputError, match="no such folder"):
        hub.local_folder(given, list)


def test_neither_file_nor_repository(fake_hub, tmp_path):
    with pytest.raises(InputError, match="no such file"):
        hub.weight_file(str(tmp_path / "FaithDiff.bin"), hub.FAITHDIFF, None)


def test_a_fetch_that_breaks_off(fake_hub, monkeypatch):
    (fake_hub.root / "some/repo").mkdir(parents=True)

    def breaks(repo, **options):
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", breaks)
    with pytest.raises(InputError, match=r"some/repo: could not be fetched: it cannot be reached \(reset by peer\)"):
        hub.local_folder("some/repo", list)


def test_a_model_directory_of_a_repository(fake_hub, tmp_path):
    folder = shutil.copytree(SMALL_MODEL, fake_hub.root / "someone/small")
    (folder / "samples").mkdir()
    for name in (".gitattributes", "samples/picture.png", "samples/more.safetensors", "training.log"):
        (folder / name).write_bytes(b"not of the model")
    found = hub.model_folder("someone/small")
    model = ModelDirectory.open(found)
    assert model.digest == ModelDirectory.open(hub.model_folder(SMALL_MODEL)).digest
    files = {*model.files, "config.yaml", "README.md"}
    assert set(fake_hub.fetched) == {f"someone/small/{name}" for name in files}
    with pytest.raises(InputError, match="no such folder"):
        hub.model_folder("no such")
