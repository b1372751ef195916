# SPDX-License-Identifier: BSD-3-Clause
"""Judges a case: ours alone where it passes, else beside stock."""

import time

from .case import Case, Contender, RankReport, Result, Verdict
from .ranks import run_ranks

__all__ = ["first_error", "judge"]


def first_error(reports: list[RankReport]) -> RankReport | None:
    """The error that came first; the other ranks' are mostly lost connections."""
    failed = [report for report in reports if report.error is not None]
    return min(failed, key=lambda report: report.end_time_s, default=None)


def judge(case: Case, timeout_s: float, has_controls: bool = True) -> Result:
    """Run a case; again with broken scratchpads where it passes, and with stock where it does not.

    Args:
        case: What to run.
        timeout_s: For each run; a run that takes longer has failed.
        has_controls: Whether to run it with broken scratchpads.

    Returns:
        The verdict with its reason.
    """
    start_s = time.monotonic()
    reports = run_ranks(case, Contender.SCRATCHPAD, timeout_s)
    victims = sum(report.num_victims for report in reports)
    error = first_error(reports)
    verdict, reason, stock_error, num_controls = Verdict.PASSED, "", None, 0
    if error is not None and error.is_refusal and case.may_refuse:
        verdict, reason = Verdict.REFUSED, error.error or ""
    elif error is not None:
        reason = error.error or ""
        stock = first_error(run_ranks(case, Contender.STOCK, timeout_s))
        stock_error = stock.error if stock is not None else None
        verdict = Verdict.FAILED if stock is None else Verdict.STOCK_FAILS
    elif sum(report.num_misses_at_train for report in reports):
        verdict, reason = Verdict.FAILED, "rows were missing at Train"
    elif case.must_evict and victims == 0:
        verdict, reason = Verdict.FAILED, "no row was evicted, so nothing was shown"
    elif has_controls:
        controls = _controls(case)
        unnoticed = [each.value for each in controls if first_error(run_ranks(case, each, timeout_s)) is None]
        num_controls = len(controls) - len(unnoticed)
        if unnoticed:
            verdict, reason = Verdict.FAILED, f"passes with {' and with '.join(unnoticed)}, so nothing was shown"
    return Result(case.name, verdict, reason, victims, time.monotonic() - start_s, stock_error, num_controls)


def _controls(case: Case) -> list[Contender]:
    """Broken scratchpads that the case must notice."""
    if not (case.must_evict and case.can_tell):
        return []
    if case.optimizer.endswith("adagrad"):
        return [Contender.NO_WRITEBACK, Contender.NO_STATE]
    return [Contender.NO_WRITEBACK]
