"""The documentation: its code runs, its commands are those there are, its links and figures lead somewhere."""

import importlib
import inspect
import itertools
import json
import pathlib
import re
import shlex
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax import nnx
from parity import assert_parity
from PIL import Image

import faithdiff_jax
from faithdiff_jax import SMALL_MODEL, FaithDiff
from faithdiff_jax.cli.main import COMMANDS

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
NOTEBOOK = DOCS / "notebooks" / "convert_restore_parts.ipynb"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
    *sorted(DOCS.rglob("*.md")),
    NOTEBOOK,
]
ROOMS = sorted(path.parent.name for path in (ROOT / "faithdiff_jax").glob("*/__init__.py"))
FENCED = re.compile(r"^```(?P<language>[^\n]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
PYTHON = ("python", "{code-cell} ipython3")
INDENTED = re.compile(r"(?:(?<=\n\n)(?:    .*\n)+)", re.MULTILINE)
LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")
SCRIPT = re.compile(r"python (?P<script>[\w/]+\.py)")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def text_of(page: pathlib.Path) -> str:
    """The text of a page; of a notebook, its cells as a page would have them."""
    if page.suffix == ".md":
        return page.read_text(encoding="utf-8")
    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
    texts = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    return "\n\n".join(f"```python\n{text}\n```" if kind == "code" else text for kind, text in texts) + "\n"


def python_blocks(page: pathlib.Path) -> list[tuple[int, str]]:
    """(line of its first statement, text) of every fenced python block."""
    text = text_of(page)
    return [
        (text.count("\n", 0, match.start("body")) + 1, match["body"])
        for match in FENCED.finditer(text)
        if match["language"] in PYTHON and not match["body"].startswith(":tags: [remove-cell]")
    ]


def run_blocks(page: pathlib.Path, namespace: dict, smaller: tuple[tuple[str, str], ...] = ()) -> dict:
    """Run a page's blocks in order; tracebacks point into the page, and the error names the block.

    `smaller` replaces sizes in the text that would take too long.
    """
    for line, block in python_blocks(page):
        for size, small in smaller:
            block = block.replace(size, small)
        code = compile("\n" * (line - 1) + block, str(page), "exec")
        try:
            exec(code, namespace)
        except Exception as error:
            raise AssertionError(f"{page.name}: the block at line {line} failed: {error!r}") from error
    return namespace


def commands(page: pathlib.Path) -> list[list[str]]:
    """The words of every command line: of `sh` blocks and of indented blocks, continuations joined."""
    text = text_of(page)
    blocks = [match["body"] for match in FENCED.finditer(text) if match["language"] == "sh"]
    blocks += [match[0] for match in INDENTED.finditer(FENCED.sub("", text))]
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if re.match(r"faithdiff|python|make|pip", line) and (words := as_words(line))]


def as_words(line: str) -> list[str]:
    return shlex.split(line, comments=True)


def parse(name: str, words: list[str]) -> None:
    """Parse the flags of a command with its own parser; what it takes for folders is there."""
    for flag, value in itertools.pairwise(words):
        if flag in ("--input", "--data", "--photos", "--captions", "--references", "--held-out", "--originals"):
            pathlib.Path(value).mkdir(parents=True, exist_ok=True)
    importlib.import_module(COMMANDS[name].module).build_parser().parse_intermixed_args(words)


def test_parts_run():
    n = run_blocks(DOCS / "parts.md", {"__name__": "parts"})

    # UNet, as a module and as a function
    assert n["predicted"].shape == n["latents"].shape
    assert_parity(n["predicted_by_function"], n["predicted"])
    assert n["count"] == sum(leaf.size for leaf in jax.tree.leaves(n["half"]))
    assert {leaf.dtype for leaf in jax.tree.leaves(n["half"])} == {jnp.dtype(jnp.bfloat16)}
    assert n["first_kernel"].shape == (3, 3, *n["config"].channels[:1] * 2)
    assert n["losses"] == sorted(n["losses"], reverse=True)
    assert set(n["trained"]) | set(n["frozen"]) == set(n["params"])

    # Aligner: new, it changes nothing, but the UNet has been trained since `predicted`
    assert_parity(n["aligned"], n["apply"]({**n["frozen"], **n["trained"]}, *n["inputs"]))
    assert np.abs(n["aligned"] - n["predicted"]).max() > 0

    # Loading, features, samplers
    assert n["embedding"].shape == (2, n["published"].unet.embedding_dim)
    assert n["embedding"].dtype == jnp.bfloat16
    model, width = n["model"], n["published"].vae.channels[-1]
    assert n["lq_features"].shape == (1, 8, 10, width)
    same = model.sample(
        n["lq_features"], n["context"], n["pooled"], None, None, n["start"], steps=20, guidance=1, start=None
    )
    assert_parity(n["sampled"], same)
    assert abs(n["drawn_deviation"] - n["deviation"]) < 0.02
    assert n["scores"].shape == (1, 8, 10, n["classes"])
    assert n["probe_losses"][-1] < n["probe_losses"][0]

    # Sharding
    assert_parity(n["sharded_prediction"], n["predicted"])
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(n["sharded_params"]))
    assert n["own_params"]["conv_in"]["kernel"].sharding.spec[-1] == "model"
    aligner = nnx.to_pure_dict(nnx.state(n["aligner"]))
    for made, before in zip(jax.tree.leaves(n["made_in_place"]), jax.tree.leaves(aligner), strict=True):
        np.testing.assert_allclose(made, before, rtol=1e-5, atol=1e-6)
    assert jax.tree.map(lambda leaf: leaf.sharding, n["made_in_place"]) == n["layout"]


def test_notebook_runs(monkeypatch):
    monkeypatch.chdir(NOTEBOOK.parent)
    n = run_blocks(NOTEBOOK, {"__name__": "notebook"})
    assert n["restored"].shape == (288, 448, 3)
    assert n["features"].shape == (64, 64, n["model"].config.vae.channels[-1])
    assert n["back"].keys() == n["tensors"].keys()


RESTORATIONS = {"README.md": 1, "docs/quickstart.md": 1, "docs/restoring.md": 4, "docs/attribution.md": 1}


@pytest.mark.parametrize("page", [*RESTORATIONS, "docs/training.md"])
def test_examples_run(page, tmp_path, monkeypatch):
    """Every block, with the small model in the place of the published one; that `restore` restores, others test."""
    (tmp_path / "models").mkdir()
    shutil.copytree(SMALL_MODEL, tmp_path / "models" / "faithdiff")
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    shutil.copytree(ROOT / "examples" / "originals", tmp_path / "photos")
    Image.open(ROOT / "examples" / "chelsea.png").save(tmp_path / "bus.jpg")
    monkeypatch.chdir(tmp_path)
    signature, options = inspect.signature(FaithDiff.restore), []

    def restore(self, *args, **kwargs):
        bound = signature.bind(self, *args, **kwargs).arguments
        options.append((bound.get("options") or self.defaults).replace(**bound.get("replacements", {})))
        size = [round(side * options[-1].scale) for side in bound["image"].shape[:2]]
        return np.asarray(Image.fromarray(bound["image"]).resize(size[::-1]))

    def attribute(self, image, caption, words, options=None, **replacements):
        restored = self.restore(image, caption, options, **replacements)
        return restored, {word: np.zeros(restored.shape[:2], np.float32) for word in words}

    monkeypatch.setattr(FaithDiff, "restore", restore)
    monkeypatch.setattr(FaithDiff, "attribute", attribute)
    assert python_blocks(ROOT / page)
    n = run_blocks(ROOT / page, {"__name__": "__main__"}, (("batch=16", "batch=1"), ("workers=4", "workers=0")))
    if page == "docs/training.md":
        assert n["batch"]["hq"].shape == (1, 512, 512, 3)
    else:
        assert len(options) == RESTORATIONS[page]


def test_a_failing_block_names_its_line(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n```python\na = 1\n```\n\n```sh\nexit 1\n```\n\n```python\na += 1\na / 0\n```\n")
    namespace = {}
    with pytest.raises(AssertionError, match=r"page.md: the block at line 12 failed: ZeroDivisionError") as caught:
        run_blocks(page, namespace)
    assert namespace["a"] == 2
    assert caught.value.__cause__.__traceback__.tb_next.tb_lineno == 13


@each_page
def test_commands_are_those_there_are(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"infer.py": "restore", "train.py": "train", "convert_weights.py": "convert", "caption.py": "caption"}
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    extras = (ROOT / "pyproject.toml").read_text()
    for words in commands(page):
        name, *flags = words[1:]
        if words[0] == "python" and name in names:
            words, name = ["faithdiff", names[name], *flags], names[name]
        if words[0] == "faithdiff":
            try:
                parse(name, flags)
            except SystemExit:
                pytest.fail(f"{page.name}: {shlex.join(words)}: {capsys.readouterr().err}")
        elif words[0] == "make":
            assert name in targets, f"{page.name}: make {name}"
        elif words[0] == "pip" and (found := re.fullmatch(r"\.\[(.*)\]", words[-1])):
            assert all(f"\n{extra} = [" in extras for extra in found[1].split(",")), f"{page.name}: {words[-1]}"


@each_page
def test_scripts_of_figures_are_there(page):
    scripts = SCRIPT.findall(text_of(page))
    assert not [script for script in scripts if not (ROOT / script).is_file()]


def test_a_wrong_flag_in_a_page_is_found(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(
        "Text:\n\n    faithdiff restore --input photos \\\n        --nonsense 3\n\n```sh\nmake demo # x\n```\n"
    )
    demo, restore = commands(page)
    assert demo == ["make", "demo"]
    assert restore == ["faithdiff", "restore", "--input", "photos", "--nonsense", "3"]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        parse("restore", restore[2:])


@each_page
def test_links_lead_somewhere(page):
    text = FENCED.sub("", text_of(page))
    broken = []
    for target in (match["target"] for match in LINK.finditer(text)):
        if re.match(r"\w+:", target):
            continue  # another site's
        file, _, anchor = target.partition("#")
        linked = page.parent / file if file else page
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            broken.append(target)
    assert not broken, f"{page.name} links to {', '.join(broken)}, which is not there"


def anchors(page: pathlib.Path) -> set[str]:
    """The names that a page's headings have in links."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_and_room_has_its_place():
    listed = {
        f"{index.parent.relative_to(DOCS)}/{name}".removeprefix("./")
        for index in (DOCS / "index.md", DOCS / "api" / "index.md")
        for name in re.findall(r"^[\w/]+$", index.read_text(), re.MULTILINE)
    }
    assert listed == {path.relative_to(DOCS).with_suffix("").as_posix() for path in [*DOCS.rglob("*.md"), NOTEBOOK]} - {
        "index"
    }
    for page in (ROOT / "CONTRIBUTING.md", DOCS / "design.md"):
        assert not [room for room in ROOMS if f"| `{room}` |" not in page.read_text()], page.name
    assert set(ROOMS) - {"cli"} <= {path.stem for path in (DOCS / "api").glob("*.md")}
    assert re.findall(r"{command} (\w+)", (DOCS / "commands.md").read_text()) == list(COMMANDS)


def test_a_public_project():
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(readme) < 120
    assert readme[2].startswith("![")
    paths = re.findall(r"`(faithdiff_jax/[\w/.]+)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(paths) > 10
    assert not [path for path in paths if not (ROOT / path).exists()]
    version = faithdiff_jax.__version__
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    files = [ROOT / ".pre-commit-config.yaml", *(ROOT / ".github").rglob("*.yml")]
    assert len(files) == 7
    assert all(isinstance(yaml.safe_load(path.read_text()), dict) for path in files)
