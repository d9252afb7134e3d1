"""Several worker processes that share the listening sockets, and the process that starts, replaces and ends them.

The parent never accepts a connection, and closes its sockets when it tells the workers to end: the kernel accepts
connections as long as any process holds the socket, and nobody would answer them. It speaks to each worker over a pipe.
Signals would not do: a terminal and systemd send them to all processes, and a worker must not take that for a second
signal. A worker whose parent has died ends as if it were told to.

A reload starts as many new workers as the settings say. When all are ready, the old ones retire. If one of them cannot
start, the new ones end, and nothing has changed.
"""

import asyncio
import contextlib
import functools
import json
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, wait
from pathlib import Path

from downloadview_async import ConfigurationError
from downloadview_async.service.config_loader import CONFIG
from downloadview_async.service.descriptors import check_descriptors
from downloadview_async.service.listening import Listeners
from downloadview_async.service.logs import one_line
from downloadview_async.service.metrics import SharedDirectory
from downloadview_async.service.pid_file import PidFile
from downloadview_async.service.reload import Generation, Generations, needing_a_restart, warn_of_restart
from downloadview_async.service.server import DownloadServer, config_for
from downloadview_async.service.server_checks import blaming_certificate, check_certificate
from downloadview_async.service.settings import Settings, Unavailable
from downloadview_async.service.systemd import Notifier
from downloadview_async.service.terminal import Terminal, is_in_foreground

WRONG_SETTINGS = 2
"""The exit status if the settings are wrong: trying again does not help."""

STARTUP_FAILURE = 3
"""The exit status if something does not answer, as uvicorn's: trying again may help."""

_BEAT = 1.0  # seconds between two signs of life of a worker
_BLOCKED = 20.0  # seconds in which the event loop of a worker has done nothing, after which it is silent
_HUNG = 10.0  # seconds without one after which a worker is killed, of those in which the parent has looked
_PAUSE = 1.0  # seconds before a worker that could not start is started again
_POLL = 0.5  # seconds between two looks at watched files
_MARGIN = 10.0  # seconds after the time of a shutdown in which a worker has to end

# what the parent says
_DRAIN, _DRAIN_LAST, _RETIRE, _NOW, _HURRY = b"drain", b"last", b"retire", b"now", b"hurry"
# what a worker says
_READY, _LEAVING, _CLOSED, _FAILED, _ALIVE = b"r", b"l", b"c", b"f", b"."

_OF_TERMINALS = (signal.SIGHUP, signal.SIGINT)
"""The signals that the parent alone obeys."""

_States = dict[str, tuple[int, ...]]
"""The time, the size and the inode of each file, by its path; nothing for a file that is missing."""

_spawn = multiprocessing.get_context("spawn")
_logger = logging.getLogger("uvicorn.error")


def work(
    pipe: Connection, sockets: list[socket.socket], are_inherited: bool, settings: Settings, watches: bool
) -> None:
    """Serve in this process until the parent says otherwise.

    are_inherited: whether processes that are not of this service may accept connections, too. settings: those of the
    parent, because the file may have changed since, and all workers need the same.
    """
    for number in _OF_TERMINALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _OF_TERMINALS)  # as `_Worker` has blocked them
    try:
        check_descriptors()
        server = _WorkerServer(settings, pipe, are_inherited, watches)
        try:
            server.run(sockets)
        finally:
            server.tell_failure()
    except ConfigurationError as exc:
        _say(pipe, _FAILED + one_line(str(exc)).encode())
        print(f"downloadview: {one_line(str(exc))}", file=sys.stderr)
        sys.exit(STARTUP_FAILURE if isinstance(exc, Unavailable) else WRONG_SETTINGS)


def _say(pipe: Connection, message: bytes) -> None:
    with contextlib.suppress(OSError):  # the other process has ended
        pipe.send_bytes(message)


class _WorkerServer(DownloadServer):
    """The server of a worker, which obeys its parent. A signal begins the shutdown, but never cuts it short."""

    def __init__(self, settings: Settings, pipe: Connection, are_inherited: bool, watches: bool) -> None:
        application = Generations(Generation(settings))
        super().__init__(
            config_for(application, settings),
            drain_seconds=settings.server.drain_seconds,
            shares_sockets=True,
            when_draining=self._tell_that_it_leaves,
            when_ready=self._listen_to_parent,
        )
        with blaming_certificate(settings):  # it may have been replaced since the parent has checked it
            self.config.load()
        self._settings = settings
        self._application = application
        self._pipe = pipe
        self._are_inherited = are_inherited
        self._watches = watches
        self._loop_ran = time.monotonic()

    def tell_failure(self) -> None:
        """Tell the parent why the application could not start, if that is so."""
        if self._application.failure is not None:
            _say(self._pipe, _FAILED + one_line(self._application.failure).encode())

    def handle_exit(self, sig: int, frame: object) -> None:
        self.drain()

    def _tell_that_it_leaves(self) -> None:
        self._application.drain()
        _say(self._pipe, _LEAVING)

    async def _stop_accepting(self, sockets: list[socket.socket]) -> None:
        await super()._stop_accepting(sockets)
        if not self.server_state.connections:
            _say(self._pipe, _CLOSED)

    def _end_idle_connections(self) -> None:
        super()._end_idle_connections()
        _say(self._pipe, _CLOSED)

    def _listen_to_parent(self) -> None:
        files = _states_of(map(str, watched_files(self._settings))) if self._watches else {}
        _say(self._pipe, _READY + json.dumps(files).encode())
        self._note_that_the_loop_runs()
        threading.Thread(target=self._beat, daemon=True).start()
        asyncio.get_running_loop().add_reader(self._pipe.fileno(), self._obey)

    def _note_that_the_loop_runs(self) -> None:
        self._loop_ran = time.monotonic()
        asyncio.get_running_loop().call_later(_BEAT, self._note_that_the_loop_runs)

    def _beat(self) -> None:
        """Give signs of life, in a thread: the event loop may be busy for some seconds, but not for ever."""
        with contextlib.suppress(OSError):
            while True:
                if time.monotonic() - self._loop_ran < _BLOCKED:
                    self._pipe.send_bytes(_ALIVE)
                time.sleep(_BEAT)

    def _obey(self) -> None:
        try:
            order = self._pipe.recv_bytes()
        except (OSError, EOFError):  # the parent has died
            asyncio.get_running_loop().remove_reader(self._pipe.fileno())
            order = _DRAIN
        if order in (_DRAIN, _DRAIN_LAST):  # all workers do
            self.shares_sockets, self.shares_port = self._are_inherited, self._settings.server.reuse_port
            self.closes_last = order == _DRAIN_LAST
        orders = {
            _DRAIN: self.drain,
            _DRAIN_LAST: self.drain,
            _RETIRE: self.retire,
            _NOW: self.stop_now,
            _HURRY: self.hurry,
        }
        orders[order]()


class _Worker:
    """A worker process, as its parent sees it."""

    def __init__(self, listeners: Listeners, settings: Settings, *, watches: bool) -> None:
        self.pipe, theirs = _spawn.Pipe()
        arguments = (theirs, listeners.sockets, listeners.are_inherited, settings, watches)
        self.process = _spawn.Process(target=work, args=arguments)
        # A signal to all processes must not end one that is about to ignore it.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_TERMINALS)
        try:
            self.process.start()
        except OSError:
            self.pipe.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            theirs.close()
        self.is_ready = False
        self.is_leaving = False
        self.is_closed = False  # it takes no more requests
        self.problem: str | None = None
        self.files: _States = {}
        self.silence = 0.0

    @property
    def name(self) -> str:
        return f"[{self.process.pid}]"

    def tell(self, order: bytes) -> None:
        _say(self.pipe, order)

    def end_unless_ready(self) -> None:
        """End a process that does not listen to its parent yet. It has accepted no connection."""
        if not self.is_ready:
            self.process.terminate()

    def listen(self) -> None:
        """Take what the worker has said."""
        with contextlib.suppress(OSError, EOFError):
            while self.pipe.poll():
                message = self.pipe.recv_bytes()
                kind, rest = message[:1], message[1:]
                self.silence = 0.0
                if kind == _READY:
                    self.is_ready = True
                    self.files = {file: tuple(state) for file, state in json.loads(rest).items()}
                elif kind == _LEAVING:
                    self.is_leaving = True
                elif kind == _CLOSED:
                    self.is_closed = True
                elif kind == _FAILED:
                    self.problem = rest.decode()

    def is_hung(self, seconds: float) -> bool:
        """Return whether the worker has been silent for too long. seconds: since the last call."""
        self.silence += seconds
        return self.is_ready and self.silence > _HUNG

    def end(self) -> int:
        """Forget a process that has ended, and return its status."""
        self.process.join()
        status = self.process.exitcode
        self.process.close()
        self.pipe.close()
        return status or 0


class Workers:
    """Starts the workers, and replaces those that die, retire, or have the settings of before a reload.

    load: reads the settings again. signals: those that have come already. watches: reload when a file of the
    application changes.
    """

    def __init__(
        self,
        settings: Settings,
        listeners: Listeners,
        *,
        load: Callable[[], Settings],
        notifier: Notifier,
        pid_file: PidFile,
        terminal: Terminal,
        signals: list[int],
        watches: bool = False,
    ) -> None:
        self._settings = settings
        self._at_start = settings.server
        self._listeners = listeners
        self._load = load
        self._notifier = notifier
        self._pid_file = pid_file
        self._terminal = terminal
        self._watch = _Watch() if watches else None
        self._metrics = SharedDirectory()
        self._current: list[_Worker] = []
        self._next: list[_Worker] = []
        self._next_settings = settings
        self._leaving: list[_Worker] = []
        self._retiring: list[_Worker] = []  # those of `_leaving` that may still accept connections
        self._serves = False  # it has started, and can start workers
        self._began: int | None = None  # when the settings were read for `_next`
        self._wants_reload = False
        self._reading: _Reading | None = None
        self._wake: Callable[[], object] = lambda: None
        self._signals = signals
        self._kill_at: float | None = None  # the shutdown has begun, and this is its end
        self._start_at = 0.0
        self._looked_at = time.monotonic()
        self._status = 0

    def run(self) -> int:
        """Serve until a signal to end, and return the exit status."""
        woken, wakes = socket.socketpair()
        with woken, wakes, self._metrics:
            for one in (woken, wakes):
                one.setblocking(False)
            signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
            self._wake = functools.partial(_wake_by, wakes)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, lambda number, _: self._signals.append(number))
            _logger.info("Started parent process [%d]", os.getpid())
            try:
                self._start_next(self._settings)
                while self._everyone or self._goes_on:
                    self._wait(woken)
                    self._handle_signals()
                    self._listen()
                    self._finish_reload()
                    self._keep_alive()
                    self._notifier.alive()
            except BaseException:
                for worker in self._everyone:  # else they would serve on, and the interpreter would wait for them
                    worker.pipe.close()
                raise
            finally:
                signal.set_wakeup_fd(-1)
        _logger.info("Stopping parent process [%d]", os.getpid())
        return self._status

    @property
    def _goes_on(self) -> bool:
        """Whether workers that end are replaced, even all of them."""
        return self._serves and self._kill_at is None

    @property
    def _everyone(self) -> list[_Worker]:
        return [*self._current, *self._next, *self._leaving]

    def _start(self, workers: list[_Worker], settings: Settings) -> None:
        """Add as many new workers as are missing. Raises `OSError`, such as if there are too many processes."""
        of_workers = self._metrics.added_to(settings)
        while len(workers) < settings.server.workers:
            workers.append(_Worker(self._listeners, of_workers, watches=self._watch is not None))

    def _wait(self, woken: socket.socket) -> None:
        """Wait until there is something to do, at most `_POLL` seconds."""
        workers = self._everyone
        wait([woken, *(one.pipe for one in workers), *(one.process.sentinel for one in workers)], _POLL)
        with contextlib.suppress(BlockingIOError):
            woken.recv(1024)
        if self._watch is not None and self._watch.has_changed():
            _logger.info("A file has changed")
            self._wants_reload = True

    def _handle_signals(self) -> None:
        while self._signals:
            number = self._signals.pop(0)
            is_hangup = number == signal.SIGHUP
            if is_hangup and not self._terminal.was_closed:
                self._wants_reload = True
            elif self._kill_at is None:
                self._shut_down(hurries=number == signal.SIGINT and is_in_foreground())
            elif not is_hangup:
                self._tell_all(_NOW, 0)

    def _shut_down(self, *, hurries: bool) -> None:
        server = self._settings.server
        seconds = 0.0 if hurries else server.drain_seconds + server.timeout_graceful_shutdown
        self._notifier.stopping()
        for listener in self._listeners.sockets:
            listener.close()
        if hurries:
            self._tell_all(_HURRY, seconds)
        self._tell_all(_DRAIN, seconds, last=_DRAIN_LAST)
        for worker in self._everyone:
            worker.end_unless_ready()

    def _tell_all(self, order: bytes, seconds: float, *, last: bytes | None = None) -> None:
        self._kill_at = time.monotonic() + seconds + _MARGIN
        for number, worker in enumerate(self._everyone):  # the first one is not leaving yet
            worker.tell(order if number or last is None else last)

    def _listen(self) -> None:
        # If this process was stopped for a while, such as by a debugger or with its container, the workers were, too.
        seconds = min(time.monotonic() - self._looked_at, 2 * _POLL)
        self._looked_at = time.monotonic()
        for worker in self._everyone:
            was_leaving = worker.is_leaving
            worker.listen()
            if self._kill_at is None and worker.is_leaving and not was_leaving and worker in self._current:
                # nobody has told it to leave: `limit_max_requests`, or a signal to it alone
                self._current.remove(worker)
                self._leaving.append(worker)
            if worker.is_hung(seconds) or (self._kill_at is not None and time.monotonic() > self._kill_at):
                _logger.error("Worker process %s does not answer, and is killed", worker.name)
                worker.process.kill()
                worker.process.join()
        for worker in self._everyone:
            if not worker.process.is_alive():
                worker.listen()
                self._forget(worker)

    def _forget(self, worker: _Worker) -> None:
        """Go on without a worker whose process has ended."""
        name, status = worker.name, worker.end()
        if status and worker.is_ready:
            _logger.error("Worker process %s died with status %d", name, status)
        if worker in self._leaving:
            self._leaving.remove(worker)
        elif self._kill_at is not None:
            (self._current if worker in self._current else self._next).remove(worker)
        elif worker in self._next:
            self._next.remove(worker)
            self._give_up(worker.problem or f"the worker process {name} ended with status {status}", status)
        elif worker.is_ready or any(one.is_ready for one in self._current):
            if not worker.is_ready:
                self._start_at = time.monotonic() + _PAUSE
            self._current.remove(worker)
        else:
            self._current.remove(worker)
            self._serves = bool(self._current)
            if not self._serves:
                self._status = status or STARTUP_FAILURE

    def _start_next(self, settings: Settings) -> None:
        self._next_settings = settings
        try:
            self._start(self._next, settings)
        except OSError as exc:
            _logger.error("A worker process cannot be started: %s", exc)
            self._give_up(f"a worker process cannot be started: {exc}", STARTUP_FAILURE)

    def _keep_alive(self) -> None:
        """Start workers for those that have died, or that leave although nobody has told them to."""
        if self._goes_on and time.monotonic() >= self._start_at:
            try:
                self._start(self._current, self._settings)
            except OSError as exc:
                _logger.error("A worker process cannot be started: %s", exc)
                self._start_at = time.monotonic() + _PAUSE

    def _finish_reload(self) -> None:
        """Begin a reload if one is wanted, or end one that is ready."""
        if self._kill_at is not None:
            return
        if self._next and all(worker.is_ready for worker in self._next):
            self._retiring, self._current, self._next = self._current, self._next, []
            self._settings = self._next_settings
            warn_of_restart(needing_a_restart(self._at_start, self._settings.server, has_workers=True))
            for worker in self._retiring:
                worker.tell(_RETIRE)
            self._leaving += self._retiring
            if self._watch is not None:
                self._watch.follow(self._current[0].files)
            if self._began is None:
                self._serves = True
                self._listeners.publish()
                self._notifier.ready()
        # Until then, a worker with the old settings may get a new connection, or a request on an idle one.
        if self._retiring and all(worker.is_closed or worker not in self._leaving for worker in self._retiring):
            self._retiring = []
            _logger.info("The settings have been read again, and are in use")
            self._answer(None)
        if self._reading is not None and self._reading.is_done:
            settings, problem = self._reading.settings, self._reading.problem
            self._reading = None
            if settings is None:
                self._give_up(problem, WRONG_SETTINGS)
            else:
                self._start_next(settings)
        is_reloading = self._reading is not None or self._next or self._retiring
        if self._wants_reload and self._current and not is_reloading:
            self._wants_reload = False
            self._began = time.time_ns()
            self._notifier.reloading()
            if self._watch is not None:
                self._watch.note()
            self._reading = _Reading(self._load, self._wake)

    def _give_up(self, problem: str, status: int) -> None:
        """End the new workers, and go on with the old ones, if there are any."""
        for worker in self._next:
            worker.tell(_NOW)
            worker.end_unless_ready()
        self._leaving += self._next
        self._next = []
        if self._began is None:
            self._status = status or STARTUP_FAILURE
            return
        _logger.error("The settings cannot be used, so the old ones stay: %s", problem)
        self._answer(problem)

    def _answer(self, problem: str | None) -> None:
        assert self._began is not None
        self._notifier.reloaded(problem)
        self._pid_file.answer(self._began, problem)


class _Reading:
    """The settings while a thread reads them: the parent obeys signals even if the disk hangs.

    wake: called when this is done. settings: None if they cannot be used; problem says why.
    """

    def __init__(self, load: Callable[[], Settings], wake: Callable[[], object]) -> None:
        self.is_done = False
        self.settings: Settings | None = None
        self.problem = ""
        self._load = load
        self._wake = wake
        try:
            threading.Thread(target=self._read, daemon=True).start()
        except RuntimeError as exc:  # there are too many threads
            self.problem, self.is_done = one_line(str(exc)), True

    def _read(self) -> None:
        try:
            settings = self._load()
            check_certificate(settings)
            self.settings = settings
        except ConfigurationError as exc:
            self.problem = one_line(str(exc))
        except Exception as exc:  # a bug must not end the parent
            _logger.exception("The settings cannot be read")
            self.problem = one_line(f"{type(exc).__name__}: {exc}")
        finally:
            self.is_done = True
            self._wake()


def _wake_by(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is full, or the parent ends
        sock.send(b"\0")


class _Watch:
    """Files that are looked at again and again. A change counts when it has lasted from one look to the next.

    So a reload reads neither half of a file nor the first of several files that are saved together.
    """

    def __init__(self) -> None:
        self._loaded: _States = {}  # at most as new as what the application has read
        self._latest: _States = {}
        self._look_at = 0.0

    def note(self) -> None:
        """Take what is in the files now for what the application has read. Call it before the application reads."""
        self._loaded = self._latest = _states_of(self._latest)

    def follow(self, files: _States) -> None:
        """Look at these files from now on. files: with their states after the application has read them."""
        self._loaded = files | {file: state for file, state in self._loaded.items() if file in files}
        self._latest = files

    def has_changed(self) -> bool:
        """Return whether the files have changed since `note`."""
        now = time.monotonic()
        if now < self._look_at:
            return False
        self._look_at = now + _POLL
        before, self._latest = self._latest, _states_of(self._latest)
        return before == self._latest != self._loaded


def _states_of(files: Iterable[str]) -> _States:
    return {file: _state_of(file) for file in files}


def _state_of(file: str) -> tuple[int, ...]:
    try:
        status = os.stat(file)
    except OSError:
        return ()
    return status.st_mtime_ns, status.st_size, status.st_ino


def watched_files(settings: Settings) -> list[Path]:
    """Return the files on which the application depends.

    These are the settings, the files that they name, the templates of the pages, and the modules that are imported now,
    without those of Python and of installed packages.
    """
    links, users, server = settings.links, settings.users, settings.server
    named = [
        os.environ.get(CONFIG),
        None if links is None else links.keys,
        None if users is None else users.file,
        server.ssl_certfile,
        server.ssl_keyfile,
    ]
    files = [Path(name).absolute() for name in named if name and len(name) < 4096]
    if (templates := settings.pages.templates) is not None:
        files += [Path(templates), *Path(templates).rglob("*")]
    installed = {Path(path).resolve() for path in (sys.prefix, sys.base_prefix)}
    for module in list(sys.modules.values()):
        if file := getattr(module, "__file__", None):
            path = Path(file).resolve()
            if not installed & {*path.parents} and "site-packages" not in path.parts:
                files.append(path)
    return [file for file in dict.fromkeys(files) if "\n" not in str(file) and file.exists()]
