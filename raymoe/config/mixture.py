"""Weights of domains in text: `wiki:2,legal:0.5`."""

from __future__ import annotations

import math

from raymoe.config.checks import require


def parse_mixture(text: str) -> dict[str, float]:
    """Return domain -> weight, empty for empty text. A colon in a name is allowed: the last one ends the name.

    Raises ValueError unless each part is DOMAIN:WEIGHT with a finite weight greater than 0, and each domain occurs once.
    """
    weights: dict[str, float] = {}
    for part in text.split(",") if text else ():
        domain, _, number = part.strip().rpartition(":")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        allowed = "DOMAIN:WEIGHT,... with finite weights greater than 0, for example wiki:2,legal:1"
        require(bool(domain) and 0 < weight < math.inf, "train.mixture", text, allowed)
        require(domain not in weights, "train.mixture", text, f"{domain} occurs twice")
        weights[domain] = weight
    return weights
