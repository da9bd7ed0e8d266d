import dataclasses
import hashlib
import io
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import cv2
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage, stats
from skimage import data

from faithdiff_jax.config import from_dict
from faithdiff_jax.data.degradation import config as settings
from faithdiff_jax.data.degradation.degrade import (
    LEVELS,
    PUBLISHED,
    DegradationConfig,
    apply,
    degrade,
    draw,
    stages,
)
from faithdiff_jax.data.degradation.sensor_noise import _poisson_counts
from faithdiff_jax.errors import InputError

ROOT = Path(__file__).parents[1]
DRAWS = 6000
BLUR_FAMILIES = {
    "iso": 0.45,
    "aniso": 0.25,
    "generalized_iso": 0.12,
    "generalized_aniso": 0.03,
    "plateau_iso": 0.12,
    "plateau_aniso": 0.03,
}
# Every stage off: with scale 1 an image passes unchanged.
IDLE = DegradationConfig(
    scale=1,
    blur1=settings.BlurConfig(probability=0),
    resize1=settings.ResizeConfig(up=0, down=0, keep=1, scale=(1, 1)),
    noise1=settings.NoiseConfig(probability=0, gaussian_sigma=(0, 0), poisson_scale=(0, 0)),
    jpeg1=settings.JpegConfig(probability=0, quality=(50, 50)),
    blur2=settings.BlurConfig(probability=0),
    resize2=settings.ResizeConfig(up=0, down=0, keep=1, scale=(1, 1)),
    noise2=settings.NoiseConfig(probability=0, gaussian_sigma=(0, 0), poisson_scale=(0, 0)),
    jpeg2=settings.JpegConfig(probability=0, quality=(50, 50)),
    final_sinc=settings.FinalSincConfig(probability=0),
)


@pytest.fixture(scope="module")
def draws():
    rng = np.random.default_rng(7)
    return [draw(rng, (512, 256, 3)) for _ in range(DRAWS)]


@pytest.fixture(scope="module")
def photograph():
    return np.ascontiguousarray(data.astronaut()[:256, 100:300])


def noise_only(kind, strength, gray=0.0):
    gaussian = float(kind == "gaussian")
    limits = (strength, strength)
    noise = settings.NoiseConfig(
        gaussian_probability=gaussian, gaussian_sigma=limits, poisson_scale=limits, gray_probability=gray
    )
    return replace(IDLE, noise1=noise)


def assert_shares(values, shares):
    """Each value's count lies within four standard deviations of its share."""
    counts, total = Counter(values), len(values)
    assert set(counts) == {name for name, share in shares.items() if share > 0}
    for name, share in shares.items():
        assert abs(counts[name] - total * share) <= 4 * math.sqrt(total * share * (1 - share)) + 1e-9, name


def assert_uniform(values, low, high):
    """All values in range, close to both ends, and their mean within four standard deviations of the middle."""
    values = np.asarray(values)
    assert len(values) > 50
    assert low <= values.min()
    assert values.max() <= high
    assert abs(values.mean() - (low + high) / 2) <= 4 * (high - low) / math.sqrt(12 * len(values))
    assert values.min() < low + (high - low) * 12 / len(values) + 1e-9
    assert values.max() > high - (high - low) * 12 / len(values) - 1e-9


@pytest.mark.parametrize(("stage", "probability", "sigma"), [("blur1", 1.0, (0.2, 3.0)), ("blur2", 0.5, (0.2, 1.5))])
def test_drawn_blurs_follow_the_table(draws, stage, probability, sigma):
    assert_shares([getattr(d, stage) is not None for d in draws], {True: probability, False: 1 - probability})
    blurs = [blur for d in draws if (blur := getattr(d, stage)) is not None]
    assert_shares([blur.size for blur in blurs], dict.fromkeys(range(7, 22, 2), 1 / 8))
    shares = {family: 0.9 * share for family, share in BLUR_FAMILIES.items()} | {"sinc": 0.1}
    assert_shares([blur.family for blur in blurs], shares)

    small = [blur.omega for blur in blurs if blur.family == "sinc" and blur.size < 13]
    large = [blur.omega for blur in blurs if blur.family == "sinc" and blur.size >= 13]
    assert_uniform(small, math.pi / 3, math.pi)
    assert_uniform(large, math.pi / 5, math.pi)
    assert min(blur.omega for blur in blurs if blur.family == "sinc" and blur.size == 13) < math.pi / 3

    shaped = [blur for blur in blurs if blur.family != "sinc"]
    iso = [blur for blur in shaped if blur.family.endswith("iso") and not blur.family.endswith("aniso")]
    aniso = [blur for blur in shaped if blur.family.endswith("aniso")]
    assert all(blur.sigma_y == blur.sigma_x and blur.theta == 0 for blur in iso)
    assert_uniform([blur.sigma_x for blur in iso], *sigma)
    assert_uniform([blur.sigma_x for blur in aniso], *sigma)
    assert_uniform([blur.sigma_y for blur in aniso], *sigma)
    assert_uniform([blur.theta for blur in aniso], -math.pi, math.pi)
    correlation = np.corrcoef([blur.sigma_x for blur in aniso], [blur.sigma_y for blur in aniso])[0, 1]
    assert abs(correlation) < 4 / math.sqrt(len(aniso))

    generalized = np.array([blur.beta for blur in shaped if blur.family.startswith("generalized")])
    assert_shares(list(generalized < 1), {True: 0.5, False: 0.5})
    assert_uniform(generalized[generalized < 1], 0.5, 1.0)
    assert_uniform(generalized[generalized >= 1], 1.0, 4.0)
    plateau = np.array([blur.beta for blur in shaped if blur.family.startswith("plateau")])
    assert_shares(list(plateau == 1), {True: 0.5, False: 0.5})
    assert_uniform(plateau[plateau > 1], 1.0, 2.0)


@pytest.mark.parametrize(
    ("stage", "shares", "low", "high", "base"),
    [
        ("resize1", {"up": 0.2, "down": 0.7, "keep": 0.1}, 0.3, 1.5, (512, 256)),
        ("resize2", {"up": 0.3, "down": 0.4, "keep": 0.3}, 0.6, 1.2, (128, 64)),
    ],
)
def test_drawn_resizes_follow_the_table(draws, stage, shares, low, high, base):
    resizes = [getattr(d, stage) for d in draws]
    names = {-1: "down", 0: "keep", 1: "up"}
    assert_shares([names[int(np.sign(resize.factor - 1))] for resize in resizes], shares)
    assert_uniform([resize.factor for resize in resizes if resize.factor > 1], 1, high)
    assert_uniform([resize.factor for resize in resizes if resize.factor < 1], low, 1)
    assert_shares([resize.mode for resize in resizes], dict.fromkeys(settings.RESIZE_MODES, 1 / 3))
    assert all((r.height, r.width) == (int(base[0] * r.factor), int(base[1] * r.factor)) for r in resizes)


@pytest.mark.parametrize(
    ("stage", "sigma", "scale"), [("noise1", (1, 15), (0.05, 2.0)), ("noise2", (1, 12), (0.05, 1.0))]
)
def test_drawn_noise_follows_the_table(draws, stage, sigma, scale):
    noises = [getattr(d, stage) for d in draws]
    assert_shares([noise.kind for noise in noises], {"gaussian": 0.5, "poisson": 0.5})
    for kind, limits in (("gaussian", sigma), ("poisson", scale)):
        some = [noise for noise in noises if noise.kind == kind]
        assert_uniform([noise.strength for noise in some], *limits)
        assert_shares([noise.gray for noise in some], {True: 0.4, False: 0.6})
    assert len({noise.seed for noise in noises}) == DRAWS


def test_drawn_last_stages_follow_the_table(draws):
    assert_shares([d.jpeg1 for d in draws], dict.fromkeys(range(60, 96), 1 / 36))
    assert_shares([d.jpeg2 for d in draws], dict.fromkeys(range(60, 101), 1 / 41))
    assert_shares([d.jpeg_last for d in draws], {True: 0.5, False: 0.5})
    assert_shares([d.final_resize.mode for d in draws], dict.fromkeys(settings.RESIZE_MODES, 1 / 3))
    assert_shares([d.final_sinc is not None for d in draws], {True: 0.8, False: 0.2})
    sincs = [d.final_sinc for d in draws if d.final_sinc is not None]
    assert_shares([sinc.size for sinc in sincs], dict.fromkeys(range(7, 22, 2), 1 / 8))
    assert_uniform([sinc.omega for sinc in sincs], math.pi / 3, math.pi)
    assert all((d.final_resize.height, d.final_resize.width) == (128, 64) for d in draws)


def test_stages_come_in_order(draws):
    head = ["blur1", "resize1", "noise1", "jpeg1", "blur2", "resize2", "noise2"]
    tails = {True: ["final_resize", "final_sinc", "jpeg2"], False: ["jpeg2", "final_resize", "final_sinc"]}
    for drawn in draws[:200]:
        names = [name for name, _ in stages(drawn)]
        expected = [name for name in head + tails[drawn.jpeg_last] if getattr(drawn, name) is not None]
        assert names == expected


def digest(photograph, seeds=6):
    sums = hashlib.sha256()
    for seed in range(seeds):
        for config in (PUBLISHED, *LEVELS.values()):
            sums.update(degrade(photograph, np.random.default_rng(seed), config).tobytes())
    return sums.hexdigest()


def test_same_seed_same_pixels(photograph):
    before = photograph.copy()
    first = degrade(photograph, np.random.default_rng(3))
    np.testing.assert_array_equal(first, degrade(photograph, np.random.default_rng(3)))
    np.testing.assert_array_equal(photograph, before)
    assert (first != degrade(photograph, np.random.default_rng(4))).any()
    rng = np.random.default_rng(3)
    np.testing.assert_array_equal(first, apply(photograph, draw(rng, photograph.shape)))


@pytest.mark.parametrize("threads", [0, 4])
def test_same_pixels_in_another_process_with_other_threads(photograph, tmp_path, threads):
    np.save(tmp_path / "photograph.npy", photograph)
    program = (
        "import sys, cv2, numpy as np\n"
        "sys.path.insert(0, 'tests')\n"
        f"cv2.setNumThreads({threads})\n"
        "from test_degradation import digest\n"
        f"print(digest(np.load(r'{tmp_path / 'photograph.npy'}')))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == digest(photograph)


def test_importing_the_degradation_loads_no_jax():
    program = "import sys, faithdiff_jax.data.degradation.degrade\n"
    program += "print(sorted({'jax', 'torch', 'grain'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("shape", [(4, 4), (4, 64), (36, 52), (128, 100)])
def test_output_is_a_quarter(rng, shape):
    image = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    for config in (PUBLISHED, *LEVELS.values()):
        for seed in range(8):
            low = degrade(image, np.random.default_rng(seed), config)
            assert low.shape == (shape[0] // 4, shape[1] // 4, 3)
            assert low.dtype == np.uint8


def test_idle_stages_change_nothing(photograph):
    np.testing.assert_array_equal(degrade(photograph, np.random.default_rng(0), IDLE), photograph)


@pytest.mark.parametrize("family", [*BLUR_FAMILIES, "sinc"])
def test_blur_is_the_correlation_with_its_kernel(photograph, family):
    sharpness = 1.0 if family == "sinc" else 0.0
    families = dict.fromkeys(BLUR_FAMILIES, 0.0) | {family if family != "sinc" else "iso": 1.0}
    blur = settings.BlurConfig(sinc_probability=sharpness, families=settings.FamilyProbabilities(**families))
    config = replace(IDLE, blur1=blur)
    seen = set()
    for seed in range(12):
        drawn = draw(np.random.default_rng(seed), photograph.shape, config)
        seen.add(drawn.blur1.size)
        [(name, blurred)] = [(name, stage) for name, stage in stages(drawn) if name == "blur1"]
        assert name == "blur1"
        expected = np.stack(
            [
                ndimage.correlate(photograph[..., channel].astype(np.float64), drawn.blur1.kernel(), mode="mirror")
                for channel in range(3)
            ],
            axis=-1,
        )
        np.testing.assert_allclose(blurred(photograph.astype(np.float32)), expected, atol=2e-3)
    assert len(seen) > 4


@pytest.mark.parametrize("sigma", [1.0, 6.5, 15.0])
@pytest.mark.parametrize("gray", [0.0, 1.0])
def test_gaussian_noise_has_the_stated_strength(sigma, gray):
    image = np.full((400, 400, 3), 128, np.uint8)
    noisy = degrade(image, np.random.default_rng(1), noise_only("gaussian", sigma, gray)).astype(np.float64)
    # Rounding to whole levels adds a twelfth to the variance.
    expected = math.sqrt(sigma**2 + 1 / 12)
    samples = noisy.size / (3 if gray else 1)
    assert noisy.std() == pytest.approx(expected, rel=5 / math.sqrt(2 * samples))
    assert noisy.mean() == pytest.approx(128, abs=5 * sigma / math.sqrt(samples))
    assert (noisy == noisy[..., :1]).all() == bool(gray)
    neighbours = np.corrcoef(noisy[:, :-1, 0].ravel(), noisy[:, 1:, 0].ravel())[0, 1]
    assert abs(neighbours) < 5 / 400
    assert abs(stats.kurtosis(noisy[..., 0].ravel())) < 0.08


@pytest.mark.parametrize("scale", [0.25, 0.8])
@pytest.mark.parametrize("gray", [0.0, 1.0])
def test_poisson_noise_has_its_theoretical_variance(scale, gray):
    # All 256 levels occur, so that V is 256 and the variance of level p is scale^2 255^2 p / 256.
    levels = np.arange(256)
    image = np.broadcast_to(levels.astype(np.uint8)[None, :, None], (1500, 256, 3)).copy()
    noisy = degrade(image, np.random.default_rng(2), noise_only("poisson", scale, gray)).astype(np.float64)
    noise = noisy - image
    assert (noise == noise[..., :1]).all() == bool(gray)
    inner = slice(60, 180)
    expected = scale**2 * 255 * levels / 256 + 1 / 12
    ratio = noise[..., 0].var(axis=0)[inner] / expected[inner]
    assert ratio.mean() == pytest.approx(1, abs=4 * math.sqrt(2 / noise[:, inner, 0].size))
    assert abs(ratio - 1).max() < 5.5 * math.sqrt(2 / 1500)
    assert noise[:, inner].mean() == pytest.approx(0, abs=0.1 * scale)


def test_poisson_noise_grows_when_levels_are_few():
    # Four levels: V is 4 and a pixel at 51 of 255 is Poisson(0.8) / 4.
    image = np.zeros((300, 300, 3), np.uint8)
    image[:] = 51
    image[0, :3] = [[0] * 3, [102] * 3, [153] * 3]
    noisy = degrade(image, np.random.default_rng(0), noise_only("poisson", 0.5)).astype(np.float64)
    values = noisy[1:].ravel()
    steps = np.rint(51 + 0.5 * (255 * np.arange(12) / 4 - 51)).clip(0, 255)
    assert set(np.unique(values)) <= set(steps)
    share = (values == steps[0]).mean()
    assert share == pytest.approx(math.exp(-0.8), abs=4 * math.sqrt(0.25 / values.size))


@pytest.mark.parametrize("values", [1, 32, 256])
@pytest.mark.parametrize("level", [0, 1, 40, 128, 255])
def test_counts_are_poisson(values, level):
    mean = level / 255 * values
    counts = _poisson_counts(np.full(200_000, level, np.uint8), values, np.random.default_rng(5))
    if level == 0:
        assert not counts.any()
        return
    low, high = stats.poisson.ppf([1e-4, 1 - 1e-4], mean).astype(int)
    inner = np.arange(low, high + 1)
    expected = stats.poisson.pmf(inner, mean)
    observed = np.array([(counts == k).sum() for k in inner], float)
    observed = np.append(observed, counts.size - observed.sum())
    expected = np.append(expected, 1 - expected.sum()) * counts.size
    used = expected > 5
    statistic = ((observed - expected)[used] ** 2 / expected[used]).sum()
    assert statistic < stats.chi2.ppf(1 - 1e-5, used.sum())
    assert counts.max() >= stats.poisson.ppf(1 - 1e-3, mean)


@pytest.mark.parametrize("quality", [30, 60, 95, 100])
def test_jpeg_is_the_real_one(photograph, quality):
    config = replace(IDLE, jpeg1=settings.JpegConfig(quality=(quality, quality)))
    result = degrade(photograph, np.random.default_rng(0), config)
    encoded = cv2.imencode(".jpg", photograph[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    np.testing.assert_array_equal(result, cv2.imdecode(encoded, cv2.IMREAD_COLOR)[..., ::-1])
    # Pillow, with the same quality and chroma at half resolution, decodes to the same picture.
    file = io.BytesIO()
    Image.fromarray(photograph).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    np.testing.assert_allclose(result.astype(int), np.asarray(Image.open(file)).astype(int), atol=1)


def test_levels_grow_in_severity(photograph):
    errors = {}
    clean = cv2.resize(photograph, (50, 64), interpolation=cv2.INTER_AREA).astype(np.float64)
    for name, config in LEVELS.items():
        lows = [degrade(photograph, np.random.default_rng(seed), config) for seed in range(40)]
        errors[name] = np.mean([np.abs(low - clean).mean() for low in lows])
    assert errors["I"] * 1.2 < errors["II"]
    assert errors["II"] * 1.2 < errors["III"]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DegradationConfig(scale=0), "scale is 0"),
        (lambda: DegradationConfig(scale=2.0), "scale is 2.0"),
        (lambda: DegradationConfig(resize_modes=()), "resize_modes is ()"),
        (lambda: DegradationConfig(resize_modes=("area", "nearest")), "resize_modes is ('area', 'nearest')"),
        (lambda: DegradationConfig(jpeg_last_probability=1.5), "jpeg_last_probability is 1.5"),
        (lambda: settings.FamilyProbabilities(iso=0.5), "sum to 1.05"),
        (lambda: settings.FamilyProbabilities(iso=-0.1), "iso is -0.1"),
        (lambda: settings.BlurConfig(probability=math.nan), "probability is nan"),
        (lambda: settings.BlurConfig(sinc_probability=2), "sinc_probability is 2"),
        (lambda: settings.BlurConfig(sizes=(8, 21)), "sizes is (8, 21): kernel sizes are odd"),
        (
            lambda: settings.BlurConfig(sizes=(7.0, 21)),
            "sizes is (7.0, 21): must be two numbers",
        ),
        (lambda: settings.BlurConfig(sizes=(7, 211)), "each of which must be a whole number from 1 to 101"),
        (lambda: settings.BlurConfig(sigma=(3, 0.2)), "sigma is (3, 0.2): must be two numbers, low and high"),
        (lambda: settings.BlurConfig(sigma=(0, 1)), "sigma is (0, 1)"),
        (lambda: settings.BlurConfig(sigma=1.0), "sigma is 1.0: must be two numbers"),
        (lambda: settings.BlurConfig(rotation=(-4, 4)), "rotation is "),
        (lambda: settings.BlurConfig(beta_plateau=(1.5, 2)), "beta_plateau is (1.5, 2): must be low <= 1 <= high"),
        (lambda: settings.BlurConfig(beta_generalized=(0, 2)), "beta_generalized is "),
        (lambda: settings.BlurConfig(sinc_omega_small=(1, 4)), "sinc_omega_small is "),
        (lambda: settings.BlurConfig(sinc_omega_large=(0, 1)), "sinc_omega_large is "),
        (lambda: settings.ResizeConfig(up=0.5, down=0.5, keep=0.5, scale=(0.5, 2)), "sum to 1.5: must sum to 1"),
        (lambda: settings.ResizeConfig(up=0, down=1, keep=0, scale=(0.5, 0.9)), "scale is "),
        (lambda: settings.NoiseConfig(gaussian_sigma=(-1, 2), poisson_scale=(0, 1)), "gaussian_sigma is "),
        (lambda: settings.NoiseConfig(gaussian_sigma=(1, 2), poisson_scale=(2, 1)), "poisson_scale is "),
        (
            lambda: settings.NoiseConfig(gaussian_sigma=(1, 2), poisson_scale=(0, 1), gray_probability=-1),
            "gray_probability is -1",
        ),
        (lambda: settings.JpegConfig(quality=(0, 95)), "quality is (0, 95)"),
        (lambda: settings.JpegConfig(quality=(60, 101)), "quality is (60, 101)"),
        (lambda: settings.FinalSincConfig(omega=(2, 1)), "omega is (2, 1)"),
        (lambda: settings.FinalSincConfig(sizes=(21, 7)), "sizes is (21, 7)"),
        (lambda: draw(np.random.default_rng(0), (30, 32)), "image of 30x32"),
        (lambda: draw(np.random.default_rng(0), (32, 0)), "image of 32x0"),
        (lambda: degrade(np.zeros((8, 8, 3), np.float32), np.random.default_rng(0)), "dtype float32"),
        (lambda: degrade(np.zeros((8, 8), np.uint8), np.random.default_rng(0)), "shape (8, 8)"),
        (lambda: degrade(np.zeros((8, 8, 4), np.uint8), np.random.default_rng(0)), "shape (8, 8, 4)"),
        (
            lambda: apply(np.zeros((8, 8, 3), np.uint8), draw(np.random.default_rng(0), (8, 12))),
            "drawn for (8, 12, 3)",
        ),
    ],
)
def test_faults_are_named(make, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below, without its escapes
        make()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


NUMBERS = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["1", "", "area"])
VALUES = NUMBERS | st.lists(NUMBERS, max_size=3) | st.tuples(st.floats(0, 4), st.floats(0, 4))


@hypothesis.settings(max_examples=200)
@hypothesis.given(data=st.data())
def test_a_configuration_of_nonsense_is_refused_or_degrades(data):
    stages = {field.name: getattr(PUBLISHED, field.name) for field in dataclasses.fields(PUBLISHED)}
    stage = data.draw(st.sampled_from(sorted(stages)))
    value = data.draw(VALUES)
    if dataclasses.is_dataclass(stages[stage]):
        value = {data.draw(st.sampled_from([field.name for field in dataclasses.fields(stages[stage])])): value}
    try:
        config = from_dict(DegradationConfig, {stage: value}, "data.yaml")
    except InputError as error:
        config, message = PUBLISHED, str(error)
    else:
        message = ""
    assert "\n" not in message
    side = 2 * config.scale
    assert degrade(np.zeros((side, side, 3), np.uint8), np.random.default_rng(0), config).shape == (2, 2, 3)
