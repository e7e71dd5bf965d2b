"""What comes out of a door into a test, with its times: when something is heard, and when the puppet's mouth is open."""

import numpy as np

from tests.support.live.lag import Lag

LOUD, OPEN = 1000, 60
MOUTH = (slice(11, 13), slice(6, 10))


class Watched:
    """`sound` (time, int16 [n]) and `video` (time, the mouth's grey) of a picture of 16 x 16; made in a running loop."""

    def __init__(self, open_above: float = OPEN):
        self.sound: list[tuple[float, np.ndarray]] = []
        self.video: list[tuple[float, float]] = []
        self.lag, self.open_above = Lag(), open_above

    def hear(self, at: float, block: np.ndarray) -> None:
        self.sound.append((at, block))

    def see(self, at: float, picture: np.ndarray) -> None:
        self.video.append((at, float(picture[MOUTH].mean())))

    def voiced(self, gap: float = 0.25) -> np.ndarray:
        """Begin and end [n, 2] of each stretch of sound without a gap."""
        loud = np.array([at for at, block in self.sound if np.abs(block.astype(int)).max() > LOUD])
        cuts = np.flatnonzero(np.diff(loud) > gap)
        return np.stack([loud[np.r_[0, cuts + 1]], loud[np.r_[cuts, len(loud) - 1]]], 1)

    def mouth(self) -> np.ndarray:
        """Times and states (0, 1) [n, 2] of the mouth."""
        return np.array([(at, grey > self.open_above) for at, grey in self.video], dtype=float)

    def turned(self) -> np.ndarray:
        """Those at which it opened or closed."""
        mouth = self.mouth()
        return mouth[1:][np.diff(mouth[:, 1]) != 0]
