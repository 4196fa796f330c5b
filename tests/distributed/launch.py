"""Start the ranks of a test as processes of their own, and tell what became of each.

    def scene(rank, world, factor):  # in a module that can be imported
        x = torch.ones(2) * factor
        dist.all_reduce(x)
        return x

    results = launch.run(scene, 2, 3.0)
    assert [result.value.tolist() for result in results] == [[6.0, 6.0]] * 2

gloo ends a process from C++ where ranks disagree, so that no rank may live in that of the tests.
By default each rank is a new interpreter, which imports torch for seconds. With `warm=True` they
come from multiprocessing's fork server instead, which has imported torch once and started no
thread: a twentieth of the time, for scenes that need no pristine process.
"""

import contextlib
import faulthandler
import importlib
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TAIL = 6_000  # characters of stderr that are kept
PRELOADED = [
    "torch._dynamo",  # which optimizers and fully_shard import when they are first made
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "pytest",
    "gradaccum.checkpoint",
    "tests.distributed.launch",
]


@dataclass(frozen=True)
class Result:
    """Tell how one rank ended.

    Args:
        value: What the function returned.
        error: "RuntimeError: text" of what it raised.
        returncode: Of the process; negative for the signal that ended it.
        seconds: What the function took; of one that did not return, what the process had.
        hung: Whether it was still there at the deadline, and was killed.
        stderr: The end of what it wrote; where it hung, the stacks of all its threads.
    """

    rank: int
    value: Any
    error: str | None
    returncode: int | None
    seconds: float
    hung: bool
    stderr: str = field(repr=False)

    @property
    def ok(self) -> bool:
        """Tell whether the function returned."""
        return self.error is None and not self.hung


Scene = tuple[Callable[..., Any] | str, tuple[Any, ...]]


class Job:
    """Hold the processes of all ranks, from their start until `wait` or `kill`.

    Args:
        scenes: Functions with their arguments; they run one after the other, after a barrier each.
        world: Number of ranks.
        deadline: Seconds after which those that are left are killed.
        timeout: Of the process group, in seconds.
        warm: Whether ranks come from a process that has imported torch.
        env: Environment variables besides those of torch.distributed.
    """

    def __init__(
        self,
        scenes: Sequence[Scene],
        world: int,
        *,
        deadline: float = 30,
        timeout: float = 20,
        warm: bool = False,
        env: dict[str, str] | None = None,
    ) -> None:
        self.world, self.deadline, self.num_scenes = world, deadline, len(scenes)
        self.folder = Path(tempfile.mkdtemp(prefix="gradaccum-ranks-"))
        named = [(_name(function), args) for function, args in scenes]
        spec = {"scenes": named, "timeout": timeout, "dump_at": time.time() + deadline - 1}
        (self.folder / "spec").write_bytes(pickle.dumps(spec))
        shared = {
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            **(env or {}),
        }
        self.begin = time.monotonic()
        start = _start_warm if warm else _start
        self.ranks = [
            start(self.folder, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(world)
        ]

    def wait(self) -> list[list[Result]]:
        """Return what each rank made of each scene, once all are done or the deadline is over."""
        while time.monotonic() - self.begin < self.deadline:
            if self.done():
                break
            time.sleep(0.005)
        hung = [_code(process) is None for process in self.ranks]
        self.kill(keep=True)
        results = [
            [self._result(scene, rank, hung[rank]) for rank in range(self.world)]
            for scene in range(self.num_scenes)
        ]
        shutil.rmtree(self.folder, ignore_errors=True)
        return results

    def done(self) -> bool:
        """Tell whether all ranks have ended."""
        return all(_code(process) is not None for process in self.ranks)

    def kill(self, keep: bool = False) -> None:
        """Kill the ranks that are left, as SIGKILL does, all at once."""
        left = [process for process in self.ranks if _code(process) is None]
        for process in left:
            process.kill()
        for process in left:
            process.join() if hasattr(process, "join") else process.wait()
        if not keep:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _result(self, scene: int, rank: int, hung: bool) -> Result:
        file, log = self.folder / f"{scene}.{rank}", self.folder / f"log.{rank}"
        stderr = log.read_text(errors="replace")[-TAIL:] if log.exists() else ""
        code = _code(self.ranks[rank])
        if file.exists():
            value, error, seconds = _load(file)
            return Result(rank, value, error, code, seconds, False, stderr)
        seconds = time.monotonic() - self.begin
        error = None if hung else f"ended with {code} before it returned"
        return Result(rank, None, error, code, seconds, hung, stderr)


def run(
    function: Callable[..., Any] | str, world: int, *args: Any, deadline: float = 30, **options: Any
) -> list[Result]:
    """Call `function(rank, world, *args)` on each rank; return what became of each.

    The process group is there (gloo), and torch has one thread. Options are those of `Job`.

    Args:
        function: One that can be imported, or "module:function".
        world: Number of ranks.
        deadline: Seconds until those that are left are killed.
    """
    return run_many([(function, args)], world, deadline=deadline, **options)[0]


def run_many(
    scenes: Sequence[Scene], world: int, *, deadline: float = 30, **options: Any
) -> list[list[Result]]:
    """Run several functions one after the other in the same processes; return results by function.

    A rank on which one raises takes no part in what follows.
    """
    return Job(scenes, world, deadline=deadline, **options).wait()


def values(results: Sequence[Result]) -> list[Any]:
    """Return what all ranks returned; fail with what went wrong if one did not."""
    wrong = [f"{result}\n{result.stderr}" for result in results if not result.ok]
    assert not wrong, "\n".join(wrong)
    return [result.value for result in results]


def torchrun(
    *args: str, nproc: int, deadline: float = 60, env: dict[str, str] | None = None
) -> Result:
    """Run `torchrun` on this machine; return how its agent ended, as rank -1.

    Args:
        args: Options of torchrun, then the script or `-m module`, and its arguments.
        nproc: Number of ranks.
        deadline: Seconds until the agent and all its workers are killed.
        env: Environment variables to set.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(nproc)]
    if not any(arg.startswith("--rdzv") for arg in args):
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    own = {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        # Else a restart finds the addresses of ranks that are gone (torch 2.13).
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        **(env or {}),
    }
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+") as log:
        agent = subprocess.Popen(
            [*command, *args], cwd=ROOT, env=os.environ | own, stdout=log, stderr=log
        )
        try:
            agent.wait(deadline)
            hung = False
        except subprocess.TimeoutExpired:
            hung = True
            # Workers have sessions of their own: the group of the agent does not hold them.
            for pid in [*descendants(agent.pid), agent.pid]:
                _kill(pid)
            agent.wait()
        seconds = time.monotonic() - begin
        log.seek(0)
        text = log.read()[-TAIL:]
    error = None if agent.returncode == 0 else f"ended with {agent.returncode}"
    return Result(-1, None, error, agent.returncode, seconds, hung, text)


def descendants(pid: int) -> list[int]:
    """Return the processes that a process has started, and those that these have."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:  # pid (name, which may hold spaces) state parent ...
            parent = int(entry.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        children.setdefault(parent, []).append(int(entry.parent.name))
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found[1:]


def free_port() -> int:
    """Return a port that nobody listens on, nor is given while it waits to be used.

    Below those that the system gives to whoever asks for any, as gloo and other tests do, until
    the one who asked here has listened on it.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 32_768)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def _name(function: Callable[..., Any] | str) -> str:
    if isinstance(function, str):
        return function
    return f"{function.__module__}:{function.__qualname__}"


def _start(folder: Path, env: dict[str, str]) -> Any:
    with (folder / f"log.{env['RANK']}").open("wb") as log:
        command = [sys.executable, "-m", "tests.distributed.launch", str(folder)]
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | env,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
        )


def _start_warm(folder: Path, env: dict[str, str]) -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_warm, args=(str(folder), env), daemon=True)
    process.start()
    return process


def _code(process: Any) -> int | None:
    return process.poll() if isinstance(process, subprocess.Popen) else process.exitcode


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _load(file: Path) -> tuple[Any, str | None, float]:
    import torch

    return torch.load(file, weights_only=False)  # our own, written a moment ago


def _warm(folder: str, env: dict[str, str]) -> None:
    os.environ.update(env)
    log = os.open(f"{folder}/log.{env['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    main(folder)


def main(folder: str) -> None:
    """Be one rank: run the scenes and leave what they return in files; never return."""
    faulthandler.enable(2)
    spec = pickle.loads(Path(folder, "spec").read_bytes())
    faulthandler.dump_traceback_later(max(spec["dump_at"] - time.time(), 0.1), file=2)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", timeout=timedelta(seconds=spec["timeout"]))
    failed = False
    for at, (name, args) in enumerate(spec["scenes"]):
        begin = time.monotonic()
        value, error = None, None
        try:
            dist.barrier()
            module, _, function = name.partition(":")
            value = getattr(importlib.import_module(module), function)(rank, world, *args)
        except BaseException as raised:
            traceback.print_exc()
            error, failed = f"{type(raised).__name__}: {raised}", True
        outcome = (value, error, time.monotonic() - begin)
        aside = Path(folder, f"{at}.{rank}.writing")
        torch.save(outcome, aside)
        aside.rename(aside.with_suffix(""))
        if failed:
            break
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if failed else 0)  # whatever hangs at the end of an interpreter


if __name__ == "__main__":
    main(sys.argv[1])
