# SPDX-License-Identifier: BSD-3-Clause
"""A few of TorchRec's own tests with the scratchpad, and that the harness notices what it is there to notice."""

import pytest

from .case import Case, Contender, Verdict
from .cases import CASES, QUICK
from .ranks import prepare, run_ranks
from .verdict import first_error, judge

TIMEOUT_S = 60.0
BY_NAME = {case.name: case for case in CASES}
pytestmark = pytest.mark.dist


@pytest.fixture(scope="module", autouse=True)
def fork_server() -> None:
    prepare()


@pytest.mark.parametrize("name", QUICK)
def test_case_passes_and_evicts(name: str) -> None:
    result = judge(BY_NAME[name], TIMEOUT_S, has_controls=False)
    assert result.verdict is Verdict.PASSED, result.reason
    assert result.num_victims > 0


@pytest.mark.parametrize(
    ("name", "contender"),
    [
        ("tw-2ranks-fused_sgd-sum", Contender.NO_WRITEBACK),
        ("rw-2ranks-rowwise_adagrad-mean", Contender.NO_STATE),
        ("tw-1rank-load_state_dict-trained-from_stock", Contender.NO_WRITEBACK),
    ],
)
def test_case_fails_with_a_broken_scratchpad(name: str, contender: Contender) -> None:
    error = first_error(run_ranks(BY_NAME[name], contender, TIMEOUT_S))
    assert error is not None
    assert error.error_type == "AssertionError"
    assert "not close" in (error.error or "") or "not equal" in (error.error or "")


def test_case_that_a_broken_scratchpad_passes_has_failed() -> None:
    no_training = BY_NAME["tw-1rank-numerical_equivalence-fresh"]
    assert judge(no_training, TIMEOUT_S).verdict is Verdict.PASSED
    result = judge(Case(**{**vars(no_training), "can_tell": True}), TIMEOUT_S)
    assert result.verdict is Verdict.FAILED
    assert "forgets its victims" in result.reason


def test_case_without_evictions_has_failed() -> None:
    one_batch = BY_NAME["tw-1rank-params_and_buffers"]
    result = judge(Case(**{**vars(one_batch), "must_evict": True}), TIMEOUT_S)
    assert result.verdict is Verdict.FAILED
    assert "no row was evicted" in result.reason


def test_failure_of_stock_is_established_by_running_it() -> None:
    result = judge(BY_NAME["rw-2ranks-variable_batch_size"], TIMEOUT_S)
    assert result.verdict is Verdict.STOCK_FAILS
    assert "invalid tensor size" in (result.stock_error or "")


def test_refusal_counts_only_where_it_is_expected() -> None:
    refused = BY_NAME["grid-1rank-vbe-mean"]
    assert judge(refused, TIMEOUT_S).verdict is Verdict.REFUSED
    error = first_error(run_ranks(refused, Contender.SCRATCHPAD, TIMEOUT_S))
    assert error is not None
    assert error.is_refusal


def test_hanging_case_is_killed_and_has_a_reason() -> None:
    reports = run_ranks(BY_NAME["tw-2ranks-fused_sgd-sum"], Contender.SCRATCHPAD, timeout_s=0.05)
    assert all("still running after" in (report.error or "") for report in reports)


def test_names_are_unique_and_quick_ones_exist() -> None:
    assert len(CASES) == len(BY_NAME)
    assert set(QUICK) <= set(BY_NAME)
