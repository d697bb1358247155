"""The start-up of MPI: the side of PMI-1 that a launcher such as ``mpiexec`` has.

PMI-1 is how the processes of an MPI job find each other in MPICH and the MPIs that descend from it. Each process has a
socket to its launcher, whose number it reads from ``PMI_FD``. It sends lines such as
``cmd=put kvsname=k key=a value=b`` and waits for an answer to each. The launcher keeps the values and releases the
barriers; nothing else is shared, and no port is opened.
"""

from __future__ import annotations

import os
import socket

from trimode.common.errors import TriModeError

# Ranks run on one machine: shared memory is their only transport, so MPI binds no port either.
_TRANSPORT = {"MPIR_CVAR_CH4_NETMOD": "ucx", "UCX_TLS": "self,posix", "UCX_LOG_LEVEL": "error"}
# Variables by which another launcher, such as Slurm's, would make each rank a part of its own job.
_FOREIGN = ("PMI_", "PMI2_", "PMIX_", "HYDRA_", "SLURM_", "OMPI_", "PRTE_")
_LIMITS = "cmd=maxes kvsname_max=256 keylen_max=64 vallen_max=1024"


def environment(rank: int, ranks: int, descriptor: int) -> dict[str, str]:
    """The environment of a rank's process, which inherits the descriptor of its socket."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    job = {"PMI_FD": str(descriptor), "PMI_RANK": str(rank), "PMI_SIZE": str(ranks)}
    return inherited | _TRANSPORT | job


class StartUp:
    """Answers the ranks of one job. name: of the job; MPI names its shared memory after it, so it must be unique."""

    def __init__(self, sockets: list[socket.socket], name: str) -> None:
        self._sockets = sockets
        self._name = name
        self._values: dict[str, str] = {}
        self._unread = [b""] * len(sockets)
        self._waiting: set[int] = set()

    def receive(self, rank: int, data: bytes) -> None:
        """Answer what a rank has sent; ``data`` may end within a line."""
        *lines, self._unread[rank] = (self._unread[rank] + data).split(b"\n")
        for line in lines:
            fields = dict(word.split("=", 1) for word in line.decode().split() if "=" in word)
            if fields.get("cmd") == "barrier_in":
                self._waiting.add(rank)
                if len(self._waiting) == len(self._sockets):
                    self._waiting.clear()
                    for each in range(len(self._sockets)):
                        self._send(each, "cmd=barrier_out")
            else:
                self._send(rank, self._answer(fields))

    def _answer(self, fields: dict[str, str]) -> str:
        match fields.get("cmd"):
            case "init":
                return "cmd=response_to_init pmi_version=1 pmi_subversion=1 rc=0"
            case "get_maxes":
                return _LIMITS
            case "get_appnum":
                return "cmd=appnum appnum=0"
            case "get_universe_size":
                return f"cmd=universe_size size={len(self._sockets)}"
            case "get_my_kvsname":
                return f"cmd=my_kvsname kvsname={self._name}"
            case "put":
                self._values[fields["key"]] = fields["value"]
                return "cmd=put_result rc=0 msg=success"
            case "get":
                if (value := self._values.get(fields["key"])) is None:
                    return "cmd=get_result rc=-1 msg=not_found value=unknown"
                return f"cmd=get_result rc=0 msg=success value={value}"
            case "finalize":
                return "cmd=finalize_ack"
            case command:
                raise TriModeError(f"MPI asks for {command!r} at its start-up, which is not supported; install mpich 5")

    def _send(self, rank: int, line: str) -> None:
        self._sockets[rank].sendall(line.encode() + b"\n")
