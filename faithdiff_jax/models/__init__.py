"""Flax NNX modules: SDXL UNet, VAE and LQ encoder, aligner, CLIP text encoders."""
