"""How a causal few-step avatar student is made: stages, methods, rollout, training, data, command line."""

__version__ = "0.1.0"
