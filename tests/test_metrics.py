"""Measures of restored pictures, against scikit-image, a transcription of the published GMSD, and common sense."""

import math
import subprocess
import sys

import numpy as np
import pytest
import scipy.signal
import skimage.metrics
from damaged_pictures import CHANGED, blurred, noisy, photograph

from faithdiff_jax.errors import InputError
from faithdiff_jax.evaluation.metrics import METRICS, gmsd, make_metric, psnr, sharpness_ratio, ssim
from faithdiff_jax.evaluation.protocols import PROTOCOLS, Protocol, find_protocol


@pytest.mark.parametrize("name", CHANGED)
def test_psnr_and_ssim_equal_scikit_image(name):
    image = photograph()
    other = CHANGED[name](image)
    assert psnr(other, image) == pytest.approx(skimage.metrics.peak_signal_noise_ratio(image, other), rel=1e-9)
    expected = skimage.metrics.structural_similarity(
        image, other, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255, channel_axis=2
    )
    assert ssim(other, image) == pytest.approx(expected, abs=1e-6)


def published_gmsd(restored, reference):
    """GMSD.m of the authors, line by line; MATLAB's conv2 "same" begins at the second row of the full result."""

    def conv2(x, kernel):
        full = scipy.signal.convolve2d(x, kernel)
        top, left = (side // 2 for side in kernel.shape)
        return full[top : top + x.shape[0], left : left + x.shape[1]]

    def gradient(image):
        luma = image @ np.array([0.299, 0.587, 0.114])
        small = conv2(luma, np.full((2, 2), 0.25))[::2, ::2]
        dx = np.array([[1, 0, -1]] * 3) / 3
        return np.sqrt(conv2(small, dx) ** 2 + conv2(small, dx.T) ** 2)

    one, two = gradient(restored.astype(float)), gradient(reference.astype(float))
    return np.std((2 * one * two + 170) / (one**2 + two**2 + 170), ddof=1)


@pytest.mark.parametrize("name", CHANGED)
@pytest.mark.parametrize("size", [(120, 140), (121, 139)])
def test_gmsd_equals_the_published_code(name, size):
    image = photograph(*size)
    other = CHANGED[name](image)
    assert gmsd(other, image) == pytest.approx(published_gmsd(other, image), rel=1e-9)
    assert gmsd(other, image) > 0.01


def test_a_picture_is_equal_to_itself():
    image = photograph()
    assert psnr(image, image) == math.inf
    assert ssim(image, image) == pytest.approx(1, abs=1e-12)
    assert gmsd(image, image) == pytest.approx(0, abs=1e-7)
    assert sharpness_ratio(image, image) == 1


@pytest.mark.parametrize("change", [blurred, noisy])
def test_more_damage_is_worse_by_every_measure(change):
    image = photograph()
    ladder = [change(image, sigma) for sigma in (1, 3, 9)]
    for measure, order in ((psnr, -1), (ssim, -1), (gmsd, 1)):
        values = [order * measure(picture, image) for picture in ladder]
        assert values == sorted(values)
        assert len(set(values)) == 3


def test_smooth_and_sharp_are_told_apart():
    """PSNR prefers the blurred picture to the noisy one; sharpness says which is which, GMSD that both have faults."""
    image = photograph()
    smooth, rough = blurred(image, 1), noisy(image, 20)
    assert psnr(smooth, image) > psnr(rough, image)
    assert sharpness_ratio(blurred(image, 2), image) < sharpness_ratio(smooth, image) < 0.9
    assert 1.1 < sharpness_ratio(rough, image) < sharpness_ratio(noisy(image, 40), image)
    assert min(gmsd(smooth, image), gmsd(rough, image)) > 0.02


def test_sharpness_is_not_fooled_by_brightness_or_flat_pictures():
    image = photograph()
    assert sharpness_ratio((image // 2 + 60).astype(np.uint8), image) == pytest.approx(0.5, abs=0.02)
    flat = np.full_like(image, 7)
    assert sharpness_ratio(flat, flat) == 1
    assert sharpness_ratio(image, flat) == math.inf
    assert sharpness_ratio(flat, image) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("measure", [psnr, ssim, gmsd, sharpness_ratio])
def test_pictures_that_cannot_be_compared(measure):
    image = photograph(40, 50)
    with pytest.raises(InputError, match="pictures of 50x40 and 49x40 pixels cannot be compared"):
        measure(image, image[:, :49])
    if measure is not psnr:  # which has no window
        with pytest.raises(
            InputError, match=r"pictures of 50x10 pixels are too small: each side must have at least 11"
        ):
            measure(image[:10], image[:10])


def test_pictures_of_another_type_are_named(unchecked):
    image = photograph(40, 50)
    with pytest.raises(ValueError, match="reference is float32"):
        psnr(image, image.astype(np.float32))


def test_metrics_are_listed_without_jax_or_opencv():
    code = """
import sys
from faithdiff_jax.evaluation.metrics import METRICS
from faithdiff_jax.evaluation.protocols import PROTOCOLS
print(sorted({"jax", "cv2", "numpy", "scipy", "torch"} & set(sys.modules)), len(METRICS) > 3, *PROTOCOLS)
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.split() == ["[]", "True", "paper", "ycbcr"]


def test_a_metric_computes_many_pictures_of_several_sizes():
    metric = make_metric("psnr", Protocol(name="mine", metrics=("psnr",), psnr="rgb"))
    references = [photograph(40, 50), photograph(30, 60), photograph(40, 50)]
    restored = [noisy(picture, sigma) for picture, sigma in zip(references, (5, 10, 20), strict=True)]
    figures = metric.many(restored, references)
    assert figures == [metric(*pair) for pair in zip(restored, references, strict=True)]
    assert figures == sorted(figures, reverse=True)
    assert figures == pytest.approx([psnr(*pair) for pair in zip(restored, references, strict=True)], abs=1e-3)


def test_what_a_metric_cannot_use_is_named():
    image = photograph(40, 50)
    with pytest.raises(InputError, match=r"^ssim needs a reference"):
        make_metric("ssim")(image)
    with pytest.raises(InputError, match=r"^2 pictures and 1 references: must be as many"):
        make_metric("ssim").many([image, image], [image])
    with pytest.raises(InputError, match=r"^no metric 'psnrr'; did you mean psnr\?"):
        make_metric("psnrr")
    with pytest.raises(InputError, match=r"^no metric 'zzz'; the metrics are psnr, ssim"):
        make_metric("zzz")
    with pytest.raises(InputError, match=r"^no protocol 'papr'; did you mean paper\?"):
        make_metric("psnr", "papr")


def test_a_protocol_of_a_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nmetrics: [ssim, psnr]\npsnr: ycbcr\nborder: 4\n")
    protocol = find_protocol(str(path))
    assert (protocol.metrics, protocol.psnr, protocol.border) == (("ssim", "psnr"), "ycbcr", 4)
    for text, message in {
        "name: mine": "metrics is missing",
        "name: mine\nmetrics: []": "metrics is empty",
        "name: mine\nmetrics: [psnr]\nborder: -1": "border is -1: must be a whole number from 0 to 1024",
        "name: mine\nmetrics: [psnr]\npsnr: yuv": "psnr is 'yuv': must be one of rgb, yiq, ycbcr",
        "name: mine\nmetrics: [psn]": "no metric 'psn'; did you mean psnr",
        "name: paper\nmetrics: [psnr]": "the name 'paper' is taken",
    }.items():
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            find_protocol(str(path))


def test_protocols_name_metrics_that_there_are():
    assert all(set(protocol.metrics) <= set(METRICS) for protocol in PROTOCOLS.values())
    assert [name for name, protocol in PROTOCOLS.items() if protocol.name != name] == []
