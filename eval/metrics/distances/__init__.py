"""Distances between sets of clips, by features of published networks or of the probes."""
