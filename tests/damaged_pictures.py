"""A photograph, and the same one damaged in ways that metrics tell apart."""

import cv2
import numpy as np
import skimage.data


def photograph(height=121, width=140):
    return np.ascontiguousarray(skimage.data.astronaut()[40 : 40 + height, 160 : 160 + width])


def blurred(image, sigma):
    return cv2.GaussianBlur(image, (0, 0), sigma)


def noisy(image, sigma):
    noise = np.random.default_rng(0).normal(0, sigma, image.shape)
    return np.clip(np.rint(image + noise), 0, 255).astype(np.uint8)


CHANGED = {
    "blurred": lambda image: blurred(image, 1.5),
    "noisy": lambda image: noisy(image, 12),
    "darker": lambda image: (image * 0.7).astype(np.uint8),
    "unrelated": lambda image: np.ascontiguousarray(image[::-1, ::-1]),
}
