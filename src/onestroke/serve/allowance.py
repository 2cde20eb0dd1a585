"""How many pictures a client may ask for: a bucket that fills with time, one for each address."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable

from onestroke.errors import OnestrokeError

MAX_CLIENTS = 4096  # whose buckets are remembered; the one that has been still for longest is forgotten first


class TooFast(OnestrokeError):
    """More pictures than a client is allowed; `retry_after` is the seconds after which there will be room."""

    def __init__(self, retry_after: int, per_minute: float) -> None:
        self.retry_after = retry_after
        super().__init__(
            f"you asked for more than {per_minute:g} pictures a minute", fix=f"Try again in {retry_after} s."
        )


class Allowance:
    """`per_minute` pictures a client, of which half a minute's may come at once; None allows any number."""

    def __init__(self, per_minute: float | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds."""
        self.per_minute, self._clock = per_minute, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client -> pictures left, and when

    def take(self, client: str, count: int) -> None:
        """Count `count` pictures for `client`. Raises `TooFast`, and counts nothing then."""
        if self.per_minute is None:
            return
        now, most = self._clock(), max(1.0, self.per_minute / 2)
        left, at = self._buckets.pop(client, (most, now))
        left = min(most, left + (now - at) * self.per_minute / 60)
        asked = min(float(count), most)  # a request larger than the bucket takes all of it, or it never could be drawn
        enough = left >= asked
        self._buckets[client] = (left - asked if enough else left, now)
        while len(self._buckets) > MAX_CLIENTS:
            self._buckets.popitem(last=False)
        if not enough:
            raise TooFast(max(1, math.ceil((asked - left) * 60 / self.per_minute)), self.per_minute)
