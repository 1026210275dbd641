"""Answers requests as they come, many at a time (design: serving.md 2).

One thread owns the device. It puts a waiting prompt into a free slot as soon as there is one, and
otherwise writes tokens in all busy slots. Prompts are read and images decoded by other threads,
before a prompt counts as waiting.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.monitoring
import numpy as np
from jax.sharding import Mesh

from internvlx_jax.core.errors import ConfigError, SampleError
from internvlx_jax.core.generation_config import Sampling
from internvlx_jax.data.batch import Row
from internvlx_jax.data.buckets import Bucket
from internvlx_jax.data.processor import Processor
from internvlx_jax.inference.batch_generator import AnswerReader, settled
from internvlx_jax.inference.batches import PromptBuilder
from internvlx_jax.inference.requests import Answer, GenerationSpec, Request
from internvlx_jax.inference.serving_buckets import ServingBuckets
from internvlx_jax.models.internvlx import InternVLX
from internvlx_jax.models.serving_slots import (
    Slots,
    admit,
    decode,
    empty_slots,
    one_row,
    slot_shardings,
)
from internvlx_jax.models.sharding import data_parallel_size

log = logging.getLogger(__name__)

# Tokens that a dispatch writes at most, and how long it should take: a prompt that arrives
# meanwhile waits for its end.
MOST_STEPS = 16
DISPATCH_SECONDS = 0.04
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class QueueFull(Exception):
    """So many requests wait already that another one is refused."""


class Closed(Exception):
    """The engine takes no more requests."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of an answer.

    Attributes:
        text: what was written since the last piece; joined they are the answer's text.
        answer: the whole answer, with the last piece.
        fault: whether the engine failed at this request; then it is the last piece, without an
            answer.
    """

    text: str
    answer: Answer | None = None
    fault: bool = False

    @property
    def is_last(self) -> bool:
        """Whether the request ends here."""
        return self.fault or self.answer is not None


@dataclasses.dataclass(eq=False)
class Ticket:
    """One request on its way through the engine.

    Attributes:
        request: what is asked.
        spec: how.
        deliver: receives each piece, in the engine's thread.
        cancelled: whether nobody waits for it any more.
        row: the prompt, once it is read.
        bucket: its shape.
        ids: tokens of the answer so far.
        shown: length of the text that was delivered.
    """

    request: Request
    spec: GenerationSpec
    deliver: Callable[[Piece], None]
    cancelled: bool = False
    row: Row | None = None
    bucket: Bucket | None = None
    ids: list[int] = dataclasses.field(default_factory=list)
    shown: int = 0


@dataclasses.dataclass(frozen=True)
class EngineState:
    """Counts of an engine at one moment.

    Attributes:
        slots: rows of the running batch.
        busy: rows in the middle of an answer.
        waiting: requests without a slot, those included whose images are being read.
        answered: requests that ended with an answer.
        cancelled: requests that nobody waited for any more.
        failed: requests that ended with an error.
        prompt_tokens: tokens of all prompts that got a slot.
        new_tokens: tokens of all answers.
        compiles: programs compiled since the engine is ready; 0 unless there is a fault.
    """

    slots: int
    busy: int
    waiting: int
    answered: int
    cancelled: int
    failed: int
    prompt_tokens: int
    new_tokens: int
    compiles: int


class Engine:
    """Runs one model for many requests that come and go.

    Args:
        model: model in its decoding layout (`for_decoding`), whose parameters lie on `mesh`.
        processor: how the model reads prompts.
        mesh: devices; they may share heads and layers' widths, but not rows.
        slots: requests that are answered at a time.
        capacity: tokens of prompt and answer that a slot holds; None: as many as the decoder has
            positions, but at most 8192.
        max_tiles: most tiles of a request, thumbnails included.
        waiting: most requests that wait for a slot.

    Raises:
        ConfigError: the mesh divides rows, or a number is out of its range.
    """

    def __init__(
        self,
        model: InternVLX,
        processor: Processor,
        mesh: Mesh,
        *,
        slots: int = 8,
        capacity: int | None = None,
        max_tiles: int | None = None,
        waiting: int = 64,
    ):
        if data_parallel_size(mesh) > 1 or jax.process_count() > 1:
            raise ConfigError(
                "a server answers on the devices of one process that share no rows; set mesh.data "
                "and mesh.fsdp to 1, or start one server for each part of the devices"
            )
        self.model = model
        self.buckets = ServingBuckets.of(processor, model.config.decoder.rope, capacity, max_tiles)
        self.slots, self.most_waiting = slots, waiting
        self.prompts = PromptBuilder(processor, model.config.decoder.rope)
        self.reader = AnswerReader(processor.tokenizer, processor.template)
        vocabulary = self.reader.vocabulary
        empty = functools.partial(empty_slots, slots=slots, capacity=self.buckets.capacity)
        # Fixed, so that the state looks the same to every program, whichever made it.
        shardings = slot_shardings(jax.eval_shape(empty, self.model), mesh)
        jit = functools.partial(jax.jit, donate_argnums=1, out_shardings=(shardings, None))
        self._admit = jit(functools.partial(admit, vocabulary=vocabulary))
        self._decode = jit(functools.partial(decode, most=MOST_STEPS, vocabulary=vocabulary))
        self._empty = jax.jit(empty, out_shardings=shardings)
        self._state: Slots = self._empty(self.model)
        self._step_seconds = DISPATCH_SECONDS
        self._busy: dict[int, Ticket] = {}
        self._ready: deque[Ticket] = deque()
        self._pending = 0  # tickets that have no slot yet
        self._changed = threading.Condition()
        self._closing = False
        names = ("answered", "cancelled", "failed", "prompt_tokens", "new_tokens")
        self._counts: dict[str, int] = {name: 0 for name in names}
        self._compiles = 0
        self._readers = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="prompt")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Compiles every program that requests can need, and begins to answer."""
        begun = time.perf_counter()
        log.info("compiling %d programs: %s", len(self.buckets.all) + 1, self.buckets.described())
        for bucket in self.buckets.all:
            inputs = self.prompts.inputs([self.buckets.probe(bucket)], bucket)
            how = one_row(Sampling(), seed=0, number=0)
            self._state, _ = self._admit(
                self.model, self._state, inputs, np.int32(0), np.int32(2), how
            )
        self._advance(1)
        self._state = self._empty(self.model)
        jax.monitoring.register_event_duration_secs_listener(self._hear)
        log.info("ready after %.1f s", time.perf_counter() - begun)
        self._thread.start()

    def submit(
        self, request: Request, spec: GenerationSpec, deliver: Callable[[Piece], None]
    ) -> Ticket:
        """Takes a request; its answer, or its error, is delivered piece by piece.

        Args:
            request: what is asked.
            spec: how; the answer is shorter than `max_new_tokens` where the slot has less room.
            deliver: called with each piece in a thread of the engine; it must return at once.

        Raises:
            QueueFull: too many requests wait.
            Closed: the engine is closing.
        """
        ticket = Ticket(request, spec, deliver)
        with self._changed:
            if self._closing:
                raise Closed
            if self._pending >= self.most_waiting + self.slots - len(self._busy):
                raise QueueFull
            self._pending += 1
        self._readers.submit(self._read_prompt, ticket)
        return ticket

    def answer(self, request: Request, spec: GenerationSpec) -> Iterator[Piece]:
        """Yields the pieces of one answer; leaving the iterator early frees the slot."""
        arrived: deque[Piece] = deque()
        some = threading.Semaphore(0)

        def deliver(piece: Piece) -> None:
            arrived.append(piece)
            some.release()

        ticket = self.submit(request, spec, deliver)
        try:
            while True:
                some.acquire()
                piece = arrived.popleft()
                yield piece
                if piece.is_last:
                    return
        finally:
            self.cancel(ticket)

    def cancel(self, ticket: Ticket) -> None:
        """Frees the slot of a request that nobody waits for any more."""
        with self._changed:
            ticket.cancelled = True
            self._changed.notify()

    def close(self) -> None:
        """Takes no more requests, answers those that it has, and ends."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()
            jax.monitoring.unregister_event_duration_listener(self._hear)
        self._readers.shutdown()

    def state(self) -> EngineState:
        """Returns the counts of this moment."""
        with self._changed:
            return EngineState(
                slots=self.slots,
                busy=len(self._busy),
                waiting=self._pending,
                compiles=self._compiles,
                **self._counts,
            )

    def _hear(self, event: str, *_: Any, **__: Any) -> None:
        """Counts what is compiled in the engine's thread."""
        if event == COMPILE_EVENT and threading.current_thread() is self._thread:
            self._compiles += 1

    def _read_prompt(self, ticket: Ticket) -> None:
        try:
            if not ticket.cancelled:
                ticket.bucket, ticket.row = self.buckets.read(
                    self.prompts, ticket.request, ticket.spec
                )
        except SampleError as error:
            self._end_unread(ticket, Piece("", Answer.failed(error)))
        except Exception:
            log.exception("a request could not be read")
            self._end_unread(ticket, Piece("", fault=True))
        else:
            with self._changed:
                self._ready.append(ticket)
                self._changed.notify()

    def _end_unread(self, ticket: Ticket, piece: Piece) -> None:
        with self._changed:
            self._pending -= 1
            self._counts["failed"] += 1
            self._changed.notify()
        ticket.deliver(piece)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._busy or self._ready or (self._closing and not self._pending)):
                    self._changed.wait()
                if not (self._busy or self._ready):
                    return
                free = [slot for slot in range(self.slots) if slot not in self._busy]
                ticket = self._ready.popleft() if self._ready and free else None
                self._pending -= ticket is not None
                if ticket is not None and ticket.cancelled:
                    self._counts["cancelled"] += 1
                    continue
                if ticket is not None:
                    self._busy[free[0]] = ticket
            try:
                if ticket is not None:
                    self._begin(free[0], ticket)
                else:
                    self._go_on()
            except Exception:
                log.exception("the engine failed; its requests end with an error")
                self._fail_all()

    def _begin(self, slot: int, ticket: Ticket) -> None:
        """Runs a prompt and delivers its first token."""
        assert ticket.row is not None and ticket.bucket is not None
        inputs = self.prompts.inputs([ticket.row], ticket.bucket)
        spec, limit = ticket.spec, np.int32(self._limit(ticket))
        how = one_row(spec.sampling, spec.seed, number=len(ticket.request.history))
        self._state, token = self._admit(
            self.model, self._state, inputs, np.int32(slot), limit, how
        )
        with self._changed:
            self._counts["prompt_tokens"] += len(ticket.row.tokens)
        self._take(slot, [int(token)])

    def _go_on(self) -> None:
        """Writes tokens in all busy slots, and delivers what became of them."""
        for slot in [slot for slot, ticket in self._busy.items() if ticket.cancelled]:
            self._release(slot, "cancelled")
        steps = max(1, min(MOST_STEPS, int(DISPATCH_SECONDS / self._step_seconds)))
        begun = time.perf_counter()
        tokens = self._advance(steps)
        done = int((tokens >= 0).sum(axis=1).max())
        if done:
            self._step_seconds = (time.perf_counter() - begun) / done
        for slot in list(self._busy):
            self._take(slot, [int(token) for token in tokens[slot] if token >= 0])

    def _advance(self, steps: int) -> np.ndarray:
        """Writes up to `steps` tokens in all busy slots; int32[N, MOST_STEPS], -1 for none."""
        # A stop string or a client that has left ends a row here, not on the device.
        released = np.array([slot not in self._busy for slot in range(self.slots)])
        self._state, tokens = self._decode(self.model, self._state, released, np.int32(steps))
        return np.asarray(tokens)

    def _limit(self, ticket: Ticket) -> int:
        assert ticket.row is not None
        return min(ticket.spec.max_new_tokens, self.buckets.capacity - len(ticket.row.tokens))

    def _take(self, slot: int, ids: list[int]) -> None:
        """Adds tokens to an answer, delivers its settled text, and ends it where it ends."""
        ticket = self._busy[slot]
        assert ticket.row is not None
        ticket.ids += ids
        stops = ticket.spec.stop_strings
        text, stopped = self.reader.read(ticket.ids, stops)
        ended = stopped or len(ticket.ids) >= self._limit(ticket)
        text = text.lstrip()
        text = text.rstrip() if ended else settled(text, stops)
        piece, ticket.shown = text[ticket.shown :], max(ticket.shown, len(text))
        if not ended:
            if piece:
                ticket.deliver(Piece(piece))
            return
        stop, count = self.reader.stop_id, len(ticket.ids)
        count = ticket.ids.index(stop) + 1 if stop in ticket.ids else count
        finish = "stop" if stopped else "length"
        answer = Answer(text, len(ticket.row.tokens), len(ticket.row.tiles), count, finish)
        with self._changed:
            self._counts["new_tokens"] += count
        self._release(slot, "answered")
        ticket.deliver(Piece(piece, answer))

    def _release(self, slot: int, why: str) -> None:
        with self._changed:
            del self._busy[slot]
            self._counts[why] += 1
            self._changed.notify()

    def _fail_all(self) -> None:
        """Ends all requests that have a slot; the arrays may be lost with the failed step."""
        with self._changed:
            lost, self._busy = list(self._busy.values()), {}
            self._counts["failed"] += len(lost)
        self._state = self._empty(self.model)
        for ticket in lost:
            ticket.deliver(Piece("", fault=True))
