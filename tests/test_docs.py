"""The pages in `docs`: their pieces run, and their links lead somewhere."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity import assert_parity

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCED = re.compile(r"^```(?P<language>[^\n]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
PYTHON = ("python", "{code-cell} ipython3")
LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")


def python_blocks(page: pathlib.Path) -> list[tuple[int, str]]:
    """(line of its first statement, text) of every fenced python block."""
    text = page.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, match.start("body")) + 1, match["body"])
        for match in FENCED.finditer(text)
        if match["language"] in PYTHON
    ]


def run_blocks(page: pathlib.Path, namespace: dict) -> None:
    """Run a page's blocks in order; tracebacks point into the page, and the error names the block."""
    for line, block in python_blocks(page):
        code = compile("\n" * (line - 1) + block, str(page), "exec")
        try:
            exec(code, namespace)
        except Exception as error:
            raise AssertionError(f"{page.name}: the block at line {line} failed: {error!r}") from error


def test_parts_run():
    n = {"__name__": "parts"}
    run_blocks(ROOT / "docs" / "parts.md", n)

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
        n["lq_features"], n["context"], n["pooled"], None, None, n["start"], steps=4, guidance=1, start=None
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


def test_a_failing_block_names_its_line(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n```python\na = 1\n```\n\n```sh\nexit 1\n```\n\n```python\na += 1\na / 0\n```\n")
    namespace = {}
    with pytest.raises(AssertionError, match=r"page.md: the block at line 12 failed: ZeroDivisionError") as caught:
        run_blocks(page, namespace)
    assert namespace["a"] == 2
    assert caught.value.__cause__.__traceback__.tb_next.tb_lineno == 13


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
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
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
