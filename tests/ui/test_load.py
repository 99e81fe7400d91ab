"""Fifty users at once; SBORA_LOAD_SECONDS says how long, two minutes by default."""

import asyncio
import os
import statistics
import threading
import time

import psutil
import pytest

from tests.ui.conftest import end, serve
from tests.ui.load import crowd

USERS = 50
SECONDS = float(os.environ.get("SBORA_LOAD_SECONDS", "120"))
WARM_SECONDS = 20.0


class Memory(threading.Thread):
    """Samples what a process holds, in MiB, twice a second."""

    def __init__(self, process: int):
        super().__init__(daemon=True)
        self.process, self.samples, self.done = psutil.Process(process), [], threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.5):
            self.samples.append(self.process.memory_info().rss / 2**20)

    def growth(self) -> float:
        """Of the last quarter over the second, in its share; the first one fills caches."""
        quarter = len(self.samples) // 4
        early = statistics.median(self.samples[quarter : 2 * quarter])
        return statistics.median(self.samples[-quarter:]) / early - 1


@pytest.fixture
def alone(tmp_path):
    app = serve(tmp_path)
    yield app
    end(app)


def test_fifty_users_get_their_own_pictures_or_hear_that_it_is_busy(alone, record_property):
    asyncio.run(crowd(alone.url, USERS, WARM_SECONDS))
    memory = Memory(alone.process.pid)
    memory.start()
    began = time.monotonic()
    seen = asyncio.run(crowd(alone.url, USERS, SECONDS))
    memory.done.set()
    figures = {
        "users": USERS, "seconds": round(time.monotonic() - began), **seen.done,
        "requests": sum(seen.statuses.values()), "MiB": round(memory.samples[-1]),
        "memory growth": f"{memory.growth():+.1%}",
    }  # fmt: skip
    print("\nload:", figures)
    for name, value in figures.items():
        record_property(f"19 {name}", value)
    assert [status for status in seen.statuses if status >= 400] == [], seen.statuses
    assert seen.wrong == []
    assert seen.done["busy"] > 0
    assert seen.done["drawn"] >= 25
    assert min(seen.done[way] for way in ("uploaded", "cancelled", "left")) > 0
    assert memory.growth() < 0.05
    assert asyncio.run(crowd(alone.url, 1, 3)).wrong == []
