"""Diffusers in and out: one recorder for every pipeline, contracts, and folders that plain diffusers runs.

Importing this package imports no diffusers; functions do, when they need it.
"""

from __future__ import annotations

from .configs import Reading, read_config
from .contract import CONTRACT, Contract, Steps
from .image import write_image
from .recorded import Recorded
from .recorder import Recording, record
from .schedules import Schedule, read_schedule
from .student import (
    Check,
    LoadedStudent,
    check_student,
    load_student,
    refuse_homeless,
    save_student,
    save_teacher,
    weights_sha256,
)
from .teacher import Teacher, load_teacher, packaged

__all__ = [
    "CONTRACT",
    "Check",
    "Contract",
    "LoadedStudent",
    "Reading",
    "Recorded",
    "Recording",
    "Schedule",
    "Steps",
    "Teacher",
    "check_student",
    "load_student",
    "load_teacher",
    "packaged",
    "read_config",
    "read_schedule",
    "record",
    "refuse_homeless",
    "save_student",
    "save_teacher",
    "weights_sha256",
    "write_image",
]
