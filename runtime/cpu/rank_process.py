"""The process of one rank of target ``cpu``: ``python -m trimode.runtime.cpu.rank_process SOCKET``."""

from __future__ import annotations

from trimode.runtime.cpu.cpu_rank_executor import CpuRankExecutor
from trimode.runtime.ranks.rank_loop import follow

if __name__ == "__main__":
    follow(CpuRankExecutor)
