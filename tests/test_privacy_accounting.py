# SPDX-License-Identifier: BSD-3-Clause
"""Epsilon is what Opacus and dp_accounting say themselves, asked in other ways."""

import math
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import dp_accounting
import pytest
from dp_accounting import pld, rdp
from opacus.accountants import PRVAccountant, RDPAccountant

from torchrec_scratchpipe.errors import ConfigError
from torchrec_scratchpipe.privacy.accounting import Span, epsilon, epsilon_of

pytestmark = pytest.mark.any_torchrec

# Noise, rate, steps, delta
SETTINGS = [
    (noise, rate, num_steps, delta)
    for noise, rate, num_steps in (
        (0.6, 0.001, 500),
        (0.6, 0.001, 20_000),
        (0.8, 0.01, 100),
        (0.8, 0.01, 2_000),
        (1.0, 0.0001, 1_000),
        (1.0, 0.02, 300),
        (1.3, 0.1, 50),
        (2.0, 0.3, 40),
        (4.0, 1.0, 10),
        (6.0, 0.5, 100),
    )
    for delta in (1e-5, 1e-7)
]
ORDERS = RDPAccountant.DEFAULT_ALPHAS
MIXED = [Span(0.8, 0.01, 200), Span(1.2, 0.02, 100), Span(0.8, 0.01, 50), Span(2.0, 1.0, 3)]


def event(noise: float, rate: float) -> dp_accounting.DpEvent:
    return dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))


def by_steps(accountant: Any, spans: Sequence[tuple[float, float, int]], delta: float) -> float:
    """Opacus as it is used in training: told of each step."""
    for noise, rate, num_steps in spans:
        for _ in range(num_steps):
            accountant.step(noise_multiplier=noise, sample_rate=rate)
    return float(accountant.get_epsilon(delta))


def of_rdp_by_dp_accounting(spans: Sequence[tuple[float, float, int]], delta: float) -> float:
    """The same moments by another library."""
    accountant = rdp.RdpAccountant(ORDERS)
    for noise, rate, num_steps in spans:
        accountant.compose(event(noise, rate), num_steps)
    return float(accountant.get_epsilon(delta))


@cache
def pld_of(noise: float, rate: float, num_steps: int) -> Any:
    return pld.PLDAccountant().compose(dp_accounting.SelfComposedDpEvent(event(noise, rate), num_steps))


@pytest.mark.parametrize(("noise", "rate", "num_steps", "delta"), SETTINGS)
def test_epsilon_is_that_of_the_libraries(noise: float, rate: float, num_steps: int, delta: float) -> None:
    setting: dict[str, Any] = {"noise_multiplier": noise, "sample_rate": rate, "num_steps": num_steps, "delta": delta}
    found = {name: epsilon(**setting, accountant=name) for name in ("prv", "rdp", "pld")}
    spans = [(noise, rate, num_steps)]
    assert found["prv"] == pytest.approx(by_steps(PRVAccountant(), spans, delta), abs=1e-6)
    assert found["rdp"] == pytest.approx(by_steps(RDPAccountant(), spans, delta), abs=1e-6)
    assert found["pld"] == pytest.approx(pld_of(*spans[0]).get_epsilon(delta), abs=1e-6)

    # Two libraries, two ways. prv is an upper bound that is off by 0.01 twice at most, pld by less.
    assert found["pld"] - 1e-3 <= found["prv"] <= found["pld"] + 0.025
    # Of orders that are no integers, the libraries compute moments that differ a little.
    assert found["rdp"] == pytest.approx(of_rdp_by_dp_accounting(spans, delta), rel=1e-3)
    assert found["pld"] <= found["rdp"]


def test_control_the_settings_differ() -> None:
    found = {
        epsilon(noise_multiplier=n, sample_rate=q, num_steps=t, delta=d, accountant="rdp") for n, q, t, d in SETTINGS
    }
    assert len(found) == len(SETTINGS) == 20
    assert min(found) < 0.5
    assert max(found) > 5


@pytest.mark.parametrize("accountant", ["prv", "rdp", "pld"])
def test_spans_of_several_settings(accountant: Any) -> None:
    found = epsilon_of(MIXED, delta=1e-6, accountant=accountant)
    merged = [Span(0.8, 0.01, 250), *MIXED[1:2], *MIXED[3:]]
    if accountant == "pld":
        direct = pld.PLDAccountant()
        for noise, rate, num_steps in merged:
            direct.compose(event(noise, rate), num_steps)
        expected = direct.get_epsilon(1e-6)
    else:
        expected = by_steps({"rdp": RDPAccountant, "prv": PRVAccountant}[accountant](), merged, 1e-6)
    assert found == pytest.approx(expected, abs=1e-6)
    if accountant == "pld":
        return  # slow
    assert found == pytest.approx(epsilon_of(MIXED[::-1], delta=1e-6, accountant=accountant), abs=1e-6)
    alone = [epsilon_of([span], delta=1e-6, accountant=accountant) for span in merged]
    assert max(alone) < found < sum(alone)


@pytest.mark.parametrize("accountant", ["prv", "rdp", "pld"])
def test_nothing_seen_is_nothing_spent_and_no_noise_is_no_privacy(accountant: Any) -> None:
    def spent(*spans: Span) -> float:
        return epsilon_of(spans, delta=1e-5, accountant=accountant)

    assert spent() == spent(Span(1.0, 0.1, 0)) == spent(Span(1.0, 0.0, 100)) == 0.0
    assert spent(Span(0.0, 0.1, 0)) == spent(Span(0.0, 0.0, 9)) == 0.0
    assert spent(Span(0.0, 0.1, 1)) == spent(Span(1.0, 0.1, 10), Span(0.0, 0.1, 1)) == math.inf
    some = spent(Span(1.0, 0.01, 10))
    assert 0 < some < math.inf
    setting: dict[str, Any] = {"noise_multiplier": 1.0, "sample_rate": 0.01, "num_steps": 10, "delta": 1e-5}
    assert epsilon(**setting, accountant=accountant) == some
    assert accountant != "prv" or epsilon(**setting) == some
    assert spent(Span(1.0, 0.01, 10), Span(0.0, 0.0, 5), Span(0.0, 0.1, 0)) == pytest.approx(some, abs=1e-6)


def test_an_epsilon_that_takes_too_much_memory_is_refused() -> None:
    weak: dict[str, Any] = {"noise_multiplier": 0.1, "sample_rate": 0.5, "num_steps": 1000, "delta": 1e-5}
    for accountant in ("prv", "pld"):
        with pytest.raises(ConfigError, match=f"Accountant {accountant}: epsilon may be 47528, .*accountant='rdp'"):
            epsilon(**weak, accountant=accountant)
    assert epsilon(**weak, accountant="rdp") == pytest.approx(47528, abs=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accountant": "gdp"}, "accountant is 'gdp', needs one of prv, rdp, pld"),
        ({"delta": 0.0}, "delta is 0.0, needs to be above 0"),
        ({"delta": 1.0}, "delta is 1.0, needs to be above 0 and below 1"),
        ({"noise_multiplier": -1.0}, "noise_multiplier is -1.0, needs to be 0 or more"),
        ({"noise_multiplier": math.nan}, "noise_multiplier is nan"),
        ({"sample_rate": 1.5}, "sample_rate is 1.5, needs to be from 0 to 1"),
        ({"num_steps": -1}, "num_steps is -1, needs to be a whole number"),
        ({"num_steps": 1.5}, "num_steps is 1.5, needs to be a whole number"),
    ],
)
def test_values_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    setting: dict[str, Any] = {"noise_multiplier": 1.0, "sample_rate": 0.1, "num_steps": 10, "delta": 1e-5}
    with pytest.raises(ConfigError, match=message):
        epsilon(**setting | change)


@pytest.mark.parametrize(("accountant", "package"), [("prv", "opacus"), ("rdp", "opacus"), ("pld", "dp_accounting")])
def test_the_extra_is_asked_for_where_it_is_missing(
    accountant: Any, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "opacus.accountants" if package == "opacus" else package, None)
    with pytest.raises(ConfigError, match=rf"needs {package}, .*pip install torchrec-scratchpipe\[privacy\]"):
        epsilon(noise_multiplier=1.0, sample_rate=0.1, num_steps=1, delta=1e-5, accountant=accountant)
