"""Which clusters should be resident: the most used for their bytes, up to a budget. Pure decisions, no loads."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass
from functools import partial

from raymoe.config import check_field


@dataclass(frozen=True)
class ResidencySettings:
    half_life: float = 256.0
    """Steps after which a row has half of its weight."""
    interval: int = 16
    """Steps between decisions."""
    margin: float = 0.25
    """Relative excess of use with which a key replaces a resident one, so that equals do not alternate."""
    min_steps: int = 64
    """Steps for which a loaded value stays while it is used."""
    floor: float = 1e-3
    """Average rows per step below which a key is unused."""
    idle_steps: int | None = None
    """Steps without a row after which an unused key is evicted, even without another key for its memory. None: never."""
    backoff_s: float = 1.0
    """Seconds between a failed load and the next one ahead of use. Doubles with each further failure."""
    backoff_max_s: float = 60.0
    """Maximum of that delay."""

    def __post_init__(self) -> None:
        require = partial(check_field, self)
        require("half_life", "greater than 0", self.half_life > 0)
        require("interval", "1 to 500 half-lives", 1 <= self.interval <= 500 * self.half_life)  # weights are floats
        for name in ("margin", "min_steps", "floor", "backoff_s"):
            require(name, "0 or more", getattr(self, name) >= 0)
        require("idle_steps", "0 or more, or None", self.idle_steps is None or self.idle_steps >= 0)
        require("backoff_max_s", "at least backoff_s", self.backoff_max_s >= self.backoff_s)


def wanted(
    sizes: Mapping[int, int],
    use: Mapping[int, float],
    resident: Collection[int],
    budget: int,
    margin: float,
    keep: Set[int] = frozenset(),
) -> set[int]:
    """Return the keys that should be resident: greedily those with most use per byte that fit in `budget`.

    sizes: bytes (1 or more) of each candidate. use: rows per step. The use of a resident key counts (1 + margin)
    times, and a resident key precedes an equal one. keep: keys, within the budget, that stay whatever their use.
    With the result as `resident`, the result is the same.
    """
    chosen = set(keep)
    free = budget - sum(sizes[key] for key in chosen)

    def rank(key: int) -> tuple[float, bool, int]:
        inside = key in resident
        return -use[key] / sizes[key] * (1 + margin if inside else 1), not inside, key

    for key in sorted(sizes.keys() - chosen, key=rank):
        if sizes[key] <= free:
            chosen.add(key)
            free -= sizes[key]
    return chosen


class Use:
    """An exponential moving average of each key's rows per step.

    Steps only accumulate rows, with a growing weight; `update` computes the averages.
    """

    def __init__(self, keys: Collection[int], half_life: float) -> None:
        self.step = 0
        self.average = dict.fromkeys(keys, 0.0)
        """Rows per step, as of the last `update`."""
        self.last = dict.fromkeys(keys, 0)
        """Step of each key's last row, or of the `update` after it."""
        self._decay = 0.5 ** (1 / half_life)
        self._recent = dict.fromkeys(keys, 0.0)  # weighted rows since the last update
        self._weight = 1.0  # of a row of this step

    def observe(self, rows: Mapping[int, int]) -> None:
        """Add the rows of one step. Raises KeyError for an unknown key."""
        self.step += 1
        self._weight /= self._decay
        for key, count in rows.items():
            self._recent[key] += self._weight * count

    def update(self) -> None:
        past = 1 / self._weight
        for key, rows in self._recent.items():
            self.average[key] = past * (self.average[key] + (1 - self._decay) * rows)
            if rows:
                self.last[key] = self.step
                self._recent[key] = 0.0
        self._weight = 1.0

    def idle(self, floor: float, steps: int) -> set[int]:
        """Return the keys with an average below `floor` and no row in the last `steps` steps."""
        before = self.step - steps
        return {key for key, use in self.average.items() if use < floor and self.last[key] < before}
