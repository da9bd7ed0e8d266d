"""Restoring as a service: a queue before one loaded model, an HTTP API and a page."""
