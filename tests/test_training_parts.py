"""What training loops share: the learning rate's course, what decays, frozen networks, the end on a signal."""

from __future__ import annotations

import itertools
import signal
import threading

import pytest
from torch import nn

from qkv.core import training
from qkv.core.training import course, decayed, evaluated, frozen, gently


def test_the_rate_rises_straight_and_falls_along_a_cosine_to_its_floor() -> None:
    rates = [course(s, 40, 4, floor=0.2) for s in range(41)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[22] == pytest.approx(0.6) and rates[40] == pytest.approx(0.2)
    assert all(b < a for a, b in itertools.pairwise(rates[4:]))


def test_matrices_decay_and_nothing_else() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5))
    matrices, rest = decayed(model.parameters(), 0.3)
    assert (matrices["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    assert [p.ndim for p in matrices["params"]] == [2] and [p.ndim for p in rest["params"]] == [1, 1, 1]


def test_a_network_gets_back_what_learnt_and_every_mode_also_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Dropout())
    model[0].requires_grad_(False)
    model[2].eval()
    asks = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    with pytest.raises(ZeroDivisionError), frozen(model), evaluated(model):
        assert not any(p.requires_grad for p in model.parameters()) and not any(m.training for m in model.modules())
        raise ZeroDivisionError
    assert [p.requires_grad for p in model.parameters()] == asks
    assert [m.training for m in model.modules()] == modes


def test_a_signal_is_noted_once_and_a_later_one_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now, before = 100.0, (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    monkeypatch.setattr(training.time, "monotonic", lambda: now)
    with gently(signal.SIGINT, signal.SIGTERM) as asked:
        signal.raise_signal(signal.SIGTERM)
        now += 0.5
        signal.raise_signal(signal.SIGINT)  # the same wish, passed on
        now += 5.0
        signal.raise_signal(signal.SIGTERM)
        assert asked == [signal.SIGTERM]
        with pytest.raises(KeyboardInterrupt, match="at once"):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_other_threads_leave_signals_alone() -> None:
    found = []

    def work() -> None:
        with gently(signal.SIGINT):
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGINT)]
