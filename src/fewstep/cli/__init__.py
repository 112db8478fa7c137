"""The command line. Every command is a thin caller of ``jobs``; here are its words, its progress and its exit codes.

0 done; 1 failed while running; 2 bad request; 3 a missing extra; 130 interrupted. An error is one line on
stderr; a traceback comes with -vv alone. With --json stdout has nothing but JSON. Torch is imported inside
the commands, so that ``fewstep --help`` answers at once.
"""

from . import commands as commands  # they add themselves to the group
from .frame import app, main

__all__ = ["app", "main"]
