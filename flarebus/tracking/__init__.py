"""Trackers: TensorBoard, MLflow, Weights & Biases, and what one implements to be another.

A tracker is found by name, loads its library when the job starts, and works on a thread of its own: a slow one loses
records, a broken one all of them, and neither costs the job anything.
"""

from __future__ import annotations

from flarebus.tracking.tracker import JOB, Point, RunInfo, Tracker

__all__ = ["JOB", "Point", "RunInfo", "Tracker"]
