"""The LiveKit door with livekit-agents' own classes on both sides of a room without a server."""

import asyncio
import json
import time
import urllib.error
import urllib.request
from contextlib import asynccontextmanager, contextmanager
from itertools import pairwise

import numpy as np
import pytest

pytest.importorskip("livekit.agents", reason="the LiveKit door: pip install 'avatar-distill[livekit]'")

import jwt
from livekit import rtc
from livekit.agents.voice.avatar import DataStreamAudioOutput

from benchmarks.serving.livekit_room import Room, Tape, a_room
from distill.cli import main
from distill.live.doors import livekit_agent as door
from distill.live.doors.stream import AvatarStream
from distill.live.scheduler import Engine
from distill.live.server import Options
from distill.live.talkers import Echo
from teachers.errors import UserError
from tests.distill.live.doors.test_stream import tone
from tests.support import tiny
from tests.support.live.lag import run_in_time
from tests.support.live.serving import a_puppet, eventually, running
from tests.support.live.watched import Watched

RATE, FRAME = 24_000, 0.08


@asynccontextmanager
async def a_call(engine: Engine | None = None):
    """An agent's audio output, what the avatar publishes, and its engine."""
    engine = engine or Engine(a_puppet(), Echo(), 2)
    engine.start()
    agent, avatar = a_room()
    receiver = door.receiver_of(avatar, "agent")
    playing = asyncio.create_task(door.play(engine, avatar, receiver, tiny.a_portrait(), "a person nods", 7))
    output = DataStreamAudioOutput(agent, destination_identity="avatar", wait_playback_start=True)
    tape = Watched()
    recording = Tape(avatar.local_participant, RATE, tape.hear, tape.see)
    try:
        await asyncio.wait_for(avatar.local_participant.published.wait(), 10)
        await asyncio.sleep(0.5)
        yield output, tape, engine
    finally:
        playing.cancel()
        await asyncio.gather(playing, return_exceptions=True)
        await recording.stop()
        assert engine.viewers == []
        await asyncio.to_thread(engine.stop)


async def say(output: DataStreamAudioOutput, sound: np.ndarray, seconds: float = 0.1) -> None:
    """A sentence, pushed as fast as it goes, in pieces."""
    for piece in np.array_split(sound, max(1, round(len(sound) / RATE / seconds))):
        await output.capture_frame(rtc.AudioFrame(piece.tobytes(), RATE, 1, len(piece)))
    output.flush()


def test_an_agents_sentences_are_heard_whole_and_seen_with_their_sound():
    async def run():
        async with a_call() as (output, tape, _):
            started, finished = [], []
            output.on("playback_started", lambda event: started.append(time.monotonic()))
            output.on("playback_finished", lambda event: finished.append((time.monotonic(), event)))
            asked, said = time.monotonic(), [tone(1.53, RATE), tone(0.9, RATE, 300)]
            await say(output, said[0])
            await output.wait_for_playout()
            await asyncio.sleep(0.4)
            await say(output, said[1])
            await output.wait_for_playout()
            await asyncio.sleep(0.3)
            return asked, said, started, finished, tape

    asked, said, started, finished, tape = run_in_time(run())
    heard, whole = np.concatenate([block for _, block in tape.sound]), np.concatenate(said)
    assert np.array_equal(heard[heard != 0], whole[whole != 0])
    for (_, event), sound in zip(finished, said, strict=True):
        assert not event.interrupted
        assert event.playback_position == pytest.approx(len(sound) / RATE, abs=0.001)
    turned = tape.turned()
    assert turned[:, 1].tolist() == [1, 0, 1, 0]
    tape.lag.skip_if_busy()
    voiced = tape.voiced()
    assert len(voiced) == len(started) == 2
    assert voiced[0, 0] - asked < 0.5
    for (begin, end), (at, _), start in zip(voiced, finished, started, strict=True):
        assert abs(at - end) < 2 * FRAME
        assert abs(start - begin) < FRAME
    offsets = turned[::2, 0] - voiced[:, 0]
    assert np.abs(offsets).max() <= 0.04, f"video {offsets} s behind the sound"


def test_sound_comes_early_into_its_queue_and_pictures_on_time():
    """Which holds where the library's own pace of frames is behind, as it is after interrupts."""

    async def run():
        engine = Engine(a_puppet(), Echo(), 1)
        engine.start()
        stream = await AvatarStream.open(engine, tiny.a_portrait(), "x", rate=RATE)
        stream.push(tone(2.0, RATE), RATE)
        items, ends = [], time.monotonic() + 1.5
        async for item in door.Picture(stream):
            items.append((time.monotonic(), isinstance(item, rtc.AudioFrame)))
            if time.monotonic() > ends:
                break
        await stream.close()
        await asyncio.to_thread(engine.stop)
        return items

    items = run_in_time(run())
    waits = [at - before for (before, sound), (at, _) in pairwise(items) if sound]
    assert len(waits) > 10
    assert np.median(waits[1:]) > 0.5 * 0.75 * FRAME


NEW = np.concatenate([tone(0.5, RATE, 300), np.zeros(round(0.31 * RATE), np.int16), tone(0.5, RATE, 300)])
"""Two words, the second of which begins with a frame in the middle of the sentence."""


def test_clear_buffer_is_heard_within_150_ms_and_nothing_of_the_old_sentence_after_it(monkeypatch):
    draw = Engine._draw
    monkeypatch.setattr(Engine, "_draw", lambda *given: (time.sleep(0.1), draw(*given)))  # as long as a student's chunk

    async def run():
        async with a_call() as (output, tape, _):
            finished = []
            output.on("playback_finished", finished.append)
            for _ in range(4):  # each leaves the library's own pace of frames behind
                await say(output, tone(20.0, RATE))
                await asyncio.sleep(0.55)
                output.clear_buffer()
                await output.wait_for_playout()
            tape.sound.clear()
            tape.video.clear()
            finished.clear()
            await say(output, tone(20.0, RATE))
            await asyncio.sleep(1.6)
            at = time.monotonic()
            output.clear_buffer()
            await output.wait_for_playout()
            reported = time.monotonic()
            await asyncio.sleep(0.8)
            await say(output, NEW)
            await output.wait_for_playout()
            await asyncio.sleep(0.2)
            return at, reported, finished, tape

    at, reported, finished, tape = run_in_time(run())
    assert [event.interrupted for event in finished] == [True, False]
    counted = finished[1].playback_position  # by the runner, which may count what was on its way when it was cleared
    assert -0.001 < counted - len(NEW) / RATE < FRAME + 0.001
    late = np.concatenate([block for when, block in tape.sound if when > at + 0.5])
    assert np.array_equal(late[late != 0], NEW[NEW != 0])
    mouth = tape.mouth()
    tape.lag.skip_if_busy()
    voiced = tape.voiced()
    assert len(voiced) == 3
    assert voiced[0, 1] - at < 0.1
    assert reported - at < 0.15
    assert finished[0].playback_position == pytest.approx(voiced[0, 1] - voiced[0, 0], abs=0.2)
    assert voiced[1, 1] - voiced[1, 0] == pytest.approx(0.5, abs=0.03)
    between = mouth[(mouth[:, 0] > at + 0.15) & (mouth[:, 0] < voiced[1, 0] - 0.04)]
    assert len(between) > 5
    assert not between[1:, 1].any()
    offsets = tape.turned()[-4::2, 0] - voiced[1:, 0]
    assert np.abs(offsets).max() <= 0.04, f"video {offsets} s behind the sound"


@contextmanager
def a_server(monkeypatch, rooms: list[Room], room: str | None = None, viewers: int = 2):
    """`distill serve --livekit` on the avatar's sides of wired rooms, one after the other: its address and engine."""
    monkeypatch.setattr(door.rtc, "Room", lambda: rooms.pop(0))
    engine = Engine(a_puppet(), Echo(), viewers)
    opened = door.LiveKitDoor("ws://127.0.0.1:1", room, "key", "secret" * 8).open(engine, [tiny.a_portrait()])
    with running(engine, [tiny.a_portrait()], Options(doors=[opened])) as address:
        yield address, engine


def ask(address: str, body: object) -> tuple[int, dict]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"http://{address}/livekit", data)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_an_agent_asks_for_an_avatar_which_leaves_with_it(monkeypatch):
    agent, avatar = a_room()
    with a_server(monkeypatch, [avatar]) as (address, engine):
        assert ask(address, {"token": "its.room.token", "text": "a person smiles"}) == (
            200,
            {"joined": "ws://127.0.0.1:1"},
        )
        eventually(avatar.local_participant.published.is_set, 10)
        assert avatar.local_participant.attributes == {"lk.publish_on_behalf": "agent"}
        assert [viewer.session.point.text for viewer in engine.viewers] == ["a person smiles"]
        avatar.emit("participant_disconnected", agent.local_participant)
        eventually(lambda: avatar.left and not engine.viewers, 10)


def test_an_avatar_whose_agent_does_not_come_leaves_and_one_room_too_many_is_refused(monkeypatch, caplog):
    monkeypatch.setattr(door, "AGENT_SECONDS", 1.0)
    _, avatar = a_room()
    avatar.remote_participants.clear()
    with a_server(monkeypatch, [avatar], viewers=1) as (address, engine):
        assert ask(address, {"token": "x"})[0] == 200
        assert "as many rooms are attended as there may be viewers (1)" in ask(address, {"token": "x"})[1]["error"]
        eventually(lambda: avatar.left, 10)
        eventually(lambda: "no agent came to the room within 1 s" in caplog.text, 5)
        assert engine.viewers == []


def test_what_an_agent_asks_wrongly_is_refused_in_one_line(monkeypatch):
    rooms = [a_room()[1] for _ in range(2)]
    with a_server(monkeypatch, rooms, viewers=1) as (address, engine):
        for body, why in (
            (b"{", "no JSON"),
            ([], "no object"),
            ({}, "token"),
            ({"token": "x", "portrait": 3}, "no portrait 3: choose 0..0"),
            ({"token": "x", "more": 1}, "more"),
            (b"x" * 20_000, "more than 16384 bytes"),
            ({"token": "wrong"}, "cannot join a LiveKit room at ws://127.0.0.1:1 (invalid token); check URL and token"),
        ):
            status, answer = ask(address, body)
            assert status == 400
            assert why in answer["error"]
        engine.fixed = 0
        assert "maximum number of viewers reached (0)" in ask(address, {"token": "x"})[1]["error"]
        assert engine.viewers == []


def test_a_server_that_is_not_there_is_said_in_one_line():
    with pytest.raises(
        UserError, match=r"^cannot join a LiveKit room at ws://127.0.0.1:1 \(.*refused.*\); check URL and token$"
    ):
        run_in_time(door.attend(Engine(a_puppet(), Echo()), "ws://127.0.0.1:1", "a.b.c", tiny.a_portrait(), "x"))


def test_it_waits_in_a_room_for_one_agent_after_the_other_and_ends_with_the_server(monkeypatch):
    pairs = [a_room() for _ in range(2)]
    with a_server(monkeypatch, [avatar for _, avatar in pairs], room="lobby") as (_, engine):
        for agent, avatar in pairs:
            eventually(avatar.local_participant.published.is_set, 10)
            if agent is pairs[0][0]:
                avatar.emit("participant_disconnected", agent.local_participant)
    assert all(avatar.left for _, avatar in pairs)
    assert engine.viewers == []


def test_a_room_that_fails_is_tried_again(monkeypatch, caplog):
    monkeypatch.setattr(door, "AGAIN_SECONDS", 0.01)
    _, avatar = a_room()
    rooms = [None, avatar]  # the first one is an AttributeError of this test's, in the place of any
    with a_server(monkeypatch, rooms, room="lobby"):
        eventually(avatar.local_participant.published.is_set, 10)
    assert "AttributeError" in caplog.text
    assert avatar.left


def test_its_token_lets_it_join_that_room_as_an_avatar():
    token = door.LiveKitDoor("wss://x", "lobby", "key", "secret" * 8).token()
    claims = jwt.decode(token, "secret" * 8, algorithms=["HS256"])
    assert (claims["iss"], claims["sub"], claims["kind"]) == ("key", "avatar", "agent")
    assert claims["video"]["room"] == "lobby"
    assert claims["video"]["roomJoin"]


def test_mistakes_of_the_command_line_are_one_line(monkeypatch, capsys):
    for name in ("LIVEKIT_API_KEY", "LIVEKIT_API_SECRET"):
        monkeypatch.delenv(name, raising=False)
    for words, why in (
        (["--room", "lobby"], "name it by --livekit"),
        (["--livekit", "lobby"], "give a URL such as wss://"),
        (["--livekit", "wss://x", "--room", "lobby"], "LIVEKIT_API_KEY and LIVEKIT_API_SECRET"),
    ):
        assert main(["serve", "--student", "x", *words]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        assert why in lines[0]


def test_two_agents_of_one_name_in_two_rooms_interrupt_their_own_avatar():
    rooms = [a_room() for _ in range(2)]
    cleared = []

    async def run():
        receivers = [door.receiver_of(avatar, "agent") for _, avatar in rooms]
        for number, receiver in enumerate(receivers):
            await receiver.start()
            receiver.on("clear_buffer", lambda number=number: cleared.append(number))
        for agent, _ in rooms:
            await agent.local_participant.perform_rpc(
                destination_identity="avatar", method="lk.clear_buffer", payload=""
            )
        for receiver in receivers:
            await receiver.aclose()

    run_in_time(run())
    assert cleared == [0, 1]
    assert isinstance(rooms[0][0], Room)
