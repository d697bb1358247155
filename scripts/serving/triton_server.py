"""`make triton`: a real tritonserver for one engine, on the CPU, from the wheel nvidia-pytriton.

Runs in an environment with the wheel and trimode (`make` creates .triton). It uses the wheel's server binary and Python
backend only, not its Python layer.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from trimode.runtime.triton.repository import ENSEMBLE_NAME, MODEL_NAME

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = ROOT / ".triton"
START_SECONDS = 600.0  # on a busy machine
STOP_SECONDS = 120.0


class Ports(NamedTuple):
    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002


@contextmanager
def triton_server(
    engine: Path, ports: Ports, *options: str, environment: Path = ENVIRONMENT
) -> Iterator[subprocess.Popen[bytes]]:
    """A server that is ready. ``options``: of `trimode triton`. Raises TimeoutError or RuntimeError if it does not
    become ready.
    """
    with tempfile.TemporaryDirectory(prefix="trimode-triton-") as scratch:
        repository, backends = Path(scratch) / "repository", Path(scratch) / "backends"
        subprocess.run([environment / "bin" / "trimode", "triton", engine, repository, *options], check=True)
        site = Path(_output(environment, "import sysconfig; print(sysconfig.get_path('purelib'))"))
        triton = site / "pytriton" / "tritonserver"
        _lay_out_backends(triton, backends)
        process = subprocess.Popen(
            [
                triton / "bin" / "tritonserver",
                f"--model-repository={repository}",
                f"--backend-directory={backends}",
                *(f"--{kind}-address=127.0.0.1" for kind in ("http", "grpc", "metrics")),
                *(f"--{kind}-port={port}" for kind, port in ports._asdict().items()),
                "--log-info=false",
                "--log-warning=false",
            ],
            env=_environment_variables(environment, site),
            process_group=0,
        )
        try:
            _wait_until_ready(process, ports)
            yield process
        finally:
            _stop(process)


def _lay_out_backends(triton: Path, backends: Path) -> None:
    """The Python backend expects its stub in its own folder; the wheel has one for each version of Python."""
    shutil.copytree(triton / "backends", backends)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = triton / "python_backend_stubs" / version / "triton_python_backend_stub"
    shutil.copy2(stub, backends / "python")


def _environment_variables(environment: Path, site: Path) -> dict[str, str]:
    """The stub finds its packages by the first python on PATH, and libpython by LD_LIBRARY_PATH. Without the libraries
    the server hangs instead of failing.
    """
    libraries = [sysconfig.get_config_var("LIBDIR"), site / "nvidia_pytriton.libs"]
    return os.environ | {
        "PATH": f"{environment / 'bin'}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": ":".join(str(folder) for folder in libraries),
    }


def _output(environment: Path, program: str) -> str:
    command = [environment / "bin" / "python", "-c", program]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _wait_until_ready(process: subprocess.Popen[bytes], ports: Ports) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"tritonserver ended with {process.returncode}; its messages are above")
        with suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{ports.http}/v2/health/ready", timeout=1)
            return
        time.sleep(0.1)
    raise TimeoutError(f"tritonserver was not ready within {START_SECONDS:.0f} s")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the stub is a child process
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("engine", type=Path)
    parser.add_argument("--http-port", type=int, default=Ports().http)
    parser.add_argument("--grpc-port", type=int, default=Ports().grpc)
    parser.add_argument("--metrics-port", type=int, default=Ports().metrics)
    parser.add_argument("--no-decoupled", action="store_true", help="as of `trimode triton`")
    options = parser.parse_args()
    ports = Ports(options.http_port, options.grpc_port, options.metrics_port)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    policy = ["--no-decoupled"] if options.no_decoupled else []
    with triton_server(options.engine, ports, *policy) as process, suppress(KeyboardInterrupt):
        models = f"{MODEL_NAME} and {ENSEMBLE_NAME}"
        print(f"{models} on http://127.0.0.1:{ports.http}, grpc {ports.grpc}, metrics {ports.metrics}", flush=True)
        process.wait()


if __name__ == "__main__":
    main()
