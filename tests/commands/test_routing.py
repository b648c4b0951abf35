"""The line on the router whose choices the selection bias forces most."""

from __future__ import annotations

from raymoe.commands.routing import most_forced, most_forced_of_run


def test_the_router_with_the_largest_share_is_named() -> None:
    shares = {"clusters": [0.1, None, 0.342], "experts": [0.2, 0.3, 0.25]}
    expected = "the selection bias forces at most 34.2% of the choices of a router: layer 2, clusters"
    assert most_forced({"bias_forced_share": shares}) == expected
    assert most_forced({"bias_forced_share": shares | {"clusters": None}}).endswith("30.0% of the choices of a router: layer 1, experts")  # fmt: skip


def test_a_model_without_routers_and_an_older_record_have_no_line() -> None:
    for record in (
        {},
        {"bias_forced_share": {"clusters": None, "experts": None}},
        {"bias_forced_share": {"experts": [None]}},
    ):
        assert most_forced(record) == ""


def test_the_last_validation_of_a_run_counts() -> None:
    records = [
        {"kind": "validation", "step": 100, "bias_forced_share": {"experts": [0.5]}},
        {"kind": "validation", "step": 200, "bias_forced_share": {"experts": [0.25]}},
        {"kind": "train", "step": 210, "bias_forced_share": {"experts": [0.75]}},
    ]
    line = most_forced_of_run(records)
    assert "25.0%" in line and line.endswith("layer 0, experts (validation of step 200)")
    assert most_forced_of_run(records[2:]) == ""
