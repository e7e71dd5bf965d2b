"""One viewer's WebSocket: what comes is read, limited, and asked of the engine, message after message."""

import asyncio
import json
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from starlette.websockets import WebSocket
from torch import Tensor

from distill.live import protocol, uploads
from distill.live.viewer import Viewer
from teachers.encoders.small import SAMPLE_RATE
from teachers.errors import UserError

log = logging.getLogger(__name__)
INBOX = 256  # messages of a page that wait until the one before is done
SMALL = 2**16  # bytes of a message
MOST_LARGE = 3  # larger messages of a page, at work or waiting; more are refused
MAX_MISTAKES = 20
SILENT_SECONDS = 30.0  # a page that says nothing for so long is gone
OPEN_SECONDS = 60.0  # and one that never opens a stream
KINDS = {message: name for name, message in protocol.MESSAGES.items()}


def is_large(message: Mapping[str, Any]) -> bool:
    """Whether a message is one of which only `MOST_LARGE` are kept."""
    return len(message.get("bytes") or message.get("text") or "") > SMALL


class Connection:
    """`server` is the `distill.live.server.Server`; `put` takes what is sent to the page, in the event loop."""

    def __init__(self, server: Any, page: WebSocket, viewer: Viewer, put: Callable[[dict | bytes], None]):
        self.server, self.page, self.viewer, self.put = server, page, viewer, put
        self.inbox: asyncio.Queue[Any] = asyncio.Queue(INBOX)
        self.large = 0  # messages, at work or waiting
        self.picture: Tensor | None = None  # the one that was sent last

    def _tell(self, function: Any, *given: Any) -> None:
        """Ask the engine for what comes many times a second, and wait for nothing; what is wrong is said when it is known."""

        def done(future: Any) -> None:
            error = None if future.cancelled() else future.exception()
            if isinstance(error, UserError):
                self._note_mistake(error)
            elif error is not None:
                log.error("a viewer's message failed", exc_info=error)

        self.server.engine.call(function, *given, of=self.viewer).add_done_callback(done)

    def _note_mistake(self, error: UserError) -> None:
        """From any thread."""
        self.viewer.mistakes += 1
        self.server.mistakes += 1
        self.viewer.emit({"type": "error", "message": str(error)[:300]})

    async def send(self, queue: asyncio.Queue) -> None:
        """Pass on what is put into the queue."""
        while True:
            message = await queue.get()
            if isinstance(message, bytes):
                await self.page.send_bytes(message)
            else:
                await self.page.send_text(json.dumps(message))

    async def _read(self) -> None:
        """Put every message into the inbox as it comes, or refuse it: a connection that is not read answers no pings and is cut
        off."""
        message: Any = {}
        while message.get("type") != "websocket.disconnect":
            try:
                message = await self.page.receive()
            except (RuntimeError, OSError):
                message = {"type": "websocket.disconnect"}
            if is_large(message) and self.large == MOST_LARGE:
                self._note_mistake(
                    UserError(f"{MOST_LARGE} files or long messages wait: one more is refused; send it later")
                )
                continue
            self.large += is_large(message)
            await self.inbox.put(message)

    async def receive(self) -> None:
        """Message after message, each done before the next is begun, but for those that come many times a second."""
        reader = asyncio.create_task(self._read())
        try:
            await self._answer()
        finally:
            reader.cancel()
            with suppress(asyncio.CancelledError):
                await reader

    async def _answer(self) -> None:
        viewer, greeted = self.viewer, False
        while viewer.mistakes < MAX_MISTAKES:
            patience = SILENT_SECONDS if viewer.session is not None else OPEN_SECONDS
            try:
                message = await asyncio.wait_for(self.inbox.get(), patience)
            except TimeoutError:
                self.put({"type": "error", "message": f"no message from this page for {patience:.0f} s: closed"})
                await asyncio.sleep(0.1)
                return
            if message["type"] == "websocket.disconnect":
                return
            try:
                if not greeted:
                    await self._greeted(protocol.check_hello(message.get("text")))
                    greeted = True
                elif message.get("bytes") is not None:
                    await self._binary(message["bytes"])
                else:
                    await self._handle(protocol.parse(message.get("text") or ""))
            except UserError as error:
                self._note_mistake(error)
                if isinstance(error, protocol.ProtocolError):
                    await asyncio.sleep(0.1)
                    return
            finally:
                self.large -= is_large(message)
        # behind the last one
        viewer.emit({"type": "error", "message": f"{MAX_MISTAKES} messages were refused: closed"})
        await asyncio.sleep(0.1)

    async def _greeted(self, hello: protocol.Hello) -> None:
        """What is sent from now on is packed as the client wants it."""
        viewer, spec = self.viewer, self.viewer.spec
        pack = protocol.packer(hello, (spec.height, spec.width), spec.fps)
        await self.server.ask(setattr, viewer, "pack", pack, of=viewer)

    async def _binary(self, data: bytes) -> None:
        viewer, server = self.viewer, self.server
        kind, content = protocol.unpack(data)
        if kind in (protocol.IMAGE, protocol.FILE):
            viewer.allowance.take("upload", time.monotonic())
        else:
            what = "speech" if kind == protocol.SPEECH else "sound"
            viewer.allowance.take(what, time.monotonic(), len(content) / (2 * SAMPLE_RATE))
        if kind == protocol.IMAGE:
            size = (viewer.spec.height, viewer.spec.width)
            sent, note = await asyncio.to_thread(
                server.decoders.run, uploads.decode_picture, content, size, server.options.crop
            )
            notes = [note, *await self._unlike(sent, "")]
            self.picture = sent
            image = await asyncio.to_thread(protocol.to_data_url, sent)
            self.put({"type": "portrait", "image": image, "note": "; ".join(filter(None, notes))})
        elif kind == protocol.FILE:
            sound, _ = await asyncio.to_thread(server.decoders.run, uploads.decode_file, content)
            await self._say(sound)
        elif kind == protocol.SPEECH:
            self._tell(viewer.speak, protocol.to_sound(content), time.monotonic())
        else:
            self._tell(viewer.feed, protocol.to_sound(content), time.monotonic())

    async def _unlike(self, reference: Tensor | None, text: str) -> list[str]:
        """Why a picture and a text are outside what the student was trained on, in lines; UserError where such are refused."""
        lines = await asyncio.to_thread(self.server.engine.bundle.unlike, reference, text)
        if self.server.options.strict and lines:
            raise UserError(f"{lines[0]}; this server takes no such input")
        return lines

    async def _check_coverage(self, reference: Tensor | None, text: str) -> None:
        """A note on the page for a picture and a text outside what the student was trained on; UserError where that is refused."""
        if lines := await self._unlike(reference, text):
            self.put({"type": "note", "message": "; ".join(lines)})

    async def _handle(self, message: Any) -> None:
        viewer, now = self.viewer, time.monotonic()
        viewer.allowance.take(KINDS[type(message)], now)
        if isinstance(message, protocol.Open):
            reference = self._reference(message)
            sent = message.portrait is None  # its notes have been sent
            await self._check_coverage(None if sent else reference, message.text)
            await self.server.ask(viewer.open, reference, message.text, message.seed, now, of=viewer)
        elif isinstance(message, protocol.Say):
            if not message.text.strip():
                raise UserError("nothing to say: the sentence is empty")
            await self._say(message.text)
        elif isinstance(message, protocol.SetText):
            await self._check_coverage(None, message.text)
            await self.server.ask(lambda: viewer.set_text(message.text, time.monotonic()), of=viewer)
        elif isinstance(message, protocol.Guide):
            await self.server.ask(lambda: viewer.guide(message.scales, time.monotonic()), of=viewer)
        elif isinstance(message, protocol.Spoken):
            self._tell(viewer.spoken)
        elif isinstance(message, protocol.Interrupt):
            await self.server.ask(lambda: viewer.interrupt(time.monotonic()), of=viewer)
        elif isinstance(message, protocol.Played):
            self._tell(viewer.played, message.frame, message.epoch, now)
        elif isinstance(message, protocol.Microphone):
            await self.server.ask(viewer.microphone, message.on, now, of=viewer)
        elif isinstance(message, protocol.Seen) and 0 <= message.ms < 600_000:
            self.server.seen.add(message.ms / 1000)

    async def _say(self, utterance: str | Tensor) -> None:
        """The talker begins at once, and not behind the batch that is being drawn."""
        now = time.monotonic()
        turn = self.viewer.answer(utterance, now)
        try:
            await self.server.ask(self.viewer.say, turn, now, of=self.viewer)
        except BaseException:
            turn.cancel()
            raise

    def _reference(self, message: protocol.Open) -> Tensor:
        portraits = self.server.portraits
        if message.portrait is None and self.picture is not None:
            return self.picture
        if message.portrait is None or not 0 <= message.portrait < len(portraits):
            raise UserError(f"no portrait {message.portrait}: choose 0..{len(portraits) - 1} or send a picture first")
        return portraits[message.portrait]
