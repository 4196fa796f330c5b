"""The parent's side of a benchmark: start the workers, give turns, end them whatever happens."""

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, final

from gradaccum.errors import GradaccumError

LAST_LINES = 12  # of what a worker that died has said
PATIENCE = 5.0  # seconds for a worker to end by itself


class WorkerFailed(GradaccumError):
    """Report a worker that died, with the last it said and its exit code."""

    def __init__(self, message: str, *, hint: str = "", code: int | None = None) -> None:
        super().__init__(message, hint=hint)
        self.code = code


@dataclass(frozen=True, slots=True)
class Contender:
    """Name what is timed and the command that runs it.

    Args:
        command: Starts a process that speaks through a `Stage`.
        env: Variables besides those of this process.
    """

    name: str
    command: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Turn:
    """Tell what a contender did in one turn.

    Args:
        seconds: Of each step, its reading of data included.
        trained: Tokens with a label, in all of the steps.
        padded: Tokens that went through the model; 0 where nobody counted.
        useful: Those of them that are no padding.
        peak_bytes: Peak memory so far beyond what was held before the first step.
    """

    seconds: tuple[float, ...]
    trained: int
    padded: int
    useful: int
    peak_bytes: int | None

    @property
    def rate(self) -> float:
        """Return the trained tokens a second; of a worker that trains none, the steps."""
        return (self.trained or len(self.seconds)) / max(sum(self.seconds), 1e-9)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Tell what became of a contender.

    Args:
        turns: One a round, None from where it failed.
        answer: To the question of `race`; None without one or where it failed before.
        failure: What it said when it died, with its exit code.
    """

    name: str
    turns: tuple[Turn | None, ...]
    answer: Any = None
    failure: WorkerFailed | None = None


def race(
    contenders: Sequence[Contender],
    *,
    rounds: int,
    steps: int,
    is_fresh: bool = False,
    question: Mapping[str, Any] | None = None,
    heard: Callable[[int, str, Turn | None], None] | None = None,
) -> list[Outcome]:
    """Run all contenders, interleaved, and return their outcomes.

    for round in range(rounds):
        for contender in rotated(contenders, round):
            contender does `steps` steps, the others wait

    What warms up is not counted: a turn before, or one step of each fresh process.

    Args:
        is_fresh: Start a process for each turn, where several would not fit into the device.
        question: What to ask each worker in the end; see `Stage`.
        heard: Called after each turn with the round (0: warming up), the name and the turn; the
            turn is None where the contender failed.
    """
    seats = {contender.name: _Seat(contender) for contender in contenders}

    def give(round_: int, name: str, do: Callable[[_Worker], Any]) -> Any:
        if seats[name].failure is not None:
            return None
        found = seats[name].work(do)
        if heard is not None and (found is None or isinstance(found, Turn)):
            heard(round_, name, found)
        return found

    patience = 0.0
    try:
        if not is_fresh:
            for seat in seats.values():  # all at once: they build side by side
                seat.start()
            for name in seats:
                give(0, name, _Worker.ready)
            for name in seats:
                give(0, name, lambda worker: worker.turn(steps))
        for round_ in range(rounds):
            for name in rotated(list(seats), round_):
                turn = give(round_ + 1, name, lambda worker: worker.turn(steps))
                seats[name].turns.append(turn)
        if question is not None:
            for seat in seats.values():
                seat.answer = seat.work(lambda worker: worker.answer(question))
        patience = PATIENCE
    finally:
        _end(list(seats.values()), patience)
    return [seat.outcome() for seat in seats.values()]


def rotated(names: Sequence[str], round_: int) -> list[str]:
    """Return the order of a round.

    Example:
        >>> rotated(["a", "b", "c"], 1)
        ['b', 'c', 'a']
    """
    first = round_ % len(names)
    return [*names[first:], *names[:first]]


@final
class _Seat:
    """A contender in its race: its worker, what it did, and why it failed."""

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        self.worker: _Worker | None = None  # None: a new one for each turn
        self.turns: list[Turn | None] = []
        self.answer: Any = None
        self.failure: WorkerFailed | None = None

    def start(self) -> None:
        self.worker = _Worker(self.contender)

    def work(self, do: Callable[["_Worker"], Any]) -> Any:
        """Return what the worker does; None where it dies, or has died."""
        if self.failure is not None:
            return None
        try:
            if self.worker is not None:
                return do(self.worker)
            with _Worker(self.contender) as worker:
                worker.ready()
                worker.turn(1)  # warms up
                return do(worker)
        except WorkerFailed as failure:
            self.failure = failure
            return None

    def outcome(self) -> Outcome:
        return Outcome(self.contender.name, tuple(self.turns), self.answer, self.failure)


def _end(seats: Sequence[_Seat], patience: float) -> None:
    workers = [seat.worker for seat in seats if seat.worker is not None]
    for worker in workers:
        worker.hang_up()
    for worker in workers:
        worker.close(patience)


@final
class _Worker:
    """The parent's end of a worker."""

    def __init__(self, contender: Contender) -> None:
        self._name = contender.name
        # A pipe would have to be read all the time.
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            list(contender.command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env={**os.environ, **contender.env},
            text=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(PATIENCE if kind is None else 0.0)

    def ready(self) -> Any:
        return self._hear()

    def turn(self, steps: int) -> Turn:
        told = self._ask({"steps": steps})
        return Turn(tuple(told.pop("seconds")), **told)

    def answer(self, question: Mapping[str, Any]) -> Any:
        return self._ask({"question": dict(question)})["answer"]

    def _ask(self, message: Mapping[str, Any]) -> Any:
        try:
            self._stdin.write(json.dumps(message) + "\n")
            self._stdin.flush()
        except OSError:  # it has died
            self._fail("")
        return self._hear()

    def _hear(self) -> Any:
        line = self._stdout.readline()
        try:
            return json.loads(line)
        except json.JSONDecodeError:
            self._fail(line)

    def _fail(self, line: str) -> NoReturn:
        """End it and say why: the line that is none of ours, or what it said at last."""
        self._end(0.0 if line else PATIENCE)
        code = self._process.returncode
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").splitlines()
        last = "\n".join([text for text in lines if text.strip()][-LAST_LINES:])
        last = f"it printed {line.strip()!r}" if line else last or "it said nothing"
        raise WorkerFailed(f"{self._name} ended with exit code {code}: {last}", code=code)

    def hang_up(self) -> None:
        """Close its stdin: a worker that waits ends."""
        with contextlib.suppress(OSError):
            self._stdin.close()

    def close(self, patience: float) -> None:
        """End it, and forget what it said."""
        self._end(patience)
        self._stdout.close()
        self._said.close()

    def _end(self, patience: float) -> None:
        """Hang up, wait, and kill what has not ended by then."""
        self.hang_up()
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
