"""Whole runs at their smallest, for tests that need every stage and none of its numbers."""

SMALL = (
    *("preset=smoke", "threads=1", "data.world.num_train=16", "data.world.shard_clips=16", "data.text_steps=2"),
    *("teacher.train.num_steps=2", "trajectories.num_pairs=4", "init.train.num_steps=1", "init.train.batch_size=4"),
    *("distill.train.num_steps=2", "distill.train.batch_size=4", "distill.train.validate_every=0"),
    *("eval.num_conditions=4", "eval.num_reference=4", "eval.num_seeds=1", "eval.probe_steps=2", "eval.admit_clips=4"),
    *("eval.latency_runs=1", "eval.latency_warmup=0", "eval.num_samples=1", "health.num_conditions=2"),
)
"""Overrides of a recipe of the embedded world."""
