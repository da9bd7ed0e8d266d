"""Noise schedule and samplers: arrays and callables, no model."""
