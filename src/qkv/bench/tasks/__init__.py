"""The tasks of the bench, one file each, found by file name; `task` and `tasks` look them up."""

from qkv.bench.tasks._task import Bench, Outcome, Settings, Task, Trial, task, tasks

__all__ = ["Bench", "Outcome", "Settings", "Task", "Trial", "task", "tasks"]
