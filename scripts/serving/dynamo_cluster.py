"""`make dynamo`: Dynamo's frontend and workers of one engine on this machine, on the loopback interface only.

The processes run in an environment with Dynamo and trimode (`make` creates .dynamo). Discovery is by files in a
temporary folder, and events go through a broker, so neither etcd nor NATS is needed.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = ROOT / ".dynamo"
MODEL_NAME = "trimode"
START_SECONDS = 600.0  # on a busy machine
STOP_SECONDS = 120.0


@dataclass
class Worker:
    """system_port: of metrics and health."""

    number: int
    system_port: int
    process: subprocess.Popen[bytes]

    def metrics(self) -> str:
        return _get(f"http://127.0.0.1:{self.system_port}/metrics")

    def instance(self) -> str | None:
        """Its id in discovery; None until its endpoint answers. Raises RuntimeError if the process has ended."""
        if self.process.poll() is not None:
            raise RuntimeError(f"worker {self.number} ended with {self.process.returncode}; its log says why")
        with suppress(urllib.error.URLError, OSError):
            _get(f"http://127.0.0.1:{self.system_port}/health")
            found = re.search(r'worker_id="([0-9a-f]+)"', self.metrics())
            return None if found is None else str(int(found[1], 16))
        return None


@dataclass
class Cluster:
    """A frontend at ``url`` and its workers. logs: folder of one file for each process."""

    engine: Path
    url: str
    logs: Path
    options: Sequence[str]
    variables: dict[str, str]
    environment: Path
    workers: list[Worker] = field(default_factory=list)
    _stack: ExitStack = field(default_factory=ExitStack)

    def start_worker(self, number: int) -> Worker:
        """Start a worker and return at once."""
        port = _system_port()
        command = [str(self.environment / "bin" / "python"), "-m", "trimode", "dynamo", str(self.engine)]
        command += ["--served-model-name", MODEL_NAME, *self.options]
        variables = self.variables | {"DYN_SYSTEM_PORT": str(port)}
        return Worker(number, port, self.start(f"worker-{number}", command, variables))

    def start(self, name: str, command: list[str], variables: dict[str, str]) -> subprocess.Popen[bytes]:
        log: IO[bytes] = self._stack.enter_context((self.logs / f"{name}.log").open("ab"))
        process = subprocess.Popen(command, env=variables, stdout=log, stderr=log, cwd=ROOT, process_group=0)
        self._stack.callback(_stop, process)
        return process

    def replace(self, worker: Worker) -> None:
        """Start another process in the place of one that has ended, and wait until it is ready."""
        self.workers[worker.number] = self.start_worker(worker.number)
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Wait until all workers answer, and the frontend knows all of them. Raises TimeoutError, or RuntimeError."""
        deadline = time.monotonic() + START_SECONDS
        while not self._ready():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not all of Dynamo's processes were ready within {START_SECONDS:.0f} s")
            time.sleep(0.1)

    def frontend_metrics(self) -> str:
        return _get(f"{self.url}/metrics")

    def _ready(self) -> bool:
        instances = [worker.instance() for worker in self.workers]
        with suppress(urllib.error.URLError, OSError):
            known = _get(f"{self.url}/health")
            return MODEL_NAME in _get(f"{self.url}/v1/models") and all(name and name in known for name in instances)
        return False

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


@contextmanager
def dynamo_cluster(
    engine: Path,
    *options: str,
    workers: int = 2,
    router: str = "kv",
    migrations: int = 3,
    http_port: int = 0,
    environment: Path = ENVIRONMENT,
) -> Iterator[Cluster]:
    """A cluster that is ready. options: of `trimode dynamo`. migrations: that a request may make. http_port: of the
    frontend; 0 takes a free one.
    """
    with tempfile.TemporaryDirectory(prefix="trimode-dynamo-") as scratch:
        inward, outward, port = free_port(), free_port(), http_port or free_port()
        variables = os.environ | {
            "DYN_FILE_KV": f"{scratch}/discovery",
            "DYN_DISCOVERY_BACKEND": "file",
            "DYN_ZMQ_BROKER_URL": f"xsub=tcp://127.0.0.1:{inward} , xpub=tcp://127.0.0.1:{outward}",
            "DYN_TCP_RPC_HOST": "127.0.0.1",
            "DYN_TCP_RESPONSE_STREAM_HOST": "127.0.0.1",
            "DYN_SYSTEM_HOST": "127.0.0.1",
            "DYN_EVENT_PLANE_HOST": "127.0.0.1",
            "PYTHONPATH": str(ROOT),
        }
        (Path(scratch) / "discovery").mkdir()
        python = str(environment / "bin" / "python")
        with Cluster(engine, f"http://127.0.0.1:{port}", Path(scratch), options, variables, environment) as cluster:
            broker = [python, "-m", "scripts.serving.event_broker", str(inward), str(outward)]
            cluster.start("broker", broker, variables)
            frontend = [python, "-m", "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", str(port)]
            frontend += ["--router-mode", router, "--migration-limit", str(migrations)]
            cluster.start("frontend", frontend, variables)
            cluster.workers += [cluster.start_worker(number) for number in range(workers)]
            try:
                cluster.wait_until_ready()
            except (RuntimeError, TimeoutError):
                for log in sorted(cluster.logs.glob("*.log")):
                    sys.stderr.write(f"{log.name}: {log.read_text(errors='replace')[-2000:]}\n")
                raise
            yield cluster


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _system_port() -> int:
    """A free port that Dynamo reads: it takes the system's port for a signed 16-bit number."""
    while True:
        port = random.randrange(20000, 32768)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as response:  # noqa: S310 - the URLs are this module's
        text: str = response.read().decode()
    return text


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("engine", type=Path)
    parser.add_argument("--http-port", type=int, default=8000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--router-mode", default="kv", help="as of Dynamo's frontend")
    options, of_worker = parser.parse_known_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    arguments = {"workers": options.workers, "router": options.router_mode, "http_port": options.http_port}
    with dynamo_cluster(options.engine, *of_worker, **arguments) as cluster, suppress(KeyboardInterrupt):
        ports = ", ".join(str(worker.system_port) for worker in cluster.workers)
        print(f"{MODEL_NAME} on {cluster.url}; metrics and health of the workers on ports {ports}", flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
