"""The process of one rank of target ``cuda``: ``python -m trimode.runtime.cuda.rank_process SOCKET``."""

from __future__ import annotations

from trimode.runtime.cuda.cuda_rank_executor import CudaRankExecutor
from trimode.runtime.ranks.rank_loop import follow

if __name__ == "__main__":
    follow(CudaRankExecutor)
