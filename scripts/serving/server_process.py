"""`trimode serve` in its own process, for tests and load."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

KEY = "sk-of-the-tests"
START_SECONDS = 600.0  # on a busy machine


@dataclass(frozen=True)
class Served:
    """``log``: lines on stderr since the server listens."""

    url: str
    process: subprocess.Popen[str]
    log: list[str]

    def metrics(self) -> dict[str, float]:
        """Samples of /metrics without labels."""
        text = httpx.get(f"{self.url}/metrics", headers={"authorization": f"Bearer {KEY}"}, timeout=60).text
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return {sample.name: sample.value for sample in samples if not sample.labels}

    def wait_until_idle(self, seconds: float) -> None:
        """Raises TimeoutError if an answer still runs or waits after ``seconds``."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            found = self.metrics()
            if found["trimode_requests_running"] == found["trimode_requests_waiting"] == 0:
                return
            time.sleep(0.02)
        raise TimeoutError(f"an answer still runs after {seconds} s")

    def resident_mib(self) -> float:
        return self._mib("VmRSS")

    def peak_mib(self) -> float:
        """The largest resident size so far."""
        return self._mib("VmHWM")

    def _mib(self, field: str) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        found = re.search(rf"{field}:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) / 1024

    def cpu_seconds(self) -> float:
        """Processor time of all threads so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)


@contextmanager
def serving(engine: Path, *options: str, key: str = KEY, name: str | None = "tiny") -> Iterator[Served]:
    """A server on a free port of the loopback interface. ``name``: the served name; None for the engine's own.

    Raises RuntimeError if the server does not start.
    """
    command = [sys.executable, "-c", "from trimode.cli.main import main; main()", "serve", str(engine)]
    environment = os.environ | {"TRIMODE_API_KEY": key}
    arguments = ["--port", "0", *(["--served-model-name", name] if name else []), *options]
    process = subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    guard = threading.Timer(START_SECONDS, process.kill)
    guard.start()
    log: list[str] = []
    try:
        said, found = "", None
        while found is None and (line := process.stderr.readline()):
            said += line
            found = re.search(r"http://\S+", line)
        guard.cancel()
        if found is None:
            raise RuntimeError(f"the server did not start: {said}")
        threading.Thread(target=log.extend, args=(process.stderr,), daemon=True).start()
        yield Served(found[0], process, log)
    finally:
        guard.cancel()
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(120)
        process.kill()
        process.wait()
