"""Runs of many workers, simulated: what can be counted by hand, and what must not be lost."""

import dataclasses
import json
from pathlib import Path

import pytest

from experiments.scale import plans
from experiments.scale.simulation import Costs, Plan, simulate

CALM = Costs(
    evaluate=1.0, spread=0.0, slow=0.0, replay=0.0, message=0.0, latency=0.0, record=0.0,
    lifetime=1e9,
)  # fmt: skip


def seconds(plan, **changes):
    """Of a step, where nothing is left to chance but what `changes` says."""
    return 3600 / simulate(plan, dataclasses.replace(CALM, **changes), steps=4).steps_an_hour


def test_a_step_takes_what_its_parts_take():
    assert seconds(Plan(4, 16)) == pytest.approx(4.0)
    assert seconds(Plan(4, 1)) == pytest.approx(1.0)
    assert seconds(Plan(4, 1, parts=4)) == pytest.approx(0.25)
    assert seconds(Plan(4, 16), record=0.5) == pytest.approx(4.5)
    # The head makes each step, then the workers do, but for the first one.
    assert seconds(Plan(4, 16), replay=1.0) == pytest.approx(4 + 1 + 3 / 4)
    # Sixteen leases pass through the head, out and in.
    assert seconds(Plan(16, 16), message=1.0) == pytest.approx(17.0, abs=1.0)
    assert seconds(Plan(4, 16, cores=2)) == pytest.approx(8.0)


def test_slow_machines_hold_up_those_that_were_given_all_at_once():
    given = {
        share: seconds(Plan(20, 400, share=share), slow=0.1, slower=4.0) for share in (1, 0.25)
    }
    assert given[0.25] < 0.6 * given[1]


def test_the_dead_are_replaced_and_what_they_had_is_done_by_others():
    costs = dataclasses.replace(CALM, lifetime=30 / 3600, start=2.0, load=1.0, replay=0.1)
    plan = Plan(8, 64, checkpoint_every=5)
    found = simulate(plan, costs, steps=20)
    assert found.newcomers > 20 and found.again > 0 and 0 < found.wasted < 0.5
    assert 1.0 <= found.catch_up < 2.0
    assert found.steps_an_hour < simulate(plan, CALM, steps=20).steps_an_hour
    assert found == simulate(plan, costs, steps=20)
    assert found != simulate(plan, costs, steps=20, seed=1)


def test_bad_plans_are_refused():
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        Plan(0, 4)
    with pytest.raises(ValueError, match="evaluate must be positive"):
        Costs(evaluate=0.0)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        simulate(Plan(1, 1), CALM, steps=0)


def test_measured_runs_are_near_simulated_ones():
    """The table of docs/scale.md."""
    path = Path(plans.__file__).parent / "results" / "measured.json"
    found = json.loads(path.read_text())
    took = found["costs"]
    costs = dataclasses.replace(
        CALM, evaluate=took["evaluate"], spread=took["spread"], replay=took["replay"],
        message=took["trip"] / 2, latency=took["trip"] / 2, record=0.002,
    )  # fmt: skip
    document = Path(plans.__file__).parents[2] / "docs" / "scale.md"
    text = document.read_text()
    for run in found["runs"]:
        plan = Plan(run["workers"], int(took["pieces"]), cores=found["cores"])
        simulated = simulate(plan, costs, steps=40).steps_an_hour
        assert 0.75 < run["steps_an_hour"] / simulated < 1.1
        assert f"{run['steps_an_hour']:,.0f} | {simulated:,.0f}" in text
