"""Many trainings at a time, each in a process of its own, on its part of the cores."""

import contextlib
import multiprocessing
import os
import queue
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, Generic, TypeVar

import threadpoolctl
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Job = TypeVar("Job", bound=Hashable)
Result = TypeVar("Result")
Report = Callable[[int, str], None]  # (steps done, what is being done), from the training's process
Messages = Any  # a queue between processes


def train_all(
    work: Callable[..., Result],
    jobs: Mapping[Job, tuple[Any, ...]],
    steps: int,
    workers: int,
    done: Callable[[Job, Result], None],
) -> None:
    """Call `work(report, *arguments)` for each job, and `done(job, result)` when one has ended.

    What a training raises is raised when the others have ended: none of their results is lost.
    """
    threads = max(1, (os.cpu_count() or 1) // workers)
    spawn = multiprocessing.get_context("spawn")
    with spawn.Manager() as manager, ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        messages = manager.Queue()
        futures = {
            pool.submit(run_reporting, work, messages, job, arguments, threads): job
            for job, arguments in jobs.items()
        }
        errors = collect(futures, Bars(steps, list(jobs)), messages, done)
    if errors:
        raise errors[0]


def run_reporting(
    work: Callable[..., Result],
    messages: Messages,
    job: Job,
    arguments: tuple[Any, ...],
    threads: int,
) -> Result:
    """One training, in its process."""

    def report(step: int, state: str = "") -> None:
        messages.put((job, step, state))

    torch.set_num_threads(threads)
    with threadpoolctl.threadpool_limits(threads):  # scikit-learn's
        return work(report, *arguments)


def collect(
    futures: dict[Future[Result], Job],
    bars: "Bars[Job]",
    messages: Messages,
    done: Callable[[Job, Result], None],
) -> list[BaseException]:
    """Wait for all trainings and hand on what each found. Returns what they raised."""
    errors: list[BaseException] = []
    running = dict(futures)
    with bars.progress:
        while running:
            with contextlib.suppress(queue.Empty):
                job, step, state = messages.get(timeout=0.2)
                if job in running.values():
                    bars.show(job, step, state)
            ended = [future for future in running if future.done()]
            for future in ended:
                job = running.pop(future)
                bars.end(job)
                if error := future.exception():
                    errors.append(error)
                else:
                    done(job, future.result())
    return errors


class Bars(Generic[Job]):
    """A bar for all trainings, and one for each that runs."""

    def __init__(self, steps: int, jobs: list[Job]) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[state]}"),
        )
        self.all_runs = self.progress.add_task("all runs", total=len(jobs), state="")
        self.bars = {
            job: self.progress.add_task(str(job), total=steps, state="", visible=False)
            for job in jobs
        }

    def show(self, job: Job, step: int, state: str) -> None:
        self.progress.update(self.bars[job], completed=step, state=state, visible=True)

    def end(self, job: Job) -> None:
        self.progress.update(self.bars[job], visible=False)
        self.progress.advance(self.all_runs)
