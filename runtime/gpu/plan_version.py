"""Versions of TensorRT and TensorRT-RTX: a plan runs in the release that built it."""

from __future__ import annotations


def release(version: str) -> list[str]:
    """The part of a version that a plan depends on: 11.4.0 of 11.4.0.106."""
    return version.split(".")[:3]
