"""A stand-in for a LiveKit server on this machine, for tests: the part of its signalling that one room of a few participants needs,
two peer connections a participant (aiortc), media and data passed on. No rights are checked, nothing is kept.

    python -m benchmarks.serving.livekit_server [--port 7880]

It prints its URL. Any key and secret make a token for it.
"""

import argparse
import asyncio
import json
import logging
import re
from urllib.parse import parse_qs, urlsplit

import jwt
from aiortc import RTCPeerConnection, RTCSessionDescription
from aiortc.contrib.media import MediaRelay
from aiortc.sdp import candidate_from_sdp
from livekit.protocol import models, rtc
from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.http11 import Request, Response

log = logging.getLogger(__name__)
KINDS = {"agent": models.ParticipantInfo.AGENT}
MIME = {models.AUDIO: "audio/opus", models.VIDEO: "video/VP8"}
CHANNELS = {"_reliable": {}, "_lossy": {"ordered": False, "maxRetransmits": 0}}
ANSWER_SECONDS = 10.0


class Participant:
    """One connection: what it publishes comes in by `publisher`, what the others publish goes out by `subscriber`."""

    def __init__(
        self, room: list["Participant"], socket: ServerConnection, claims: dict, number: int, relay: MediaRelay
    ):
        self.room, self.socket, self.relay = room, socket, relay
        kind = KINDS.get(claims.get("kind", ""), models.ParticipantInfo.STANDARD)
        self.info = models.ParticipantInfo(
            sid=f"PA_{number}",
            identity=claims["sub"],
            state=models.ParticipantInfo.ACTIVE,
            kind=kind,
            attributes=claims.get("attributes") or {},
        )
        for right in ("can_publish", "can_subscribe", "can_publish_data", "can_update_metadata"):
            setattr(self.info.permission, right, True)
        self.publisher, self.subscriber = RTCPeerConnection(), RTCPeerConnection()
        self.channels = {label: self.subscriber.createDataChannel(label, **kind) for label, kind in CHANNELS.items()}
        self.announced: list[models.TrackInfo] = []  # published, and no media yet
        self.media: dict[str, object] = {}  # by the track's sid
        self.passed: dict[str, tuple[str, str]] = {}  # sid -> the track's id here, its owner
        self.negotiating, self.answered, self.tasks = asyncio.Lock(), asyncio.Event(), set()
        self.publisher.on("track", self._on_track)
        self.publisher.on("datachannel", self._on_channel)

    async def run(self) -> None:
        """Until the socket closes."""
        others = [one.info for one in self._others()]
        await self.send(
            join=rtc.JoinResponse(
                room=models.Room(sid="RM_1", name="room"),
                participant=self.info,
                other_participants=others,
                server_version="1.9.0",
                subscriber_primary=True,
                ping_timeout=15,
                ping_interval=5,
                server_info=models.ServerInfo(version="1.9.0", protocol=15),
            )
        )
        await self._tell_others()
        self._start(self.offer())
        async for data in self.socket:
            request = rtc.SignalRequest.FromString(data)
            kind = request.WhichOneof("message") or ""
            if (handler := getattr(self, f"on_{kind}", None)) is not None:
                await handler(getattr(request, kind))

    async def send(self, **message: object) -> None:
        await self.socket.send(rtc.SignalResponse(**message).SerializeToString())

    async def offer(self) -> None:
        """Offer all that the others publish."""
        async with self.negotiating:
            for other in self._others():
                for sid, track in other.media.items():
                    if sid not in self.passed:
                        mine = self.relay.subscribe(track)
                        self.passed[sid] = (mine.id, other.info.sid)
                        self.subscriber.addTrack(mine)
            await self.subscriber.setLocalDescription(await self.subscriber.createOffer())
            sdp = self.subscriber.localDescription.sdp
            for sid, (own, owner) in self.passed.items():
                sdp = re.sub(rf"msid:\S+ {own}", f"msid:{owner}|{sid} {sid}", sdp)
            self.answered.clear()
            await self.send(offer=rtc.SessionDescription(type="offer", sdp=sdp))
            await asyncio.wait_for(self.answered.wait(), ANSWER_SECONDS)

    async def close(self) -> None:
        self.room.remove(self)
        self.info.state = models.ParticipantInfo.DISCONNECTED
        await self._tell_others()
        for task in self.tasks:
            task.cancel()
        await self.publisher.close()
        await self.subscriber.close()

    # ---- requests

    async def on_offer(self, offer: rtc.SessionDescription) -> None:
        await self.publisher.setRemoteDescription(RTCSessionDescription(offer.sdp, "offer"))
        await self.publisher.setLocalDescription(await self.publisher.createAnswer())
        sdp = self.publisher.localDescription.sdp
        await self.send(answer=rtc.SessionDescription(type="answer", sdp=sdp, id=offer.id))

    async def on_answer(self, answer: rtc.SessionDescription) -> None:
        await self.subscriber.setRemoteDescription(RTCSessionDescription(answer.sdp, "answer"))
        self.answered.set()

    async def on_trickle(self, trickle: rtc.TrickleRequest) -> None:
        self._start(self._add_candidate(trickle))

    async def on_add_track(self, add: rtc.AddTrackRequest) -> None:
        sid = f"TR_{self.info.sid}_{len(self.info.tracks)}"
        track = models.TrackInfo(sid=sid, type=add.type, name=add.name, source=add.source, mime_type=MIME[add.type])
        self.announced.append(track)
        self.info.tracks.append(track)
        self.info.is_publisher = True
        await self.send(track_published=rtc.TrackPublishedResponse(cid=add.cid, track=track))

    async def on_ping_req(self, ping: rtc.Ping) -> None:
        await self.send(pong_resp=rtc.Pong(last_ping_timestamp=ping.timestamp))

    async def on_update_metadata(self, update: rtc.UpdateParticipantMetadata) -> None:
        for name, value in update.attributes.items():
            self.info.attributes[name] = value
        await self.send(update=rtc.ParticipantUpdate(participants=[self.info]))
        await self._tell_others()

    async def on_leave(self, _: rtc.LeaveRequest) -> None:
        await self.socket.close()

    # ---- inside

    def _others(self) -> list["Participant"]:
        return [one for one in self.room if one is not self]

    def _start(self, work) -> None:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _tell_others(self) -> None:
        for other in self._others():
            await other.send(update=rtc.ParticipantUpdate(participants=[self.info]))

    async def _add_candidate(self, trickle: rtc.TrickleRequest) -> None:
        init = json.loads(trickle.candidateInit)
        connection = self.publisher if trickle.target == rtc.PUBLISHER else self.subscriber
        while connection.remoteDescription is None:
            await asyncio.sleep(0.02)
        if text := init.get("candidate"):
            candidate = candidate_from_sdp(text.partition(":")[2])
            candidate.sdpMid, candidate.sdpMLineIndex = init.get("sdpMid"), init.get("sdpMLineIndex")
            await connection.addIceCandidate(candidate)

    def _on_track(self, track) -> None:
        kind = models.AUDIO if track.kind == "audio" else models.VIDEO
        info = next(info for info in self.announced if info.type == kind)
        self.announced.remove(info)
        self.media[info.sid] = track
        self._start(self._share(info))

    async def _share(self, info: models.TrackInfo) -> None:
        await self._tell_others()
        for other in self._others():
            await other.offer()
            await self.send(track_subscribed=rtc.TrackSubscribed(track_sid=info.sid))

    def _on_channel(self, channel) -> None:
        channel.on("message", lambda data: self._pass_on(channel.label, data))

    def _pass_on(self, label: str, data: bytes) -> None:
        if label not in CHANNELS:
            return
        packet = models.DataPacket.FromString(data)
        packet.participant_identity, packet.participant_sid = self.info.identity, self.info.sid
        for other in self._others():
            if not packet.destination_identities or other.info.identity in packet.destination_identities:
                other.channels[label].send(packet.SerializeToString())


class StandIn:
    """Rooms by name."""

    def __init__(self):
        self.rooms: dict[str, list[Participant]] = {}
        self.joined, self.relay = 0, MediaRelay()

    async def participate(self, socket: ServerConnection) -> None:
        query = parse_qs(urlsplit(socket.request.path).query)
        header = socket.request.headers.get("Authorization", "")
        token = query["access_token"][0] if "access_token" in query else header.partition(" ")[2]
        claims = jwt.decode(token, options={"verify_signature": False})
        room = self.rooms.setdefault(claims["video"]["room"], [])
        self.joined += 1
        participant = Participant(room, socket, claims, self.joined, self.relay)
        room.append(participant)
        try:
            await participant.run()
        finally:
            await participant.close()


def only_rtc(connection: ServerConnection, request: Request) -> Response | None:
    """404 for a newer way in, so that clients fall back to this one."""
    if urlsplit(request.path).path != "/rtc":
        return Response(404, "Not Found", Headers({"Content-Length": "0"}), b"")
    return None


async def run(port: int) -> None:
    stand_in = StandIn()
    async with serve(stand_in.participate, "127.0.0.1", port, process_request=only_rtc, compression=None) as server:
        print(f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
        await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    asyncio.run(run(parser.parse_args().port))


if __name__ == "__main__":
    main()
