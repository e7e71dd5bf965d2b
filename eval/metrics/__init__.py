"""The metrics: one class in one file, which bears the metric's name; `eval.cards` reads which of them a protocol has."""
