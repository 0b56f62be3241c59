"""Signs of life between the processes of a run, which do not depend on the collectives: these hang when somebody is gone."""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging

# Seconds between two signs of life, and without one until a process counts as gone.
HEARTBEAT, SILENCE = 2.0, 20.0
# Seconds that process 0 stays to let the others read why it ends: the service ends with it, and jax then kills them without a word.
LAST_WORDS = 5 * HEARTBEAT
# Seconds without a finished step after which it is said who stands where; a compilation of a large model takes minutes.
STALLED = 300.0
# At a meeting of all, where one that waits knows whom for: seconds after which it says so.
MEETING, LATE = "meeting", 10.0
# Where a process is before its first meeting.
STARTING = "the start"


def client() -> Any:
    """The coordination service's store of keys."""
    from jax._src import distributed  # there is no public way to it

    return distributed.global_state.client


class Lifeline(threading.Thread):
    """Gives signs of life and looks for those of the others; ends the process when one is gone."""

    def __init__(self) -> None:
        super().__init__(name="lifeline", daemon=True)
        self.at = STARTING
        self._index, self._beat, self._left = jax.process_index(), 0, False
        self._seen: dict[int, tuple[dict[str, Any], float]] = {}
        self._moved, self._patience = (self.at, time.monotonic()), STALLED

    def run(self) -> None:
        """Until the process leaves."""
        while not self._left:
            try:
                self._say()
                said = client().key_value_dir_get("panacea/alive/")
            except Exception as error:
                if not self._left:
                    logging.info("coordination service: %s", error)
                    self._end("process 0, which coordinates, does not answer")
                return
            self._look({int(k.rpartition("/")[2]): json.loads(v) for k, v in said})
            time.sleep(HEARTBEAT)

    def leave(self, message: str, code: int) -> None:
        """Tell the others that this process ends."""
        self._left = True
        try:
            self._say(message or "done", code)
        except Exception:  # the coordinator is gone already
            return
        if message and self._index == 0:
            time.sleep(LAST_WORDS)

    def _say(self, end: str = "", code: int = 1) -> None:
        self._beat += 1
        sign = {
            "host": socket.gethostname(),
            "beat": self._beat,
            "at": self.at,
            "end": end,
            "code": code,
        }
        client().key_value_set(
            f"panacea/alive/{self._index}", json.dumps(sign), allow_overwrite=True
        )

    def _look(self, said: Mapping[int, dict[str, Any]]) -> None:
        now = time.monotonic()
        for index in range(jax.process_count()):
            sign = said.get(index, {"end": "", "host": "?", "at": STARTING, "code": 1})
            if index == self._index or sign["end"] == "done":
                continue
            if sign["end"]:
                self._end(f"process {index} ({sign['host']}) stopped: {sign['end']}", sign["code"])
            if index not in self._seen or self._seen[index][0] != sign:
                self._seen[index] = sign, now
            elif now - self._seen[index][1] > SILENCE:
                self._end(
                    f"process {index} ({sign['host']}) gives no sign of life since {SILENCE:.0f} s"
                )
        if self.at != self._moved[0]:
            self._moved, self._patience = (self.at, now), LATE if self.at.startswith(MEETING) else STALLED
        elif now - self._moved[1] > self._patience:
            where = {i: f"{i} ({said[i]['host']}): {said[i]['at']}" for i in sorted(said)}
            if late := [text for i, text in where.items() if said[i]["at"] != self.at and i != self._index]:
                until = f"until they come, or one gives no sign of life for {SILENCE:.0f} s"
                logging.warning("waiting for %.0f s for processes %s; %s", self._patience, ", ".join(late), until)
            else:
                logging.warning("nothing finished for %.0f s; processes are at %s", self._patience, ", ".join(where.values()))
            self._patience *= 2  # a judge may take hours

    def _end(self, why: str, code: int = 1) -> None:
        print(
            f"panacea: {why}; process {self._index} stops too. Start all of them again with the same command to go on from the last "
            "checkpoint",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        if self._index == 0:
            self.leave(why, code)
        os._exit(code)  # the main thread may hang in a collective
