"""The process: a socket, the web server on it, and what SIGTERM and Ctrl-C do."""

import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import uvicorn

from faithdiff_jax.errors import InputError
from faithdiff_jax.service.service import Service
from faithdiff_jax.service.settings import ServiceOptions

CONNECTIONS_END = 5
"""Seconds in which answers that have begun are finished at the end."""


def bound(settings: ServiceOptions) -> socket.socket:
    """A socket at the address and port, before anything is loaded.

    Raises:
        InputError: there is no such address here, or the port is taken.
    """
    where = f"{settings.host}, port {settings.port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        made = socket.socket(family, kind, protocol)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
        except OSError:
            made.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{where}: cannot be listened at ({reason}), give another --host or --port") from None
    return made


def url_of(made: socket.socket) -> str:
    """Where a browser finds the service."""
    host, port = made.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def serve(app: Any, service: Service, made: socket.socket, greeting: str, say: Callable[[str], None]) -> None:
    """Answer requests until SIGTERM or Ctrl-C, and then finish what was taken on.

    Pictures that wait are restored for `drain` seconds, the rest is handed back; results can be fetched for `linger`
    seconds more. A second signal hands back at once.

    Args:
        app: what answers.
        service: what it answers for.
        made: a socket of `bound`.
        greeting: said when requests are answered.
        say: tells people what happens.
    """
    config = uvicorn.Config(
        app,
        log_level="critical",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=CONNECTIONS_END,
    )
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # what it says is in the answer
    server = _Server(config, service, greeting, say)
    asyncio.run(server.serve(sockets=[made]))


class _Server(uvicorn.Server):
    """uvicorn's, with another way to end."""

    def __init__(self, config: uvicorn.Config, service: Service, greeting: str, say: Callable[[str], None]):
        super().__init__(config)
        self._service, self._greeting, self._say = service, greeting, say
        self._signals = 0
        self._ending: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C begin the end; afterwards they do what they did before."""
        before = {number: signal.signal(number, self._asked) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        self._say(self._greeting)

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second."""
        if self._signals and self._ending is None:
            self._ending = asyncio.create_task(self._end())
        return await super().on_tick(counter)

    async def _end(self) -> None:
        queue, settings = self._service.queue, self._service.settings
        queue.close()
        counts = queue.counts()
        self._say(f"finishing {counts['waiting'] + counts['running']} pictures; again to stop at once")
        await self._until(lambda: queue.idle, settings.drain)
        if not queue.idle:
            queue.hand_back()
            await self._until(lambda: not queue.counts()["running"], settings.drain)
        if self._signals == 1:
            await self._until(lambda: not queue.unfetched, settings.linger)
        self.should_exit = True

    async def _until(self, ready: Callable[[], bool], seconds: float) -> None:
        """Wait, but no longer than that, nor when asked again."""
        asked, end = self._signals, time.monotonic() + seconds
        while not ready() and time.monotonic() < end and self._signals <= max(1, asked):
            await asyncio.sleep(0.05)
