"""The one thread in which all models of a server compute: requests join and leave its running batches."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from eval.answering import Answerer
from eval.serving.inspected import Inside, InspectedRun
from eval.serving.metrics import Metrics
from model.decoding.engine import Engine
from model.decoding.scheduler import Completion, Request

Result = TypeVar("Result")


class Alternatives(NamedTuple):
    """A token's log-probability in the model's own distribution, and the likeliest tokens there with theirs."""

    log_prob: float
    top: list[tuple[int, float]]


class Token(NamedTuple):
    """One token of a reply. `finish`: stop or length with the last one, error where the worker failed, else empty."""

    id: int
    finish: str
    alternatives: Alternatives | None = None
    inside: Inside | None = None


@dataclass(eq=False)
class Job:
    """A request on its way.

    Args:
        top: how many alternatives each token has; None: none, and no log-probability.
        deliver: called in the worker's thread with each token.
    """

    model: str
    request: Request
    deliver: Callable[[Token], None]
    top: int | None = None
    inspect: bool = False
    running: Completion | InspectedRun | None = None
    begun: bool = False
    logits: Tensor | None = None

    def observe(self, logits: Tensor) -> None:
        """Keep what the next token is chosen from."""
        self.logits = logits

    def observed(self, token: int) -> Alternatives | None:
        """Return the alternatives to a token that was chosen, where they were asked for."""
        return None if self.logits is None else alternatives(self.logits[None], [token], self.top or 0)[0]


@dataclass
class Served:
    """A model being served: its answerer, its batch, and who is in it."""

    answerer: Answerer
    engine: Engine
    jobs: dict[Completion, Job] = field(default_factory=dict)
    inspected: list[Job] = field(default_factory=list)

    @property
    def context(self) -> int:
        return self.answerer.model.config.max_position_embeddings


class Worker(threading.Thread):
    """Steps the engines while any is busy, else waits.

    Args:
        slots: sequences of a model at a time. queue_size: requests that may wait for one; `submit` refuses more.
    """

    def __init__(self, answerers: dict[str, Answerer], slots: int, queue_size: int, metrics: Metrics) -> None:
        super().__init__(name="worker", daemon=True)
        self.models = {
            name: Served(answerer, Engine(answerer.model, slots, answerer.model.config.max_position_embeddings))
            for name, answerer in answerers.items()
        }
        self.slots, self.queue_size, self.metrics = slots, queue_size, metrics
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._unfinished: set[Job] = set()
        self.failure: BaseException | None = None

    def submit(self, jobs: list[Job]) -> bool:
        """Take jobs of one model, all or none; False where too many would wait. Safe in any thread, as is `cancel`."""
        with self._lock:
            begun = [job.begun for job in self._unfinished if jobs and job.model == jobs[0].model]
            waiting = begun.count(False)
            free = max(self.slots - begun.count(True), 0)
            if self.failure or waiting + len(jobs) > self.queue_size + free:
                return False
            self._unfinished.update(jobs)
        for job in jobs:
            self._inbox.put(lambda job=job: self._start(job))
        return True

    def cancel(self, job: Job) -> None:
        """Give a job up; its slot is free before the next step. Nothing happens when it is finished."""
        if job in self._unfinished:
            self._inbox.put(lambda: self._cancel(job))

    def call(self, function: Callable[[], Result]) -> Future[Result]:
        """Run a function between two steps."""
        future: Future[Result] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except Exception as error:
                    future.set_exception(error)

        self._inbox.put(run)
        return future

    def count(self) -> None:
        """Bring the gauges up to date."""
        with self._lock:
            waiting = sum(not job.begun for job in self._unfinished)
            self.metrics.waiting.set(waiting)
            self.metrics.running.set(len(self._unfinished) - waiting)

    def stop(self) -> None:
        """End the thread after its current step."""
        self._inbox.put(None)
        self.join()

    def run(self) -> None:
        try:
            while self._obey():
                for name, served in self.models.items():
                    self._step(name, served)
        except BaseException as error:  # whoever waits gets an error, and /health fails
            self.failure = error
            for job in list(self._unfinished):
                self._finish(job)
                job.deliver(Token(0, "error"))
            raise

    def _obey(self) -> bool:
        """Do what the other threads ask for; wait for it while there is nothing to compute. False: end."""
        busy = any(served.engine.busy or served.inspected for served in self.models.values())
        try:
            while True:
                order = self._inbox.get(block=not busy)
                if order is None:
                    return False
                order()
                busy = True
        except queue.Empty:
            return True

    def _start(self, job: Job) -> None:
        served, request = self.models[job.model], job.request
        if job.inspect:
            served.inspected.append(job)
        else:
            if job.top is not None:
                request = replace(request, observe=job.observe)
            job.running = served.engine.submit(request)
            served.jobs[job.running] = job

    def _step(self, name: str, served: Served) -> None:
        """Make one token more for each request of a model."""
        if served.engine.busy:
            events = served.engine.step()
            self.metrics.batch.labels(name).observe(len(events))
            for event in events:
                job = served.jobs[event.completion]
                if event.finish:
                    del served.jobs[event.completion]
                self._deliver(job, Token(event.token, event.finish, job.observed(event.token)))
        for job in served.inspected[: self.slots]:
            job.running = job.running or InspectedRun(served.answerer.model, job.request)
            token, finish, logits, inside = job.running.step()
            if inside.draft is not None:
                self.metrics.drafts.labels(name).inc()
                self.metrics.accepted.labels(name).inc(inside.draft == token)
            if finish:
                served.inspected.remove(job)
            found = alternatives(logits[None], [token], job.top or 0)[0]
            self._deliver(job, Token(token, finish, found, inside))

    def _deliver(self, job: Job, token: Token) -> None:
        self.metrics.made.labels(job.model).inc()
        job.begun = True
        if token.finish:
            self._finish(job)
        job.deliver(token)

    def _cancel(self, job: Job) -> None:
        served = self.models[job.model]
        if job in served.inspected:
            served.inspected.remove(job)
        elif isinstance(job.running, Completion):
            served.engine.cancel(job.running)
            served.jobs.pop(job.running, None)
        self._finish(job)

    def _finish(self, job: Job) -> None:
        with self._lock:
            self._unfinished.discard(job)


@torch.inference_mode()
def alternatives(logits_NV: Tensor, tokens: list[int], top: int) -> list[Alternatives]:
    """Compute the log-probabilities of N tokens in the model's own distributions, and of the `top` likeliest there."""
    log_probs = logits_NV.float().log_softmax(-1)
    best, places = log_probs.topk(min(top, log_probs.shape[-1]))
    chosen = log_probs.gather(1, torch.tensor(tokens, device=log_probs.device).unsqueeze(1)).squeeze(1)
    rows = zip(chosen.tolist(), places.tolist(), best.tolist(), strict=True)
    return [Alternatives(log_prob, list(zip(*top, strict=True))) for log_prob, *top in rows]


@torch.inference_mode()
def score_prompt(answerer: Answerer, ids: list[int], top: int) -> list[Alternatives]:
    """Compute the same for each token of a prompt but the first."""
    logits = answerer.model(torch.tensor([ids], device=answerer.device)).logits[0]
    return alternatives(logits[:-1], ids[1:], top)
