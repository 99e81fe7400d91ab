"""One base that draws for everybody in turn."""

import asyncio
import contextvars
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from sbora_diffusion.core.errors import ResourceError, SboraError

if TYPE_CHECKING:  # torch and diffusers take seconds to import: only once they are needed
    from sbora_diffusion.diffusion.pipeline import ConceptPipeline

MAX_WAITING = 8
"""About a minute on two cores: whoever came later hears that it is busy."""
Place = Callable[[int], None]
"""Is told how many come before."""
Made = TypeVar("Made")


class Gate:
    """Lets in one at a time, in the order in which they came; a bounded number waits, the others
    hear at once that it is busy."""

    def __init__(self, waiting: int = MAX_WAITING):
        self._most = waiting
        self._line: list[Place] = []
        self._turn = asyncio.Lock()

    @asynccontextmanager
    async def turn(self, tell: Place) -> AsyncIterator[None]:
        """Wait for the turn.

        Args:
            tell: is called at once, and whenever somebody before leaves.

        Raises:
            ResourceError: too many wait already.
        """
        if len(self._line) > self._most:
            raise ResourceError(
                f"Busy: {self._most} drawings are waiting already", "try again in a minute"
            )
        self._line.append(tell)
        tell(len(self._line) - 1)
        try:
            async with self._turn:
                yield
        finally:
            gone = self._line.index(tell)
            del self._line[gone]
            for place, other in enumerate(self._line[gone:], gone):
                other(place)


class Engine:
    """One base at a time, loaded when first needed, for one request at a time.

    It draws in one thread of its own: torch and the allocator keep memory for each thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pipeline: ConceptPipeline | None = None
        self._thread = ThreadPoolExecutor(1, "drawing")

    @contextmanager
    def pipeline(self, reference: str = "pocket") -> Iterator["ConceptPipeline"]:
        """The pipeline of a base, for this thread alone; it is read, in the place of another one,
        which takes some seconds."""
        with self._lock:
            if self._pipeline is None or self._pipeline.base.reference != reference:
                from sbora_diffusion.console import open_base
                from sbora_diffusion.diffusion.pipeline import ConceptPipeline

                self._pipeline = None  # two may not fit into memory
                self._pipeline = ConceptPipeline(open_base(reference, None))
            yield self._pipeline

    async def run(self, work: Callable[..., Made], *arguments: object) -> Made:
        """Do what draws, in the thread that draws; context variables go with it."""
        context = contextvars.copy_context()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, partial(context.run, work, *arguments))

    def warm_up(self) -> Future[None]:
        """Load pocket and take a step before anybody asks for a picture: the first one is slow."""
        return self._thread.submit(self._warm)

    def _warm(self) -> None:
        with suppress(SboraError), self.pipeline() as pipeline:  # whoever draws is told of it
            pipeline.generate("", steps=1)
