"""A worker that is a child process: it may crash, hang or be killed without harm to the run.

The child builds the problem once from the settings and the run's dense weights, then answers policies: a line of JSON
each way. Nothing else travels, so a policy scores the same in the child as here. A child that dies or exceeds the time
of a trial costs that trial; the next one starts another child.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from amc.catalog import ALONE
from amc.problem import Worth
from amc.seeding import seeded
from search.executor import EvaluationFailed, scored
from search.settings import Settings, settings_from

_CHILD = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from search.child import serve; serve()"


class Isolated:
    """Scores policies in a child process: widths by group name -> what they are worth.

    timeout: seconds that a score may take, the child's start aside, and a longer fine-tune in proportion to its steps;
        None: as long as it takes.
    environment: variables that the child sees in place of ours.
    """

    def __init__(
        self,
        settings: Settings,
        dense_weights: Path,
        *,
        timeout: float | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._settings = settings_of_worker(settings)
        self._dense_weights, self._timeout = dense_weights, timeout
        self._environment = dict(environment or {})
        self._child: subprocess.Popen[bytes] | None = None

    def __call__(self, widths: Mapping[str, int], steps: int | None = None) -> Worth:
        """What one policy is worth as scored, or after a fine-tune of so many steps.

        Raises:
            EvaluationFailed: the child failed, died or was killed for being late; the message says which.
        """
        self.start()
        longer = 1.0 if steps is None else max(steps / max(self._settings.score_steps, 1), 1.0)
        timeout = None if self._timeout is None else longer * self._timeout
        answer = self._ask({"widths": dict(widths), "steps": steps}, timeout)
        return Worth(*map(float, answer["worth"]))

    def kill(self) -> None:
        """Kills the child, whatever it does; whoever waits for its answer is told."""
        child = self._child
        if child is not None:
            child.kill()

    def close(self) -> None:
        """Ends the child."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            for pipe in (self._child.stdin, self._child.stdout):
                assert pipe is not None
                pipe.close()
            self._child = None

    def start(self) -> None:
        """Starts the child, unless there is one.

        Raises:
            EvaluationFailed: it could not build the problem.
        """
        if self._child is not None:
            return
        self._child = subprocess.Popen(
            [sys.executable, "-c", _CHILD, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,  # a Ctrl-C is for us to answer
            env={**os.environ, **self._environment},
        )
        try:
            self._ask({"settings": self._settings.as_json(), "dense_weights": str(self._dense_weights)}, None)
        except EvaluationFailed:
            self.close()
            raise

    def _ask(self, question: Any, timeout: float | None) -> dict[str, Any]:
        child = self._child
        assert child is not None
        assert child.stdin is not None
        assert child.stdout is not None
        line = b""
        try:
            child.stdin.write(json.dumps(question).encode() + b"\n")
            if not select.select([child.stdout], [], [], timeout)[0]:
                self.close()
                raise EvaluationFailed(f"it took longer than --trial-timeout {timeout:g}s, and was ended")
            line = child.stdout.readline()
        except BrokenPipeError:
            pass
        except BaseException:
            self.close()
            raise
        if not line.endswith(b"\n"):
            status = child.wait()
            self.close()
            raise EvaluationFailed(f"the process that evaluated it {_fate(status)}")
        answer = json.loads(line)
        if "error" in answer:
            raise EvaluationFailed(answer["error"])
        return answer


def settings_of_worker(settings: Settings) -> Settings:
    """What a worker builds its problem from: it scores, and knows of no budget, no device and no other workers."""
    alone = replace(settings, isolate=False, trial_timeout=None, workers=1)
    reward = settings.reward if settings.reward in ALONE else "accuracy"
    return replace(alone, budget=(), reward=reward, device="local", latency_providers=("cpu",))


def _fate(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"was killed by {name}" + (" (out of memory, perhaps)" if name == "SIGKILL" else "")


def serve() -> None:
    """The child: reads the settings, then policies, from standard input, and answers each by a line."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a model prints is no answer
    questions = sys.stdin.buffer
    lines: list[bytes] = []
    arrived = threading.Semaphore(0)

    def read() -> None:
        for line in questions:
            lines.append(line)
            arrived.release()
        os._exit(0)  # nobody waits for an answer any more, however long the evaluation takes

    threading.Thread(target=read, daemon=True).start()

    def question() -> Any:
        arrived.acquire()
        return json.loads(lines.pop(0))

    def answer(**content: Any) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    from search.compose import compose

    start = question()
    try:
        settings = settings_from(start["settings"])
        setup = compose(settings, dense_weights=Path(start["dense_weights"]), budget_required=False)
    except Exception as error:
        answer(error=f"the process that evaluates could not start: {type(error).__name__}: {error}")
        return
    answer()
    while True:
        asked = question()
        try:
            with seeded(settings.seed, "evaluate"):
                worth = scored(setup.evaluator, asked["widths"], asked["steps"])
        except Exception as error:
            answer(error=f"{type(error).__name__}: {error}")
        else:
            answer(worth=worth)
