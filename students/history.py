"""What a chunk may see of the past: one policy value, used by training masks, rollouts and the serving session alike."""

from dataclasses import dataclass

from teachers.errors import UserError


@dataclass(frozen=True, kw_only=True)
class History:
    """`sinks` first chunks that are never evicted, and the last `window` finished chunks (null: all).

    `level` is the sigma that the network is told when a finished chunk is put into the context; the chunk itself stays clean, as in
    Self Forcing's sampler (0: the clean pass). Self Forcing is History(sinks=0,
    window=None); LiveTalk's Anchor-Heavy Identity Sinks (9 sink frames of 15 that include the current chunk) is
    History(sinks=3, window=1) with chunks of 3 frames. Positions are relative to what is seen, so a stream has no last position.
    """

    sinks: int = 1
    window: int | None = 2
    level: float = 0.0

    def __post_init__(self):
        if self.sinks < 0 or (self.window is not None and self.window < 0):
            raise UserError(f"student.history: got sinks={self.sinks}, window={self.window}; both count chunks, from 0")
        if not 0.0 <= self.level < 1.0:
            raise UserError(f"student.history.level: got {self.level}; a context level is a sigma in [0, 1)")

    def visible(self, chunk: int) -> tuple[int, ...]:
        """Indices of the earlier chunks that chunk number `chunk` sees, in order."""
        if self.window is None:
            return tuple(range(chunk))
        recent = range(max(self.sinks, chunk - self.window), chunk)
        return (*range(min(self.sinks, chunk)), *recent)
