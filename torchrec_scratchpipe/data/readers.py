# SPDX-License-Identifier: BSD-3-Clause
"""Threads that work ahead, and results in order."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


def in_order(work: Callable[[Task], Result], tasks: Iterable[Task], num_readers: int) -> Generator[Result, None, None]:
    """Do tasks on threads; give their results in the order of the tasks.

    At most `num_readers` results exist ahead of the one that was given last. The threads end when the iterator is
    exhausted, closed or dropped. An error of a task is raised in the place of its result.

    Args:
        work: Does one task.
        tasks: What to do, in order.
        num_readers: Threads.

    Yields:
        Results.
    """
    left = iter(tasks)
    ahead: deque[Future[Result]] = deque()
    threads = ThreadPoolExecutor(num_readers, thread_name_prefix="parquet_reader")
    try:
        for _, task in zip(range(num_readers), left, strict=False):
            ahead.append(threads.submit(work, task))
        while ahead:
            yield _next_result(ahead, threads, work, left)
    finally:
        threads.shutdown(wait=True, cancel_futures=True)


def _next_result(
    ahead: deque[Future[Result]], threads: ThreadPoolExecutor, work: Callable[[Task], Result], left: Iterator[Task]
) -> Result:
    """A function of its own, so that nothing but its caller holds the result."""
    result = ahead.popleft().result()
    for task in left:
        ahead.append(threads.submit(work, task))
        break
    return result
