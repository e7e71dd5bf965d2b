"""How much one viewer may send, and how many viewers one peer may be."""

from dataclasses import dataclass, field

from distill.live.operations.addresses import is_loopback
from teachers.errors import UserError


@dataclass(frozen=True)
class Rate:
    """`each` a second, `burst` at once."""

    each: float
    burst: float


RATES = {
    "message": Rate(100, 400),
    "open": Rate(0.2, 6),
    "say": Rate(0.5, 10),
    "text": Rate(0.5, 10),
    "guidance": Rate(0.5, 10),
    "interrupt": Rate(1, 10),
    "upload": Rate(0.5, 8),  # a picture or a sound file
    "sound": Rate(4, 120),  # seconds of samples
    "speech": Rate(20, 600),  # the same, of the avatar, which may come faster than it is said
}
"""Of what is not named, the first. What makes chunks be drawn anew, which all pay for, comes as often as a person asks."""


@dataclass
class Bucket:
    """What is left of a rate at the time `at`."""

    left: float
    at: float


@dataclass
class Allowance:
    """What one viewer has left of each rate."""

    rates: dict[str, Rate] = field(default_factory=lambda: RATES)
    buckets: dict[str, Bucket] = field(default_factory=dict)

    def take(self, kind: str, now: float, amount: float = 1.0) -> None:
        """UserError for more than the rate of a kind of message; nothing is taken then."""
        kind = kind if kind in self.rates else "message"
        rate = self.rates[kind]
        bucket = self.buckets.setdefault(kind, Bucket(rate.burst, now))
        bucket.left, bucket.at = min(rate.burst, bucket.left + (now - bucket.at) * rate.each), now
        if amount > bucket.left:
            what = {"message": "messages", "sound": "seconds of sound", "speech": "seconds of speech"}.get(
                kind, f"'{kind}'"
            )
            raise UserError(f"too many {what}: {rate.each:g} a second are allowed, {rate.burst:g} at once; send fewer")
        bucket.left -= amount


class Peers:
    """Viewers by address. This machine's own, where a proxy without X-Forwarded-For is too, has no limit."""

    def __init__(self, most: int):
        self.most, self.count = most, dict[str, int]()

    def enter(self, peer: str) -> str:
        """Why this peer has no more viewers, in one line; empty where it has another one from now on."""
        if self.count.get(peer, 0) >= self.most and not is_loopback(peer):
            return f"{self.most} viewers from your address are here already; close one first"
        self.count[peer] = self.count.get(peer, 0) + 1
        return ""

    def leave(self, peer: str) -> None:
        """One less."""
        self.count[peer] -= 1
        if not self.count[peer]:
            del self.count[peer]
