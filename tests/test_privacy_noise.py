# SPDX-License-Identifier: BSD-3-Clause
"""The noise of private training is normal, of the right variance, and no draw is used twice."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Setting, Trainer, drain, full_state, make_batches
from scipy import stats
from torch import Tensor

from torchrec_scratchpipe import LazyDP
from torchrec_scratchpipe.privacy import delayed_noise, random_numbers
from torchrec_scratchpipe.privacy.delayed_noise import DelayedNoise, NoiseOf, NormalNoise, Places, Steps
from torchrec_scratchpipe.privacy.random_numbers import normal_numbers, philox

SCALE, SEED, DIM = 0.7, 2**63 + 11, 32
LEAST_P = 1e-3  # seeds are fixed, so that a test that passes once passes always


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers_of_philox(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    counters = [torch.full((3, 5), word, dtype=torch.int64) for word in counter]
    words = philox(counters, key[0] | key[1] << 32)
    assert [set(word.flatten().tolist()) for word in words] == [{word} for word in expected]
    assert [set(each.flatten().tolist()) for each in counters] == [{word} for word in counter]  # left as they were


def places_of(num_rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, tables, steps and first columns, all mixed."""
    generator = torch.Generator().manual_seed(0)
    limits = ((2**32, 1), (2**32, 1), (2**31, 1), (16, 4))
    rows, tables, steps, columns = (
        times * torch.randint(0, limit, (num_rows,), generator=generator) for limit, times in limits
    )
    return rows, tables, steps, columns


@pytest.mark.parametrize("dim", [1, 3, 4, 30, 32, 128])
def test_a_row_has_its_numbers_whatever_the_others(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    places = places_of(150)
    expected = normal_numbers(*places, dim, SEED)
    assert expected.shape == (150, dim)
    for first, last in [(0, 1), (1, 2), (7, 20), (149, 150), (3, 140), (5, 5)]:
        assert torch.equal(normal_numbers(*(place[first:last] for place in places), dim, SEED), expected[first:last])
    order = torch.randperm(150, generator=torch.Generator().manual_seed(1))
    assert torch.equal(normal_numbers(*(place[order] for place in places), dim, SEED), expected[order])
    assert torch.equal(normal_numbers(*places, 2 * dim, SEED)[:, :dim], expected)
    for size in (1, 5, 37, 1000):
        monkeypatch.setattr(random_numbers, "CHUNK_COUNTERS", size)
        assert torch.equal(normal_numbers(*places, dim, SEED), expected)


def test_a_column_has_its_numbers_whatever_the_shard() -> None:
    rows, tables, steps, columns = places_of(50)
    whole = normal_numbers(rows, tables, steps, torch.zeros_like(columns), 64, SEED)
    for first in (0, 4, 24, 32):
        shard = normal_numbers(rows, tables, steps, torch.full_like(columns, first), 32, SEED)
        assert torch.equal(shard, whole[:, first : first + 32])


def test_numbers_do_not_depend_on_the_number_of_threads() -> None:
    places = places_of(20_000)  # torch divides from 32,768 elements on
    expected = normal_numbers(*places, DIM, SEED)
    num_threads = torch.get_num_threads()
    try:
        for number in (2, 3):
            torch.set_num_threads(number)
            assert torch.equal(normal_numbers(*places, DIM, SEED), expected)
    finally:
        torch.set_num_threads(num_threads)


def test_each_seed_row_table_step_and_column_counts() -> None:
    word = torch.tensor([5], dtype=torch.int64)
    seen = [normal_numbers(*([word] * 3), word - 1, 8, SEED)]
    for index in range(4):
        for change in (4, 2**31):
            changed = [word, word, word, word - 1]
            changed[index] = changed[index] + change
            seen.append(normal_numbers(*changed, 8, SEED))
    seen += [normal_numbers(word, word, word, word - 1, 8, seed) for seed in (SEED + 1, SEED - 2**63, 0)]
    numbers = torch.cat(seen).flatten()
    # Columns 4 to 7 from 4 on are columns 0 to 3 from 8 on: the same columns.
    assert numbers.unique().numel() == numbers.numel() - 4


def delayed(num_rows: int, noise: NoiseOf, steps: Steps, num_tables: int = 1) -> DelayedNoise:
    offsets = [num_rows * table for table in range(num_tables + 1)]
    zeros = [0] * num_tables
    device = torch.device("cpu")
    return DelayedNoise(offsets, list(range(num_tables)), zeros, zeros, DIM, device, steps, noise, lambda: True)


def rate_of(step: int) -> float:
    """A learning rate that changes much."""
    return 0.02 * (1 + step % 7) * (0.25 if step % 3 else 2.0)


def run_steps(steps: Steps, number: int) -> float:
    """Take steps; returns the sum of their squared rates."""
    rates = [rate_of(step) for step in range(steps.num_steps, steps.num_steps + number)]
    for rate in rates:
        steps.end(rate)
    return sum(rate**2 for rate in rates)


def take(noise: DelayedNoise, rows: Tensor) -> Tensor:
    due = noise.take(rows)
    assert due is not None
    return due


def assert_normal(numbers: Tensor, deviation: float) -> None:
    """They have the normal distribution of this standard deviation."""
    values = numbers.double().flatten().numpy() / deviation
    result = stats.kstest(values, "norm")
    assert result.pvalue > LEAST_P, f"{values.size} numbers: D = {result.statistic:.5f}, p = {result.pvalue:.2e}"
    # What lies beyond 4.5 standard deviations is too little to be seen by its distance.
    expected = 2 * stats.norm.sf(4.5) * values.size
    assert abs((np.abs(values) > 4.5).sum() - expected) < 4 * max(1, expected**0.5)


class WithoutRoot(NormalNoise):
    """Noise of which the variance is taken for the standard deviation."""

    def __call__(self, places: Places, since: Tensor, until: int, dim: int, squared_rates: Tensor) -> Tensor:
        return super().__call__(places, since, until, dim, squared_rates.square())


class OfLastRate(NormalNoise):
    """Noise as if all steps had had the rate of the last one."""

    def __call__(self, places: Places, since: Tensor, until: int, dim: int, squared_rates: Tensor) -> Tensor:
        last = squared_rates[-1] - squared_rates[-2]
        return super().__call__(places, since, until, dim, last * torch.arange(until + 1, dtype=torch.float64))


def check_interval(make_noise: Callable[[float, int], NoiseOf], length: int, num_rows: int = 31_250) -> None:
    steps = Steps()
    noise = delayed(num_rows, make_noise(SCALE, SEED), steps)
    rows = torch.arange(num_rows, dtype=torch.int64)
    run_steps(steps, 5)
    take(noise, rows)
    squares = run_steps(steps, length)
    numbers = take(noise, rows)
    assert numbers.numel() == num_rows * DIM
    assert_normal(numbers, SCALE * squares**0.5)


@pytest.mark.parametrize("length", [1, 7, 1000])
def test_a_million_draws_of_an_interval_are_normal(length: int) -> None:
    check_interval(NormalNoise, length)
    with pytest.raises(AssertionError, match="p = "):
        check_interval(WithoutRoot, length)
    if length > 1:
        with pytest.raises(AssertionError, match="p = "):
            check_interval(OfLastRate, length)


def test_rows_of_many_intervals_at_once_are_normal() -> None:
    """Rows have waited for 1 to 40 steps, some for none, and each gets its own variance."""
    steps = Steps()
    noise = delayed(40_000, NormalNoise(SCALE, SEED), steps)
    sums = [0.0]
    for step in range(40):
        noise.updated_to[step * 1000 : (step + 1) * 1000] = step
        sums.append(sums[-1] + run_steps(steps, 1))
    rows = torch.randperm(40_000, generator=torch.Generator().manual_seed(0))[:35_000]
    take(noise, rows[:3000])
    numbers = take(noise, rows)
    assert not numbers[:3000].any()
    deviations = torch.tensor([SCALE * (sums[-1] - sums[int(row) // 1000]) ** 0.5 for row in rows], dtype=torch.float64)
    assert_normal((numbers / deviations[:, None])[3000:], 1.0)


def correlations(numbers: Tensor) -> dict[str, float]:
    """Of neighbours, and of their squares, along each dimension; in standard deviations of what chance gives."""
    names = ("step", "table", "row", "column")
    found = {}
    for axis, name in enumerate(names):
        for distance in (1, 2, 3, 4):
            if numbers.shape[axis] <= distance:
                continue
            left = numbers.narrow(axis, 0, numbers.shape[axis] - distance).double().flatten()
            right = numbers.narrow(axis, distance, numbers.shape[axis] - distance).double().flatten()
            for kind, one, other in (("", left, right), (", squared", left.square() - 1, right.square() - 1)):
                product = float((one * other).mean()) / float(one.std() * other.std())
                found[f"{name} +{distance}{kind}"] = product * one.numel() ** 0.5
    return found


def numbers_of_grid(noise: NoiseOf) -> Tensor:
    """[steps, tables, rows, DIM], each of one step, in units of its standard deviation."""
    num_rows, num_tables, num_steps = 300, 5, 8
    steps = Steps()
    pool = delayed(num_rows, noise, steps, num_tables)
    rows = torch.arange(num_rows * num_tables, dtype=torch.int64)
    numbers = []
    for _ in range(num_steps):
        deviation = SCALE * run_steps(steps, 1) ** 0.5
        numbers.append(take(pool, rows).view(num_tables, num_rows, DIM) / deviation)
    return torch.stack(numbers)


class WithoutTable(NormalNoise):
    """Noise that is the same for row r of every table."""

    def __call__(self, places: Places, since: Tensor, until: int, dim: int, squared_rates: Tensor) -> Tensor:
        alike = places._replace(tables=torch.zeros_like(places.tables))
        return super().__call__(alike, since, until, dim, squared_rates)


class WithoutStep(NormalNoise):
    """Noise that is the same in every step."""

    def __call__(self, places: Places, since: Tensor, until: int, dim: int, squared_rates: Tensor) -> Tensor:
        rate = squared_rates[until] - squared_rates[since]
        return super().__call__(places, torch.zeros_like(since), 1, dim, torch.stack([rate[0] * 0, rate[0]]))


def test_neighbours_have_nothing_in_common() -> None:
    found = correlations(numbers_of_grid(NormalNoise(SCALE, SEED)))
    assert len(found) == 32
    assert max(map(abs, found.values())) < 4.5, found
    for wrong, name in ((WithoutTable, "table"), (WithoutStep, "step")):
        found = correlations(numbers_of_grid(wrong(SCALE, SEED)))
        assert {key.split()[0] for key, value in found.items() if abs(value) > 100} == {name}


SETTING = Setting(
    num_rows=(20_000, 3000, 9),
    optimizer=torch.optim.SGD,
    optimizer_kwargs=(("lr", 0.25),),
    batch_size=8,
    num_batches=25,
    load_factor=0.05,
)
PRIVACY = LazyDP(clip=0.5, noise_multiplier=0.8, sample_rate=0.01, seed=SEED, expected_batch_size=8)


def used_rows(batches: list[Any], feature: str) -> Tensor:
    return torch.cat([batch.sparse_features[feature].values() for batch in batches]).unique()


def train_at_changing_rates(num_steps: int) -> tuple[dict[str, Tensor], list[Any]]:
    """By how much the tables' weights have changed in private training, and the batches."""
    batches = make_batches(SETTING, num_batches=num_steps)
    trainer = Trainer.scratchpipe(SETTING)
    start = full_state(trainer)
    pipeline = trainer.pipeline(lookahead=3, privacy=PRIVACY)
    steps = itertools.count(1)

    def set_rate(_: object = None) -> None:
        step = next(steps)
        for group in trainer.model.fused_optimizer.param_groups:
            group["lr"] = rate_of(step)

    set_rate()
    pipeline.register_progress_hook(set_rate)
    drain(pipeline, batches)
    end = full_state(trainer)
    return {name: end[name][0] - start[name][0] for name in start if ".t" in name}, batches


def check_unused_rows(num_steps: int) -> None:
    changes, batches = train_at_changing_rates(num_steps)
    squares = sum(rate_of(step) ** 2 for step in range(1, num_steps + 1))
    numbers = []
    for name, change in changes.items():
        is_unused = torch.ones(change.shape[0], dtype=torch.bool)
        is_unused[used_rows(batches, name.split(".")[-2].replace("t", "f"))] = False
        numbers.append(change[is_unused].flatten())
    unused = torch.cat(numbers)
    assert unused.numel() > 150_000
    assert_normal(unused, PRIVACY.noise_multiplier * PRIVACY.clip / 8 * squares**0.5)


def test_rows_that_are_never_used_have_the_variance_of_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    check_unused_rows(24)
    end = Steps.end
    with monkeypatch.context() as patch:
        patch.setattr(Steps, "end", lambda steps, rate: end(steps, rate_of(1)))
        with pytest.raises(AssertionError, match="p = "):
            check_unused_rows(24)
    with monkeypatch.context() as patch:
        # The last step's noise is left out.
        patch.setattr(Steps, "end", lambda steps, rate: end(steps, rate * (steps.num_steps < 23)))
        with pytest.raises(AssertionError, match="p = "):
            check_unused_rows(24)


@dataclass(frozen=True)
class NotedDP(LazyDP):
    """Notes what is drawn: table, row, first column, since and until of each."""

    drawn: list[Tensor] = field(default_factory=list, compare=False)

    def noise(self, batch_size: float) -> NoiseOf:
        draw = super().noise(batch_size)

        def noted(places: Places, since: Tensor, until: int, dim: int, squared_rates: Tensor) -> Tensor:
            ends = torch.full_like(since, until)
            self.drawn.append(torch.stack([places.tables, places.rows, places.first_columns, since, ends], dim=1))
            return draw(places, since, until, dim, squared_rates)

        return noted


def check_intervals(setting: Setting) -> None:
    """Each row gets the noise of each step once, whoever looks at it in between, and no draw is used twice."""
    privacy = NotedDP(clip=0.5, noise_multiplier=0.8, sample_rate=0.01, seed=SEED)
    trainer = Trainer.scratchpipe(setting)
    pipeline = trainer.pipeline(lookahead=3, privacy=privacy)
    batches = make_batches(setting)
    drain(pipeline, batches[:10])
    trainer.model.state_dict()
    with torch.no_grad():
        trainer.model.eval()
        trainer.model(batches[-1])
        drain(pipeline, batches[-3:])
        trainer.model.train()
    drain(pipeline, batches[10:])
    assert trainer.num_victims > 0
    trainer.model.state_dict()
    trainer.model.state_dict()
    drawn = torch.cat(privacy.drawn)
    keys = drawn[:, [0, 1, 2, 4]]
    assert keys.unique(dim=0).shape == keys.shape, "a draw is used twice"
    rows, counts = drawn[:, :3].unique(dim=0, return_inverse=True)
    lengths = torch.zeros(rows.shape[0], dtype=torch.int64).index_add_(0, counts, drawn[:, 4] - drawn[:, 3])
    num_shards = 2 if setting.sharding_type == "column_wise" else 1
    assert rows.shape[0] == num_shards * sum(setting.num_rows)
    assert lengths.unique().tolist() == [len(batches)], "a row has the noise of a step twice, or not at all"


@pytest.mark.parametrize("sharding", ["table_wise", "column_wise"])
@pytest.mark.usefixtures("process_group")
def test_no_draw_is_used_twice(sharding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = replace(SETTING, num_rows=(300, 300, 9), load_factor=0.3, sharding_type=sharding)
    if sharding == "column_wise":
        setting = replace(setting, min_partition=4)
    check_intervals(setting)
    take_of = DelayedNoise.take

    def take_again(noise: DelayedNoise, rows: Tensor) -> Tensor | None:
        before = noise.updated_to[rows]
        due = take_of(noise, rows)
        noise.updated_to[rows] = before
        return due

    monkeypatch.setattr(DelayedNoise, "take", take_again)
    with pytest.raises(AssertionError, match="has the noise of a step twice"):
        check_intervals(setting)
    monkeypatch.setattr(DelayedNoise, "note_all_taken", lambda _noise: None)
    with pytest.raises(AssertionError, match="a draw is used twice"):
        check_intervals(setting)


@pytest.mark.usefixtures("process_group")
def test_dense_layers_have_draws_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchrec_scratchpipe.privacy import training

    keys: list[Tensor] = []

    def noted(rows: Tensor, tables: Tensor, steps: Tensor, columns: Tensor, *args: Any) -> Tensor:
        keys.append(torch.stack([rows, tables, steps, columns], dim=1))
        return normal_numbers(rows, tables, steps, columns, *args)

    for module in (training, delayed_noise):
        monkeypatch.setattr(module, "normal_numbers", noted)
    trainer = Trainer.scratchpipe(replace(SETTING, num_rows=(300, 300, 9), load_factor=0.3))
    drain(trainer.pipeline(privacy=PRIVACY), make_batches(trainer.setting))
    trainer.model.state_dict()
    drawn = torch.cat(keys)
    assert drawn.unique(dim=0).shape == drawn.shape
    num_dense = int((drawn[:, 1] >= 2**31).sum())
    assert num_dense == 2 * 25  # weight and bias, each in every step
