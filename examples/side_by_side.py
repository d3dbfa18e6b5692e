"""Many trainings, as many at a time as there are workers: each in a process of its own, on its share of the cores."""

import contextlib
import multiprocessing
import os
import queue
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import threadpoolctl
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Report = Callable[[int, str], None]  # (steps done, what is being done), from the training's process


def train_all(work: Callable[..., Any], jobs: Mapping[Any, tuple[Any, ...]], steps: int, workers: int,
              done: Callable[[Any, Any], None]) -> None:  # fmt: skip
    """Call `work(report, *arguments)` for each job, and `done(job, result)` as soon as one has ended.

    What one training raises is raised when the others have ended: nothing that they found is lost.
    """
    threads = max(1, (os.cpu_count() or 1) // workers)
    spawn = multiprocessing.get_context("spawn")
    with spawn.Manager() as manager, ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        messages = manager.Queue()
        futures = {pool.submit(_reporting, work, messages, job, arguments, threads): job for job, arguments in jobs.items()}
        errors = _show(futures, steps, messages, done)
    if errors:
        raise errors[0]


def _reporting(work: Callable[..., Any], messages: Any, job: Any, arguments: tuple[Any, ...], threads: int) -> Any:
    torch.set_num_threads(threads)
    with threadpoolctl.threadpool_limits(threads):  # scikit-learn's
        return work(lambda step, state="": messages.put((job, step, state)), *arguments)


def _show(futures: dict[Future[Any], Any], steps: int, messages: Any, done: Callable[[Any, Any], None]) -> list[BaseException]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("{task.fields[state]}"))  # fmt: skip
    errors: list[BaseException] = []
    with Progress(*columns) as progress:
        whole = progress.add_task("all runs", total=len(futures), state="")
        bars = {job: progress.add_task(str(job), total=steps, state="", visible=False) for job in futures.values()}
        while futures:
            with contextlib.suppress(queue.Empty):
                job, step, state = messages.get(timeout=0.2)
                progress.update(bars[job], completed=step, state=state, visible=job in futures.values())
            for future in [future for future in futures if future.done()]:
                job = futures.pop(future)
                progress.update(bars[job], visible=False)
                progress.advance(whole)
                if error := future.exception():
                    errors.append(error)
                else:
                    done(job, future.result())
    return errors
