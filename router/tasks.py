"""Coroutines run together: all to their end, or one for all who want the same."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Hashable, Iterable
from typing import Any, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


async def all_of(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Awaits every call to its end, then raises the first error or returns the results."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]


async def shared(tasks: dict[K, asyncio.Task[T]], key: K, work: Coroutine[Any, Any, T]) -> T:
    """Awaits the task for `key`, started with `work` if there is none; survives its waiters."""
    task = tasks.get(key)
    if task is not None:
        work.close()
    else:
        task = tasks[key] = asyncio.create_task(work)

        def forget(done: asyncio.Task[T]) -> None:
            del tasks[key]
            if not done.cancelled():
                done.exception()  # seen, even if every waiter has gone

        task.add_done_callback(forget)
    return await asyncio.shield(task)
