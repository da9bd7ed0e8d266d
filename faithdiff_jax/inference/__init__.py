"""Restoring photographs: options, pipeline, compiled programs, denoising over tiles, colour fixes."""
