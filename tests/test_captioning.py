import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from skimage import data
from tiny_llava import save, tiny_parts, write_llava
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from faithdiff_jax.cli.main import run_command
from faithdiff_jax.data import captioning
from faithdiff_jax.data.captioning import Captioner, Job, PictureRefused, caption_pictures
from faithdiff_jax.errors import InputError
from faithdiff_jax.files.captions import find_caption, read_caption, write_caption
from faithdiff_jax.files.images import load_image

ROOT = Path(__file__).parents[1]
TEMPLATE = """{{ bos_token }}{% for message in messages %}{% for part in message['content'] %}\
{{ '<image> ' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %} Answer:"""
GRID = [[28, 56], [56, 28], [56, 56]]


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """LLaVA-1.5's architecture and processor, without a chat template."""
    return write_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def llava_next(tmp_path_factory):
    """One of its successors: pictures of other proportions become more tokens, and there is a chat template."""
    tokenizer, sizes = tiny_parts()
    pictures = LlavaNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=GRID
    )
    processor = transformers.LlavaNextProcessor(
        pictures,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    config = transformers.LlavaNextConfig(**sizes, image_grid_pinpoints=GRID)
    return save(transformers.LlavaNextForConditionalGeneration(config), processor, tmp_path_factory.mktemp("next"))


@pytest.fixture
def pictures(tmp_path):
    """Four readable pictures at two depths."""
    folder = tmp_path / "pictures"
    (folder / "more" / "deep").mkdir(parents=True)
    Image.fromarray(data.astronaut()[:120, :200]).save(folder / "astronaut.png")
    Image.fromarray(data.coffee()[:90, :60]).save(folder / "coffee.v2.jpg")
    Image.fromarray(data.chelsea()[50:250, 100:300]).save(folder / "more" / "cat.webp")
    Image.fromarray(data.camera()[:64, :64]).save(folder / "more" / "deep" / "gray.png")
    return folder


def run(folder, output, model, *more):
    flags = ["--input", folder, "--output", output, "--model", model, "--max-tokens", 8, "--device", "cpu", *more]
    return run_command("caption", [str(flag) for flag in flags])


def contents(folder):
    return {str(path.relative_to(folder)): path.read_text("utf-8") for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_a_batch_gives_each_picture_its_own_caption(family, request, rng):
    captioner = Captioner.load(str(request.getfixturevalue(family)), max_tokens=8, device="cpu")
    sizes = [(30, 60), (80, 40), (50, 50), (100, 20)]
    pictures = [rng.integers(255 // (i + 1), size=(*size, 3)).astype(np.uint8) for i, size in enumerate(sizes)]
    alone = [captioner([picture])[0] for picture in pictures]
    assert len(set(alone)) == 4
    assert all(1 <= len(caption.split()) <= 8 for caption in alone)
    assert captioner(pictures) == alone
    assert captioner(pictures[::-1]) == alone[::-1]


def test_decoding_is_greedy_whatever_the_model_was_published_with(llava, rng):
    captioner = Captioner.load(str(llava), max_tokens=8, device="cpu")
    pictures = [rng.integers(255 // (i + 1), size=(30, 60, 3)).astype(np.uint8) for i in range(4)]
    expected = captioner(pictures)
    model, processor = captioner._model, captioner._processor
    model.generation_config.update(do_sample=True, temperature=9.0, top_p=0.9, num_beams=6, max_length=3)
    assert Captioner(model, processor, max_tokens=8)(pictures) == expected
    assert model.generation_config.do_sample


def test_the_prompt_goes_into_the_models_own_template(llava, llava_next, rng):
    picture = rng.integers(255, size=(28, 28, 3)).astype(np.uint8)

    def tokens(folder):
        captioner = Captioner.load(str(folder), prompt="word3 word4", max_tokens=1, device="cpu")
        given = {}
        generate = captioner._model.generate
        captioner._model.generate = lambda **inputs: given.update(inputs) or generate(**inputs)
        captioner([picture])
        return captioner._processor.tokenizer.convert_ids_to_tokens(given["input_ids"][0]), captioner._prompt

    plain, prompt = tokens(llava)
    assert prompt == "USER: <image>\nword3 word4 ASSISTANT:"
    assert plain[-4:] == ["word3", "word4", "<unk>", "<unk>"]
    assert (plain[0], plain.count("<s>"), plain.count("<image>")) == ("<s>", 1, 4)
    templated, prompt = tokens(llava_next)
    assert prompt == "<s><image> word3 word4 Answer:"
    # This template has the start token already: it must not come twice.
    assert (templated[0], templated.count("<s>")) == ("<s>", 1)
    assert templated[-4:] == ["word3", "word4", "<unk>", "<unk>"]


def test_a_model_without_a_place_for_the_picture_is_refused(llava):
    processor = transformers.AutoProcessor.from_pretrained(str(llava))
    processor.image_token = "<picture>"
    with pytest.raises(InputError, match="no chat template, and no token <picture>"):
        captioning._fill_template(processor, "What is it?")


def test_folder_is_mirrored_with_a_caption_a_picture(pictures, llava, tmp_path, capsys):
    output = tmp_path / "captions"
    assert run(pictures, output, llava, "--batch", 3) == 0
    assert capsys.readouterr() == ("", "")
    written = contents(output)
    assert set(written) == {"astronaut.json", "coffee.v2.json", "more/cat.json", "more/deep/gray.json"}
    captioner = Captioner.load(str(llava), max_tokens=8, device="cpu")
    for picture in (pictures / "coffee.v2.jpg", pictures / "more" / "cat.webp"):
        found = find_caption(picture, output / picture.parent.relative_to(pictures))
        expected = captioner([load_image(picture).rgb])[0]
        assert read_caption(found) == expected
        assert json.loads(found.read_text()) == {"caption": expected}
    assert run(pictures, tmp_path / "again", llava, "--batch", 1) == 0
    assert contents(tmp_path / "again") == written


def test_rerun_does_only_what_is_missing(pictures, llava, tmp_path, capsys):
    output = tmp_path / "captions"
    assert run(pictures, output, llava) == 0
    before = contents(output)
    (output / "astronaut.json").write_text('{"caption": "Kept."}')
    (output / "more" / "cat.json").unlink()
    assert run(pictures, output, llava) == 0
    assert contents(output) == before | {"astronaut.json": '{"caption": "Kept."}'}
    assert "3 of 4 captioned already" in capsys.readouterr().out
    # With nothing left to do, not even the model is looked for.
    assert run(pictures, output, tmp_path / "nowhere") == 0


def test_bad_pictures_are_listed_and_stop_no_others(pictures, llava, tmp_path, capsys):
    (pictures / "aaa.png").write_bytes((pictures / "astronaut.png").read_bytes()[:900])
    (pictures / "more" / "text.jpg").write_text("not a picture")
    output = tmp_path / "captions"
    assert run(pictures, output, llava, "--batch", 2) == 2
    assert set(contents(output)) == {"astronaut.json", "coffee.v2.json", "more/cat.json", "more/deep/gray.json"}
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "2 of 6 photographs could not be captioned:"
    assert lines[1].startswith("  " + str(pictures / "aaa.png"))
    assert lines[2].startswith("  " + str(pictures / "more" / "text.jpg"))
    assert len(lines) == 3


def test_a_picture_the_model_refuses_or_says_nothing_of_stops_no_others(pictures, tmp_path):
    batches = []

    def captioner(batch):
        batches.append(len(batch))
        if any(picture.shape[0] == 90 for picture in batch):
            raise PictureRefused("too tall\nby far")
        return ["" if picture.shape[0] == 64 else f"{picture.shape[1]} wide, heiß" for picture in batch]

    names = ["astronaut.png", "coffee.v2.jpg", "more/cat.webp", "more/deep/gray.png"]
    jobs = [Job(pictures / name, tmp_path / f"{number}.json") for number, name in enumerate(names)]
    faults = caption_pictures(captioner, jobs, batch=3)
    assert batches == [3, 1, 1, 1, 1]
    assert faults == [
        f"{pictures / 'coffee.v2.jpg'}: the model's processor refuses the picture (too tall)",
        f"{pictures / 'more/deep/gray.png'}: the model said nothing about it",
    ]
    assert {path.name: read_caption(path) for path in tmp_path.glob("*.json")} == {
        "0.json": "200 wide, heiß",
        "2.json": "200 wide, heiß",
    }


def test_cleaned_pictures_are_looked_at_instead(pictures, llava, tmp_path, capsys):
    cleaned = tmp_path / "cleaned"
    (cleaned / "more").mkdir(parents=True)
    Image.fromarray(data.rocket()[:100, 200:300]).save(cleaned / "astronaut.jpg")
    Image.fromarray(data.rocket()[200:300, 200:300]).save(cleaned / "more" / "cat.png")
    output = tmp_path / "captions"
    assert run(pictures, output, llava, "--cleaned", cleaned) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "2 of 4 photographs could not be captioned:",
        f"  {pictures / 'coffee.v2.jpg'}: {cleaned} holds no cleaned-up picture of that name",
        f"  {pictures / 'more/deep/gray.png'}: {cleaned} holds no cleaned-up picture of that name",
    ]
    captioner = Captioner.load(str(llava), max_tokens=8, device="cpu")
    expected = captioner([load_image(cleaned / "astronaut.jpg").rgb])[0]
    assert read_caption(output / "astronaut.json") == expected
    assert set(contents(output)) == {"astronaut.json", "more/cat.json"}


def test_faults_are_one_line_and_exit_code_2(pictures, llava, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    empty, file, output = tmp_path / "empty", tmp_path / "file", tmp_path / "captions"
    empty.mkdir()
    file.write_text("")
    others = tmp_path / "others"
    others.mkdir()
    Image.fromarray(data.camera()[:64, :64]).save(others / "unlike.png")
    faults = [
        (lambda: run(tmp_path / "nowhere", output, llava), "nowhere: no such folder"),
        (lambda: run(empty, output, llava), "no pictures"),
        (lambda: run(pictures, file, llava), "is a file, name a folder"),
        (lambda: run(pictures, output, llava, "--cleaned", others), "cleaned-up picture for none"),
        (lambda: run(pictures, output, llava, "--cleaned", empty), f"{empty}: no pictures"),
        (lambda: run(pictures, output, tmp_path / "none" / "such"), "such: no such folder"),
        (lambda: run(pictures, output, "llava"), "llava: no such folder (and a Hugging Face name is owner/name)"),
        (lambda: run(pictures, output, file), "no such folder"),
        (lambda: run(pictures, output, empty), f"{empty}: the model cannot be loaded"),
        (lambda: run(pictures, output, "no-such-owner/no-such-model"), "the model cannot be loaded"),
        (lambda: run(pictures, output, llava, "--device", "cuda"), "PyTorch sees no GPU"),
    ]
    for call, message in faults:
        assert call() == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    for flags in (["--batch", "0"], ["--max-tokens", "many"], ["--dtype", "int8"], ["--device", "tpu"]):
        assert run(pictures, output, llava, *flags) == 2
        assert flags[0] in capsys.readouterr().err
    assert not contents(output)


def test_two_pictures_for_one_caption_file_are_refused(pictures, llava, tmp_path, capsys):
    Image.fromarray(data.camera()[:64, :64]).save(pictures / "more" / "Cat.png")
    assert run(pictures, tmp_path / "captions", llava) == 2
    assert "would be the same caption file, rename one" in capsys.readouterr().err


def test_incomplete_weights_are_refused(llava, tmp_path):
    from safetensors.torch import load_file, save_file

    for path in llava.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    dropped = next(name for name in tensors if name.endswith("linear_1.weight"))
    del tensors[dropped]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"1 tensors are missing or of another shape, the first is .*linear_1\.weight"):
        Captioner.load(str(tmp_path), device="cpu")


def test_dtype_is_the_one_asked_for(llava):
    types = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}
    for name, dtype in types.items():
        captioner = Captioner.load(str(llava), device="cpu", dtype=name, max_tokens=2)
        assert captioner._model.dtype == dtype
        assert len(captioner([np.zeros((30, 30, 3), np.uint8)])) == 1


def test_out_of_memory_names_the_way_out(llava):
    captioner = Captioner.load(str(llava), device="cpu")

    def generate(**_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    captioner._model.generate = generate
    with pytest.raises(InputError, match="out of memory with 2 pictures, use a smaller --batch"):
        captioner([np.zeros((30, 30, 3), np.uint8)] * 2)


def test_a_caption_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write_caption(tmp_path / "a" / "b.json", "Ein Kaffee, heiß.")
    assert (tmp_path / "a" / "b.json").read_text("utf-8") == '{"caption": "Ein Kaffee, heiß."}\n'

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match=r"b\.json: cannot be written \(No space left on device\)"):
        write_caption(tmp_path / "a" / "b.json", "Another.")
    assert contents(tmp_path) == {"a/b.json": '{"caption": "Ein Kaffee, heiß."}\n'}


def test_without_torch_one_line_names_the_extra(pictures, tmp_path):
    code = "import sys; sys.modules['torch'] = None; from faithdiff_jax.cli.main import main; sys.exit(main())"
    flags = ["--input", str(pictures), "--output", str(tmp_path / "captions")]
    result = subprocess.run([sys.executable, "-c", code, "caption", *flags], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "error: captioning needs PyTorch: pip install 'faithdiff-jax[caption]'\n"


def test_script_is_the_command():
    result = subprocess.run([sys.executable, "caption.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0
    assert "llava-hf/llava-1.5-7b-hf" in result.stdout
