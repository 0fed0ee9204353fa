"""One progress bar, with an estimate, for all that takes long; no line of it in stored notebooks.

A headless run names a log in LETHE_PROGRESS: there the bars go, and the front door shows the newest
one. Elsewhere a bar is one line on stderr, in JupyterLab too, and is gone when its work is done.
"""

import os
import sys
from typing import Any

from tqdm import tqdm


class Bar(tqdm):
    """tqdm, writing where bars belong; used just like it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        log = os.environ.get("LETHE_PROGRESS")
        self.log = open(log, "a", encoding="utf8") if log else None  # noqa: SIM115
        look = {"mininterval": 1, "leave": False} | kwargs
        super().__init__(*args, **look, file=self.log or sys.stderr)

    def close(self) -> None:
        """End the bar, and its hold on the log."""
        super().close()
        if self.log:
            self.log.close()
