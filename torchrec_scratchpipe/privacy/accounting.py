# SPDX-License-Identifier: BSD-3-Clause
"""The privacy that training has spent: epsilon for a delta, by Opacus's or Google's accountants."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

from torchrec_scratchpipe.errors import ConfigError
from torchrec_scratchpipe.privacy.extra import import_extra

__all__ = ["Accountant", "Span", "epsilon", "epsilon_of"]

Accountant = Literal["prv", "rdp", "pld"]

MAX_POINTS = 2**25  # of a distribution that prv or pld folds: about 2 GiB
PLD_POINT = 1e-4  # distance of points, as PLDAccountant has it


class Span(NamedTuple):
    """Steps of training that add the same noise and sample with the same rate.

    Attributes:
        noise_multiplier: Standard deviation of the noise in the sum of gradients, in units of the clipping norm.
        sample_rate: Probability of each example to be in a batch. Batches must be Poisson samples.
        num_steps: How many steps.
    """

    noise_multiplier: float
    sample_rate: float
    num_steps: int


def epsilon(
    *, noise_multiplier: float, sample_rate: float, num_steps: int, delta: float, accountant: Accountant = "prv"
) -> float:
    """What :func:`epsilon_of` says of one span.

    Args:
        noise_multiplier: See :class:`Span`.
        sample_rate: See :class:`Span`.
        num_steps: See :class:`Span`.
        delta: See :func:`epsilon_of`.
        accountant: See :func:`epsilon_of`.

    Returns:
        See :func:`epsilon_of`.

    Raises:
        ConfigError: See :func:`epsilon_of`.
    """
    return epsilon_of([Span(noise_multiplier, sample_rate, num_steps)], delta=delta, accountant=accountant)


def epsilon_of(spans: Sequence[Span], *, delta: float, accountant: Accountant = "prv") -> float:
    """The epsilon of (epsilon, delta)-differential privacy that training has had. Changes nothing.

    Two data sets are neighbours if one has one example more than the other. Every step must have sampled each example
    independently of all others (:class:`PoissonSampler`), clipped each example's gradient to the clipping norm, and
    added the noise to the sum. Batches of a fixed size, or from a shuffled data set, are not covered.

    Args:
        spans: All steps of training, in any order.
        delta: Probability with which epsilon may not hold; below 1 / number of examples.
        accountant: ``prv`` is Opacus's PRVAccountant, tight, whose result is an upper bound (its error of 0.01 is added
            on). ``pld`` is dp_accounting's PLDAccountant, as tight, and also an upper bound. ``rdp`` is Opacus's
            RDPAccountant, looser, and quick for any number of spans.

    Returns:
        Epsilon; 0 if no step saw an example, infinity if a step that did had no noise.

    Raises:
        ConfigError: A value cannot be; or the extra ``privacy`` is missing; or epsilon is so large that ``prv`` or
            ``pld`` would need more memory than there may be.
    """
    _check(spans, delta, accountant)
    steps: dict[tuple[float, float], int] = {}
    for noise_multiplier, sample_rate, num_steps in spans:
        if num_steps > 0 and sample_rate > 0:
            key = float(noise_multiplier), float(sample_rate)
            steps[key] = steps.get(key, 0) + num_steps
    merged = [Span(*key, num_steps) for key, num_steps in steps.items()]
    if not merged:
        return 0.0
    if any(span.noise_multiplier == 0 for span in merged):
        return math.inf
    if accountant != "rdp":
        _check_size(merged, delta, accountant)
    spent = _by_dp_accounting(merged, delta) if accountant == "pld" else _by_opacus(merged, delta, accountant)
    return max(0.0, spent)


def _by_opacus(spans: Sequence[Span], delta: float, accountant: str) -> float:
    accountants = import_extra("opacus.accountants", f"Accountant {accountant}")
    counter = accountants.create_accountant(accountant)
    counter.history = [tuple(span) for span in spans]
    return float(counter.get_epsilon(delta=delta))


def _check_size(spans: Sequence[Span], delta: float, accountant: str) -> None:
    """See that a distribution of about twice the largest epsilon fits into memory.

    Source:
        Mesh size and delta_error of opacus.accountants.PRVAccountant (1.6.0).
    """
    loose = _by_opacus(spans, delta / 1000, "rdp")
    num_steps = sum(span.num_steps for span in spans)
    point = PLD_POINT if accountant == "pld" else 0.01 / math.sqrt(num_steps * math.log(12_000 / delta) / 2)
    if not 2 * (loose + 3) <= MAX_POINTS * point:
        raise ConfigError(
            f"Accountant {accountant}: epsilon may be {_by_opacus(spans, delta, 'rdp'):.0f}, for which it takes too "
            f"much memory; needs to be below {MAX_POINTS * point / 2:.0f}. There is next to no privacy: add noise, or "
            "take accountant='rdp'."
        )


def _by_dp_accounting(spans: Sequence[Span], delta: float) -> float:
    dp_accounting = import_extra("dp_accounting", "Accountant pld")
    counter = import_extra("dp_accounting.pld", "Accountant pld").PLDAccountant()
    for noise_multiplier, sample_rate, num_steps in spans:
        step = dp_accounting.GaussianDpEvent(noise_multiplier)
        if sample_rate < 1:
            step = dp_accounting.PoissonSampledDpEvent(sample_rate, step)
        counter.compose(step, num_steps)
    return float(counter.get_epsilon(delta))


def _check(spans: Sequence[Span], delta: float, accountant: str) -> None:
    known = get_args(Accountant)
    if accountant not in known:
        raise ConfigError(f"accountant is {accountant!r}, needs one of {', '.join(known)}. Name one of these.")
    if not 0 < delta < 1:
        raise ConfigError(f"delta is {delta}, needs to be above 0 and below 1. Take less than 1 / number of examples.")
    for noise_multiplier, sample_rate, num_steps in spans:
        if not 0 <= noise_multiplier < math.inf:
            raise ConfigError(f"noise_multiplier is {noise_multiplier}, needs to be 0 or more. Take 1.0 or so.")
        if not 0 <= sample_rate <= 1:
            raise ConfigError(
                f"sample_rate is {sample_rate}, needs to be from 0 to 1. Take batch size / number of examples."
            )
        if num_steps < 0 or num_steps != int(num_steps):
            raise ConfigError(f"num_steps is {num_steps}, needs to be a whole number from 0 on. Count the steps.")
