"""Where a run's time went, by hand."""

import time

import pytest

from vlm_dist.train.goodput import Goodput, GoodputLedger
from vlm_dist.train.ledger import StepReport


def report(step: int, **values: float) -> StepReport:
    known = {"update_s": 0.5, "skipped_steps": 1.0, "data_wait_frac": 0.1, "clips_per_s": 10.0, "tokens_per_s": 580.0}
    return StepReport(step, {f"train/{name}": value for name, value in (known | values).items()})


def test_a_run_with_a_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    ledger = GoodputLedger(96)
    assert ledger.total() is None
    ledger.take("plan", {})
    ledger.take("resumed", {"step": 10})
    ledger.take("step", report(20))
    ledger.take("step", report(30))
    ledger.take("plan", {})
    ledger.take("resumed", {"step": 25})
    ledger.take("step", report(35, update_s=0.7))
    now = 130.0
    total = ledger.total()
    assert total is not None
    assert total == Goodput(30.0, 25, 0.5, 1, 5, 1, 0.1, pytest.approx(1 - 58 / 96))
    assert total.share == pytest.approx(25 * 0.5 / 30)
    assert "goodput 42%: 25 updates of 0.5 s in 30 s; 1 restart (5 updates made again), 1 skipped" in total.line()


def test_a_restart_before_the_first_checkpoint_makes_all_again() -> None:
    ledger = GoodputLedger()
    for kind, payload in (("plan", {}), ("step", report(8)), ("plan", {}), ("step", report(2)), ("step", report(9))):
        ledger.take(kind, payload)
    total = ledger.total()
    assert total is not None
    assert (total.updates, total.restarts, total.made_again) == (9, 1, 8)


def test_a_run_without_places_and_without_restarts() -> None:
    ledger = GoodputLedger()
    ledger.take("plan", {})
    ledger.take("step", report(4))
    total = ledger.total()
    assert total is not None
    assert (total.updates, total.restarts, total.made_again, total.padding) == (4, 0, 0, 0.0)
