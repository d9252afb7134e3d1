"""A virtual source inside the service: what its process has."""

import asyncio
import json
import os
import re
import threading
from collections import Counter

from downloadview_async import VirtualFile


async def make(name: str) -> VirtualFile:
    """Return the tasks and threads of the process that answers."""
    tasks = Counter(getattr(task.get_coro(), "__qualname__", "?") for task in asyncio.all_tasks())
    state = {
        "pid": os.getpid(),
        "tasks": tasks,
        "threads": Counter(
            "pooled" if re.search("AnyIO|_[0-9]+$", thread.name) else re.sub("-[0-9]+", "", thread.name)
            for thread in threading.enumerate()
        ),
    }
    return VirtualFile(json.dumps(state).encode(), name="state.json")
