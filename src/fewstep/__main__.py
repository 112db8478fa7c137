"""``python -m fewstep`` is the command ``fewstep``."""

from .cli import main

main()
