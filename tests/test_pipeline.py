"""End to end: a published-layout checkpoint through the real converter, a photograph through both pipelines."""

import jax
import numpy as np
import pytest
import skimage.data
import torch_pipeline
from converted import loaded, published_and_converted
from parity import assert_parity, nhwc, relative_error
from port import normal
from torch_pipeline import upscaled

from faithdiff_jax.errors import InputError
from faithdiff_jax.files.images import to_float
from faithdiff_jax.inference.inputs import SamplingInputs, Text, plan_sampling
from faithdiff_jax.inference.options import RestoreOptions
from faithdiff_jax.inference.pipeline import FaithDiff
from faithdiff_jax.inference.programs import SIZES_KEPT
from faithdiff_jax.sharding import make_mesh

CAPTION = "the cat sat"


def photograph(height: int, width: int) -> np.ndarray:
    """A corner of a real photograph, of an odd size."""
    return np.ascontiguousarray(skimage.data.astronaut()[60 : 60 + height, 180 : 180 + width])


def noises(rng, height, width):
    return {"start": normal(rng, 1, height, width, 4), "encode": normal(rng, 1, height, width, 4)}


def levels_apart(ours: np.ndarray, theirs: np.ndarray) -> tuple[int, float]:
    """Largest difference of two eight-bit pictures, and the share of values that differ."""
    apart = np.abs(ours.astype(int) - theirs.astype(int))
    return int(apart.max()), float((apart > 0).mean())


@pytest.mark.parametrize(
    ("kind", "start", "guidance", "tile"),
    [
        ("sdxl", "lr", 5.0, 128), ("sdxl", "noise", 1.0, 128), ("sdxl", "lr", 5.0, 8),
        ("epsilon", "lr", 3.0, 128), ("v_prediction", "lr", 3.0, 8),
    ],
)  # fmt: skip
def test_restoring_equals_pytorch(rng, kind, start, guidance, tile):
    """SDXL, and both kinds of SD 2.1: the caption's tokens, text, features, start, denoising, decoder, colours."""
    variant = {} if kind == "sdxl" else {"sd21": True, "prediction": kind}
    models, _ = published_and_converted(**variant)
    model = loaded(**variant)
    image = photograph(43, 51)  # x2 and padded to 88x104: latents of 11x13
    noise = noises(rng, 11, 13)
    options = {"scale": 2, "steps": 3, "guidance": guidance, "start": start, "tile": tile}
    expected = torch_pipeline.restore(models, image, CAPTION, noise["start"], noise["encode"], **options)

    padded = to_float(np.pad(upscaled(image, 2), ((0, 2), (0, 2), (0, 0)), mode="edge"))[None]
    features = model.encode_lq(padded)
    assert_parity(features, nhwc(expected["features"]))
    encoded = model.encode(padded, noise["encode"])
    assert_parity(encoded, nhwc(expected["encoded"]))
    context, pooled = model.encode_text([CAPTION, ""])
    latents = model.sample(
        features,
        context[:1],
        pooled[:1],
        context[1:],
        pooled[1:],
        noise["start"],
        steps=3,
        guidance=guidance,
        image_size=(88, 104),
        start=encoded if start == "lr" else None,
        tile=tile,
    )
    assert_parity(latents, nhwc(expected["latents"]))
    assert_parity(model.decode(latents)[:, :86, :102], nhwc(expected["decoded"]))

    restored = model.restore(image, CAPTION, noise=noise, **options)
    fixed = torch_pipeline.adain(expected["decoded"], upscaled(image, 2))
    largest, share = levels_apart(restored, fixed)
    assert restored.shape == (86, 102, 3)
    assert largest <= 1  # a value on the edge between two levels may fall either way
    assert share < 0.01


def test_text_equals_pytorch():
    captions = ["the cat", "", "the cat sat on the cat " * 30]
    models, _ = published_and_converted()
    context, pooled = torch_pipeline.encode_text(models, captions)
    ours = loaded().encode_text(captions)
    assert_parity(ours[0], context.numpy())
    assert_parity(ours[1], pooled.numpy())


def test_encoders_and_decoder_in_tiles_equal_diffusers(rng):
    """Tiles of 64 pixels here, 1,024 as published; diffusers' own tiling is the oracle for the VAE."""
    models, _ = published_and_converted()
    model = loaded()
    images, noise = rng.uniform(-1, 1, (1, 136, 96, 3)).astype(np.float32), normal(rng, 1, 17, 12, 4)
    vae = models.vae
    vae.tile_sample_min_size, vae.tile_latent_min_size, vae.tile_overlap_factor = 64, 8, 0.25
    vae.enable_tiling()
    import torch
    from parity import nchw

    try:
        with torch.no_grad():
            distribution = vae.encode(nchw(images)).latent_dist
            sampled = (distribution.mean + distribution.std * nchw(noise)) * vae.config.scaling_factor
            decoded = vae.decode(sampled / vae.config.scaling_factor).sample
    finally:
        vae.disable_tiling()
    encoded = model.encode(images, noise, vae_tile=64)
    assert_parity(encoded, nhwc(sampled))
    assert_parity(model.decode(encoded, vae_tile=64), nhwc(decoded))
    whole = model.encode_lq(images)
    tiled = model.encode_lq(images, vae_tile=64)
    assert tiled.shape == whole.shape
    assert 1e-4 < relative_error(tiled, whole) < 1  # tiles see less of the picture, so they differ, but not wildly


def test_the_same_seed_gives_the_same_picture_on_one_device_and_on_eight():
    _, folder = published_and_converted()
    image = photograph(60, 60)
    options = {"steps": 2, "tile": 8, "batch": 8, "seed": 7, "color_fix": "none"}
    one = loaded().restore(image, CAPTION, **options)
    np.testing.assert_array_equal(one, loaded().restore(image, CAPTION, **options))
    assert levels_apart(one, loaded().restore(image, CAPTION, **options | {"seed": 8}))[0] > 1
    mesh = make_mesh(data=4, fsdp=2)
    spread = FaithDiff.load(folder, mesh=mesh)
    assert all(set(leaf.devices()) == set(jax.devices()) for leaf in jax.tree.leaves(spread.params))
    largest, share = levels_apart(one, spread.restore(image, CAPTION, **options))
    assert largest <= 1
    assert share < 0.01


def test_ancestral_sampling_and_wavelet_fix(rng):
    model, image = loaded(), photograph(24, 32)
    options = {"steps": 4, "sampler": "ddpm", "color_fix": "wavelet", "guidance_rescale": 0.5, "scale": 1}
    restored = model.restore(image, CAPTION, **options)
    assert restored.shape == image.shape
    np.testing.assert_array_equal(restored, model.restore(image, CAPTION, **options))
    noise = noises(rng, 3, 4)
    with pytest.raises(InputError, match=r"^noise\['steps'\] is missing: must be \(4, 1, 3, 4, 4\), standard normal$"):
        model.restore(image, CAPTION, noise=noise, **options)
    context, pooled = model.encode_text([CAPTION])
    features = np.zeros((1, 3, 4, 32), np.float32)
    with pytest.raises(InputError, match="step_noise is None: sampler 'ddpm' needs"):
        model.sample(features, context, pooled, None, None, noise["start"], guidance=1.0, sampler="ddpm")


def test_given_noise_is_whole_and_of_the_right_shape(rng):
    model, image = loaded(), photograph(24, 32)
    noise = {"start": normal(rng, 1, 3, 5, 4)}
    with pytest.raises(InputError) as caught:
        model.restore(image, CAPTION, noise=noise, scale=1)
    assert str(caught.value) == (
        "noise['start'] is (1, 3, 5, 4): must be (1, 3, 4, 4); noise['encode'] is missing: must be (1, 3, 4, 4), "
        "standard normal"
    )
    assert model.restore(
        image, CAPTION, noise={"start": normal(rng, 1, 3, 4, 4)}, scale=1, start="noise", steps=1
    ).shape == (24, 32, 3)


def test_memory_of_a_large_picture_is_that_of_its_tiles():
    """Sixteen times the area in tiles needs little more than one tile, and less than whole."""
    model = loaded()

    def temporary_bytes(side, tile):
        plan = plan_sampling(RestoreOptions(tile=tile), model.config.schedule, side, side)
        array = lambda *shape: jax.ShapeDtypeStruct(shape, np.float32)  # noqa: E731
        text, latents = Text(context=array(1, 77, 40), pooled=array(1, 20)), array(1, side, side, 4)
        params = {part: model.params[part] for part in ("unet", "alignment")}
        inputs = SamplingInputs(
            features=array(1, side, side, 32),
            text=text,
            negative=text,
            noise=latents,
            start=latents,
            time_ids=array(len(plan.corners), 1, 6),
            guidance=array(),
        )
        lowered = model.programs.sample.lower(params, plan, inputs)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    one_tile, tiled, whole = temporary_bytes(16, 16), temporary_bytes(64, 16), temporary_bytes(64, 64)
    assert tiled < 3 * one_tile
    assert tiled < whole / 3


def test_predict_noise_is_one_evaluation(rng):
    models, _ = published_and_converted()
    latents, features, timesteps = normal(rng, 2, 5, 7, 4), normal(rng, 2, 5, 7, 32), np.array([951, 3])
    context, pooled = normal(rng, 2, 9, 40), normal(rng, 2, 20)
    time_ids = rng.uniform(0, 1024, (2, 6)).astype(np.float32)
    ours = loaded().predict_noise(latents, timesteps, features, context, pooled, time_ids)
    import torch
    from parity import nchw

    for i in range(2):  # the published aligner mixes the samples of a batch, ours does not
        item = slice(i, i + 1)
        expected = models.predict_noise(
            nchw(latents[item]),
            torch.from_numpy(timesteps[item]),
            nchw(features[item]),
            torch.from_numpy(context[item]),
            torch.from_numpy(pooled[item]),
            torch.from_numpy(time_ids[item]),
        )
        assert_parity(ours[item], nhwc(expected))


@pytest.mark.parametrize("multiple", [8, 32])
def test_padding_to_a_larger_multiple_keeps_the_size(multiple):
    assert loaded().restore(photograph(13, 17), scale=2, steps=1, multiple=multiple).shape == (26, 34, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0: must be a whole number from 1 to"),
        ({"steps": 1001}, "steps is 1001: must be between 1 and 1000 for this model"),
        ({"guidance": -1.0}, "guidance is -1.0: must be from 0 to 100"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"guidance_rescale": 1.5}, "guidance_rescale is 1.5: must be from 0 to 1"),
        ({"tile": 3}, "tile is 3 latent pixels: must be at least 4 for this model"),
        ({"overlap": 0.0}, "overlap is 0.0: must be from 0.0625 to 1"),
        ({"batch": 0}, "batch is 0: must be a whole number from 1 to 1024"),
        ({"sampler": "plms"}, "sampler is 'plms': must be one of euler, ddpm, dpmpp_2m, unipc"),
        ({"start": "hq"}, "start is 'hq': must be one of lr, noise"),
        ({"color_fix": "lab"}, "color_fix is 'lab': must be one of adain, wavelet, none"),
        ({"wavelet_levels": 0}, "wavelet_levels is 0: must be a whole number from 1 to 10"),
        ({"scale": 0}, "scale is 0: must be above 0 and at most 32"),
        ({"scale": 0.1}, "each side must come to 8 or more"),
        ({"multiple": 12}, "multiple is 12: must be a multiple of 8"),
        ({"vae_tile": 100}, "vae_tile is 100: must be a multiple of 32"),
        ({"stepz": 1}, r"unknown option stepz \(known: scale, progressive, "),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        loaded().restore(photograph(20, 20), CAPTION, **options)


def test_several_bad_options_are_named_together():
    with pytest.raises(InputError, match=r"steps is 0.*; tile is 0"):
        loaded().restore(photograph(20, 20), CAPTION, steps=0, tile=0)
    with pytest.raises(InputError, match=r"steps is 2000.*; tile is 1 latent"):
        loaded().restore(photograph(20, 20), CAPTION, steps=2000, tile=1)


def test_guidance_needs_a_negative_context(rng):
    with pytest.raises(InputError, match=r"guidance is 5.0: above 1 it needs negative_context"):
        loaded().sample(normal(rng, 1, 4, 4, 32), normal(rng, 1, 5, 40), None, None, None, normal(rng, 1, 4, 4, 4))


def test_options_that_sampling_does_not_read_are_named(rng):
    arrays = normal(rng, 1, 4, 4, 32), normal(rng, 1, 5, 40), None, None, None, normal(rng, 1, 4, 4, 4)
    with pytest.raises(InputError, match=r"^scale, color_fix: not used by sample, which takes steps, guidance, "):
        loaded().sample(*arrays, scale=3, guidance=1, color_fix="none")
    with pytest.raises(InputError, match="unknown option stepz"):
        loaded().sample(*arrays, stepz=3, scale=3)


def test_pooled_texts_are_needed_where_the_model_has_an_added_embedding(rng):
    features, context, pooled = normal(rng, 1, 4, 4, 32), normal(rng, 1, 5, 40), normal(rng, 1, 20)
    noise = normal(rng, 1, 4, 4, 4)
    for given, negative, guidance in ((None, None, 1.0), (pooled, None, 5.0)):
        with pytest.raises(InputError, match="pooled or negative_pooled is None"):
            loaded().sample(features, context, given, context, negative, noise, guidance=guidance)
    with pytest.raises(ValueError, match="pooled and time_ids are needed"):
        loaded().predict_noise(noise, np.array([1]), features, context)


def test_images_of_odd_sides_are_refused(rng):
    with pytest.raises(InputError, match="images are 20x24: both sides must be multiples of 8"):
        loaded().encode_lq(normal(rng, 1, 20, 24, 3))


def test_the_vae_tile_must_fit(rng):
    with pytest.raises(InputError, match="vae_tile is 100: must be a multiple of 32"):
        loaded().encode_lq(normal(rng, 1, 24, 24, 3), vae_tile=100)


def test_from_pretrained_takes_a_folder_and_refuses_what_is_none():
    assert FaithDiff.from_pretrained(published_and_converted()[1]).config == loaded().config
    with pytest.raises(InputError, match="nowhere: no such folder"):
        FaithDiff.from_pretrained("nowhere")


def test_work_beyond_every_bound_is_refused_before_it_begins(rng):
    """None of these would end, or fit into memory."""
    wide = np.broadcast_to(np.uint8(0), (30_000, 30_000, 3))
    with pytest.raises(InputError, match=r"scale is 2: turns 30000x30000 into 60000x60000 pixels, at most 268,435,456"):
        loaded().restore(wide, CAPTION)
    with pytest.raises(
        InputError, match=r"tile is 4 and overlap 0.0625: cut 1000x500 latent pixels into 495,\d+ tiles"
    ):
        loaded().restore(wide[:2000, :4000], CAPTION, tile=4, overlap=1 / 16)
    noise = np.broadcast_to(np.float32(0), (1, 500, 1000, 4))
    text = normal(rng, 1, 5, 40), normal(rng, 1, 20)
    with pytest.raises(InputError, match=r"into 495,\d+ tiles, at most 16,384 are worked on"):
        loaded().sample(noise, *text, None, None, noise, guidance=1, tile=4, overlap=1 / 16)


def test_the_programs_of_a_few_sizes_are_kept(rng):
    model = loaded()
    sides = range(8, 8 * (SIZES_KEPT + 3), 8)
    before = [model.programs.draw(model.params["vae"], normal(rng, 1, 1, n, 8), normal(rng, 1, 1, n, 4)) for n in sides]
    assert model.programs.draw.shapes_kept == SIZES_KEPT
    assert [x.shape[2] for x in before] == list(sides)
