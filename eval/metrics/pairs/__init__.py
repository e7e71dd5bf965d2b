"""Metrics that compare each clip with another one, frame by frame."""
