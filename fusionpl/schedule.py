"""The learning rate of a training that lasts so many steps or so long: a linear warm-up and a cosine to zero."""

import math
import time


def warmup_cosine(share: float, warmup: float) -> float:
    """The factor of the largest learning rate.

    Args:
        share: how much of the training is over; beyond 1 the factor stays 0.
        warmup: share of the training in which the learning rate rises.
    """
    if share < warmup:
        return share / warmup
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (share - warmup) / max(1e-9, 1 - warmup)))


class Clock:
    """Measures how much of a given time has passed since this object was made.

    Args:
        seconds: the whole time.
    """

    def __init__(self, seconds: float) -> None:
        self.started, self.seconds = time.monotonic(), seconds

    @property
    def share(self) -> float:
        """The share of the time that has passed; above 1 when it is over."""
        return (time.monotonic() - self.started) / self.seconds
