"""The queue and the worker that draws it: pictures of equal settings are drawn in one batch, across clients.

A ticket is what one client has asked for. The worker is a thread: it draws step by step, so that a ticket can be
cancelled, and shown, between steps. What happens to a ticket comes back as events in the client's event loop.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from PIL import Image

from latentdiff.core.errors import TOO_LARGE, ConfigError, LatentDiffError, ResourceError, is_out_of_memory
from latentdiff.core.images import as_picture, to_uint8
from latentdiff.drawing.batch import Batch, Job
from latentdiff.drawing.draw import Drawing, batch_key
from latentdiff.drawing.painter import Painter
from latentdiff.drawing.pixels import decode
from latentdiff.drawing.record import ImageMetadata

GONE = 1.0  # seconds between two checks whether a client is still there: each takes time from the drawing
PAUSE = 0.25  # seconds between two checks whether a model can be loaded


class FullError(LatentDiffError):
    """The queue takes no more pictures now."""


class StoppedError(LatentDiffError):
    """The server stops, or the ticket was cancelled."""


class UnexpectedError(LatentDiffError):
    """An error of the program itself."""


def as_ours(error: Exception) -> LatentDiffError:
    """An error as a client may read it: ours as it is, others without their words, which are for the server's log."""
    if isinstance(error, LatentDiffError):
        return error
    if is_out_of_memory(error):
        return ResourceError(TOO_LARGE)
    return UnexpectedError(f"the server failed ({type(error).__name__}); its log says where")


@dataclass(frozen=True)
class Preview:
    """What a picture would be by the network's guess after a step. number: of the ticket's picture."""

    number: int
    image: Image.Image


@dataclass(frozen=True)
class PictureFile:
    """A picture's file in the folder: its name there, and its bytes, a PNG with its record."""

    name: str
    png: bytes


NO_FILE = PictureFile("", b"")
Finish = Callable[[Image.Image, ImageMetadata], PictureFile]


@dataclass(frozen=True)
class FinishedPicture:
    """A finished picture of a ticket, its record, and its file."""

    number: int
    image: Image.Image
    record: ImageMetadata
    kept: PictureFile
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Moved:
    """A step of a ticket is done, see `Ticket.done`, or its place in the queue has changed."""


Event = Preview | FinishedPicture | Moved | LatentDiffError


@dataclass(eq=False)
class Ticket:
    """The pictures that one client has asked for, and the painter that draws them.

    previews: how many of each picture. follow: whether each step is an event. interruptible: whether `interrupt`
    cancels it. is_kept: whether pictures are written into the folder. steps, done: of all pictures.
    """

    painter: Painter
    jobs: Sequence[Job]
    client: str
    previews: int = 0
    follow: bool = False
    interruptible: bool = False
    is_kept: bool = True
    cancelled: bool = False
    steps: int = 0
    done: int = 0
    began: float = 0.0  # time.monotonic() at its first step
    keys: Sequence[Any] = ()  # what pictures of one batch have in common
    _events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    _loop: asyncio.AbstractEventLoop | None = None

    def __post_init__(self) -> None:
        self.keys = [(id(self.painter), batch_key(self.painter, job)) for job in self.jobs]
        self.steps = sum(sum(job.plan.steps) for job in self.jobs)

    @property
    def seconds_left(self) -> float | None:
        """By the mean of its steps until now; None before the first."""
        if not (self.began and self.done):
            return None
        return (time.monotonic() - self.began) * (self.steps - self.done) / self.done

    def tell(self, event: Event) -> None:
        """Pass an event to the client; called by the worker."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def events(self) -> AsyncIterator[Preview | FinishedPicture | Moved]:
        """Steps, previews and pictures; leaving before all are drawn cancels the rest. Raises what drawing raised."""
        left = len(self.jobs)
        try:
            while left:
                event = await self._events.get()
                if isinstance(event, LatentDiffError):
                    raise event
                yield event
                left -= isinstance(event, FinishedPicture)
        finally:
            self.cancelled = self.cancelled or left > 0


async def finished_pictures(ticket: Ticket, is_gone: Callable[[], Awaitable[bool]]) -> AsyncIterator[FinishedPicture]:
    """The pictures of a ticket as they are drawn. is_gone: whether the client has gone away, which cancels the rest."""

    async def watch() -> None:
        while not await is_gone():
            await asyncio.sleep(GONE)
        ticket.cancelled = True

    watching = asyncio.create_task(watch())
    try:
        async for event in ticket.events():
            if isinstance(event, FinishedPicture):
                yield event
    finally:
        watching.cancel()


class Worker:
    """See the module. most: pictures that may wait; most_of_one: of one client. finish: keeps each picture.

    One worker draws for all models, since they share one machine: a picture of another model waits like any other.
    """

    def __init__(self, finish: Finish, most: int = 200, most_of_one: int = 64):
        self.count = 0
        self._finish, self._most, self._most_of_one = finish, most, most_of_one
        self._waiting: deque[tuple[Ticket, int]] = deque()
        self._current: list[tuple[Ticket, int]] = []
        self._changed = threading.Condition()
        self.stopping = False
        self._latest: tuple[Sequence[tuple[Ticket, int]], Any] | None = None  # a batch, and the network's guesses of it
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)

    def start(self) -> None:
        """Begin to draw."""
        self._thread.start()

    def submit(self, ticket: Ticket) -> Ticket:
        """Queue a ticket's pictures, in the running event loop. Raises ConfigError, FullError, StoppedError."""
        jobs, client = ticket.jobs, ticket.client
        ticket._loop = asyncio.get_running_loop()
        with self._changed:
            if self.stopping:
                raise StoppedError("the server stops")
            waiting = sum(not other.cancelled for other, _ in self._waiting)
            live = [other for other, _ in (*self._waiting, *self._current) if not other.cancelled]
            own = sum(other.client == client for other in live)
            if len(jobs) > (least := min(self._most, self._most_of_one)):
                raise ConfigError(f"a request has at most {least} pictures here (got {len(jobs)})")
            if waiting + len(jobs) > self._most:
                raise FullError(f"{waiting} pictures wait, and at most {self._most} may. Ask again later")
            if own + len(jobs) > self._most_of_one:
                raise FullError(f"{own} of your pictures wait, and at most {self._most_of_one} may. Ask again later")
            self._waiting.extend((ticket, number) for number in range(len(jobs)))
            self._changed.notify()
        return ticket

    @property
    def waiting(self) -> int:
        """The number of pictures that wait."""
        return len(self._waiting)

    def painters(self) -> set[int]:
        """The identities of the painters that waiting and current pictures hold."""
        return {id(ticket.painter) for ticket, _ in (*list(self._waiting), *self._current)}

    def ahead_of(self, ticket: Ticket) -> int:
        """The number of pictures before a ticket's first one: those that wait, and those that are being drawn."""
        places = [place for place, (other, _) in enumerate(list(self._waiting)) if other is ticket]
        return places[0] + len(self._current) if len(places) == len(ticket.jobs) else 0

    def current(self, client: str | None = None) -> list[Ticket]:
        """The tickets whose pictures are being drawn; of one client, or all."""
        tickets = dict.fromkeys(ticket for ticket, _ in self._current)
        return [ticket for ticket in tickets if client in (None, ticket.client)]

    def preview(self, client: str) -> Image.Image | None:
        """What the first picture that is being drawn for a client would be now."""
        if (latest := self._latest) is None:  # read once: the worker may come to another batch meanwhile
            return None
        batch, x0 = latest
        own = ((row, ticket) for row, (ticket, _) in enumerate(batch) if ticket.client == client)
        return next((_preview(ticket, x0[row : row + 1]) for row, ticket in own), None)

    def interrupt(self, client: str) -> None:
        """Cancel the interruptible tickets that are being drawn for a client."""
        for ticket in self.current(client):
            ticket.cancelled = ticket.cancelled or ticket.interruptible

    def stop(self, wait: float = 30.0) -> None:
        """Finish the step in hand, and answer everything that is open with StoppedError."""
        with self._changed:
            self.stopping = True
            self._changed.notify()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(wait)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self.stopping:
                    self._changed.wait()
                if self.stopping:
                    break
                self._current = self._next()
            for ticket in {ticket for ticket, _ in list(self._waiting) if ticket.follow}:
                ticket.tell(Moved())  # it may have come nearer
            if self._current:
                try:
                    self._draw(self._current)
                except Exception as error:  # the clients get it; the worker goes on
                    self._tell_all(ours := as_ours(error))
                    if isinstance(ours, UnexpectedError):
                        logging.getLogger(__name__).error("drawing failed", exc_info=error)
                self._current, self._latest = [], None
        for ticket, _ in (*self._current, *self._waiting):
            ticket.tell(StoppedError("the server stops"))

    def _next(self) -> list[tuple[Ticket, int]]:
        """The first picture that waits, with others of equal settings, as many as its batch takes."""
        live = [(ticket, number) for ticket, number in self._waiting if not ticket.cancelled]
        for ticket in {ticket for ticket, _ in self._waiting if ticket.cancelled}:
            ticket.tell(StoppedError("cancelled"))
        some: list[tuple[Ticket, int]] = []
        if live:
            first, number = live[0]
            equal = (each for each in live if each[0].keys[each[1]] == first.keys[number])
            some = list(islice(equal, first.jobs[number].request.batch_size))
        chosen = set(map(_identity, some))
        self._waiting = deque(each for each in live if _identity(each) not in chosen)
        return some

    def _draw(self, some: Sequence[tuple[Ticket, int]]) -> None:
        """Draw one batch; a batch that nobody waits for any more is abandoned."""
        painter = some[0][0].painter
        drawing = Drawing(painter, Batch([ticket.jobs[number] for ticket, number in some]))
        total, last, now = sum(drawing.batch.plan.steps), None, time.monotonic()
        for count, step in enumerate(drawing, 1):
            last = step
            self._latest = some, step.x0
            for ticket, _ in some:
                ticket.done += 1
                ticket.began = ticket.began or now
            if self.stopping or all(ticket.cancelled for ticket, _ in some):
                raise StoppedError("the server stops" if self.stopping else "cancelled")
            for row, (ticket, number) in enumerate(some):
                if count < total and count in _preview_steps(total, ticket.previews):
                    ticket.tell(Preview(number, _preview(ticket, step.x0[row : row + 1])))
            for ticket in {ticket for ticket, _ in some if ticket.follow}:
                ticket.tell(Moved())
        assert last is not None
        output = drawing.finish(last.x)
        for (ticket, number), image, record in zip(some, output.images, output.metadata, strict=True):
            self.count += 1
            if ticket.cancelled:
                ticket.tell(StoppedError("cancelled"))
            else:
                kept = self._finish(image, record) if ticket.is_kept else NO_FILE
                ticket.tell(FinishedPicture(number, image, record, kept, tuple(output.notes)))

    def _tell_all(self, error: LatentDiffError) -> None:
        for ticket in self.current():
            ticket.cancelled = True
            ticket.tell(error)


def _preview(ticket: Ticket, x0: Any) -> Image.Image:
    """A guess as the finished picture would be decoded: in tiles if the request asks for them."""
    model, request = ticket.painter.model, ticket.jobs[0].request
    with model.codec.piecewise(tiles=request.vae_tiling, slices=request.vae_slicing):
        return as_picture(to_uint8(decode(model, x0))[0])


def _identity(each: tuple[Ticket, int]) -> tuple[int, int]:
    return id(each[0]), each[1]


def _preview_steps(total: int, count: int) -> set[int]:
    """The numbers of the steps after which a picture is previewed, evenly spaced."""
    return {round(total * k / (count + 1)) for k in range(1, count + 1)}
