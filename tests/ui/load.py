"""Many users at once, who speak to the server as the page does."""

import asyncio
import io
import json
import random
import time
import uuid
from collections import Counter
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field

import httpx
from PIL import Image

BUSY = "drawings are waiting already"
PATIENCE = 300.0
"""Seconds, for a machine that does other things too."""


@dataclass
class Seen:
    """What all users saw together."""

    statuses: Counter = field(default_factory=Counter)
    done: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


class User:
    """One browser: draws, uploads, cancels, goes away, each with its own prompt and seed."""

    def __init__(self, url: str, number: int, config: dict, client: httpx.AsyncClient, seen: Seen):
        self.url, self.number, self.client, self.seen = f"{url}/gradio_api", number, client, seen
        self.rng = random.Random(number)
        self.draws = _event(config, lambda d: d["api_name"] == "generate")
        self.stops = _event(config, lambda d: d["api_name"] == "stop")
        self.checks = _event(config, lambda d: (_component(config, "pictures"), "upload") in
                             [tuple(target) for target in d["targets"]])  # fmt: skip

    async def live(self, until: float) -> None:
        """Open a page, use it, close it, open another, until then."""
        while time.monotonic() < until:
            self.session = uuid.uuid4().hex
            heart = asyncio.create_task(self._beat())
            await self._use(until)
            heart.cancel()
            await asyncio.wait([heart])
            if not heart.cancelled():
                self.seen.wrong.append(f"user {self.number}: {heart.exception()!r}")

    async def _use(self, until: float) -> None:
        """Do one thing after the other, until then or until the page is left."""
        ways, way = (self.draw, self.draw, self.upload, self.cancel, self.leave), None
        while way != self.leave and time.monotonic() < until:
            way = self.rng.choice(ways)
            try:
                await way()
            except (httpx.TransportError, TimeoutError) as error:
                self.seen.wrong.append(f"user {self.number}, {way.__name__}: {error!r}")
            await asyncio.sleep(self.rng.uniform(0, 1))

    async def _beat(self) -> None:
        """The connection that tells the server that the page is open."""
        async with self.client.stream("GET", f"{self.url}/heartbeat/{self.session}") as stream:
            async for _ in stream.aiter_lines():
                pass

    @property
    def prompt(self) -> str:
        return f"a photo of <plushbear> of user {self.number}"

    async def draw(self) -> None:
        """A picture, which must be this user's; or the word that the server is busy."""
        seed = self.rng.randrange(2**20)
        message = await self._call(self.draws, self._request(seed))
        if not message["success"]:
            text = str(message["output"].get("error"))
            self.seen.done["busy" if BUSY in text else "error"] += 1
            if BUSY not in text:
                self.seen.wrong.append(text)
            return
        (picture,) = message["output"]["data"][0]
        answer = await self._get(picture["image"]["url"].split("/gradio_api")[-1])
        told = json.loads(Image.open(io.BytesIO(answer.content)).text["sbora"])
        if (told["prompt"], told["seed"]) != (self.prompt, seed):
            self.seen.wrong.append(f"user {self.number} got {told['prompt']!r}")
        self.seen.done["drawn"] += 1

    async def upload(self) -> None:
        """A picture and something else; the first stays, under this user's name for it."""
        buffer = io.BytesIO()
        Image.new("RGB", (64, 64), (self.number, 0, 0)).save(buffer, "PNG")
        own = f"user-{self.number}.png"
        files = [("files", (own, buffer.getvalue())), ("files", ("bad.png", b"<html>"))]
        answer = await self.client.post(f"{self.url}/upload", files=files)
        self.seen.statuses[answer.status_code] += 1
        sent = [
            {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}
            for path, (_, (name, _)) in zip(answer.json(), files, strict=True)
        ]
        message = await self._call(self.checks, [sent])
        kept = [file["orig_name"] for file in message["output"]["data"][0] or []]
        if kept != [own]:
            self.seen.wrong.append(f"user {self.number} uploaded {own} and was shown {kept}")
        self.seen.done["uploaded"] += 1

    async def cancel(self) -> None:
        """Ask for a picture and press Stop."""
        event = await self._join(self.draws, self._request(1, steps=20))
        await asyncio.sleep(self.rng.uniform(0, 0.5))
        body = {"session_hash": self.session, "fn_index": self.draws, "event_id": event}
        await self._post("cancel", body)
        await self._post("run/stop", {"data": [], "session_hash": self.session})
        await self._answer(event)
        self.seen.done["cancelled"] += 1

    async def leave(self) -> None:
        """Ask for a picture and close the page."""
        await self._join(self.draws, self._request(1, steps=4))
        async with self._stream() as stream:
            self.seen.statuses[stream.status_code] += 1
            await asyncio.sleep(self.rng.uniform(0, 0.5))
        self.seen.done["left"] += 1

    def _request(self, seed: int, steps: int = 1) -> list:
        return [self.prompt, {"plushbear": 1.0}, seed, 1, steps, 4, "", "", ""]

    async def _call(self, event: int, data: list) -> dict:
        return await self._answer(await self._join(event, data))

    async def _join(self, event: int, data: list) -> str:
        body = {"data": data, "fn_index": event, "session_hash": self.session, "trigger_id": None}
        return (await self._post("queue/join", body))["event_id"]

    async def _answer(self, event: str) -> dict:
        """How an event ended; the stream is read until the server closes it."""
        answer = None
        async with asyncio.timeout(PATIENCE), self._stream() as stream:
            self.seen.statuses[stream.status_code] += 1
            async for line in stream.aiter_lines():
                message = json.loads(line[5:]) if line.startswith("data:") else {}
                if (message.get("msg"), message.get("event_id")) == ("process_completed", event):
                    answer = message
        if answer is None:
            raise TimeoutError("the server closed the stream")
        return answer

    def _stream(self) -> AbstractAsyncContextManager[httpx.Response]:
        return self.client.stream("GET", f"{self.url}/queue/data?session_hash={self.session}")

    async def _post(self, place: str, body: dict) -> dict:
        answer = await self.client.post(f"{self.url}/{place}", json=body)
        self.seen.statuses[answer.status_code] += 1
        return answer.json()

    async def _get(self, place: str) -> httpx.Response:
        answer = await self.client.get(f"{self.url}{place}")
        self.seen.statuses[answer.status_code] += 1
        return answer


async def crowd(url: str, users: int, seconds: float) -> Seen:
    """All users, for so long."""
    # The server closes what idles for five seconds, httpx's default too: the two would meet.
    seen, limits = Seen(), httpx.Limits(max_connections=4 * users, keepalive_expiry=2)
    async with httpx.AsyncClient(timeout=PATIENCE, limits=limits) as client:
        config = (await client.get(f"{url}/config")).json()
        until = time.monotonic() + seconds
        await asyncio.gather(*(User(url, k, config, client, seen).live(until)
                               for k in range(users)))  # fmt: skip
    return seen


def _component(config: dict, elem_id: str) -> int:
    (found,) = (c["id"] for c in config["components"] if c["props"].get("elem_id") == elem_id)
    return found


def _event(config: dict, wanted) -> int:
    return next(d["id"] for d in config["dependencies"] if wanted(d))
