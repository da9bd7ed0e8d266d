"""How far two arrays are apart, measured against the largest value of the reference."""

import numpy as np


def relative_error(ours, reference) -> float:
    """Largest absolute difference divided by the reference's largest magnitude; shapes must agree."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape, f"shapes {ours.shape} and {reference.shape}"
    assert np.isfinite(ours).all(), "our result holds non-finite values"
    return float(np.abs(ours - reference).max() / np.abs(reference).max())


def assert_parity(ours, reference, limit: float = 1e-4) -> None:
    """Hold `ours` to `reference`: the issue's limit is 1e-4 of the largest value."""
    error = relative_error(ours, reference)
    assert error <= limit, f"relative error {error:.2e} is over {limit:.0e}"


def nhwc(tensor) -> np.ndarray:
    """A torch (B, C, H, W) tensor as a NumPy (B, H, W, C) array."""
    return tensor.detach().numpy().transpose(0, 2, 3, 1)


def nchw(array):
    """A NumPy (B, H, W, C) array as a torch (B, C, H, W) tensor."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(np.asarray(array).transpose(0, 3, 1, 2)))
