"""Peak memory of this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from raymoe.ops import memory
from raymoe.ops.memory import peak_rss_mb


def test_the_peak_falls_back_to_resource_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    peak = peak_rss_mb()
    monkeypatch.setattr(memory, "Path", lambda _: Path("/no/such/file"))
    assert peak_rss_mb() == pytest.approx(peak, rel=0.5)
