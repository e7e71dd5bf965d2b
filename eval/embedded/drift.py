"""Does an endless stream stay what it was? Scores of each window of long videos against the first one."""

from jaxtyping import Float, UInt8
from torch import Tensor

from eval.embedded.extractors import Probes
from eval.metrics.identity import identity_agreement
from eval.metrics.motion import class_agreement, motion_energies, sharpness_energies
from eval.metrics.sync import mouth_sync
from teachers.errors import UserError


def cut(videos: Tensor, start: int, frames: int, count: int) -> Tensor:
    """[N, .., T at dim 1 ..] -> `count` pieces of `frames` frames from `start` on, [N * count, frames, ..]."""
    piece = videos[:, start : start + frames * count]
    return piece.unflatten(1, (count, frames)).flatten(0, 1)


def window_scores(
    probes: Probes,
    videos: UInt8[Tensor, "n t h w 3"],
    portraits: UInt8[Tensor, "n 3 h w"],
    audio_features: Float[Tensor, "n t a"],
    gesture: Tensor,
    start: int,
    length: int,
    clip_frames: int,
) -> dict[str, float]:
    """Scores of frames start .. start + length - 1 of N videos, cut into clips of `clip_frames`.

    identity: agreement with the portrait, as for clips; sync: mouth of the video against that of the audio; motion: share of
    clips that show the gesture of their condition; motion_energy and sharpness in their own units; colour: distance of the mean
    colour from the portrait's.
    """
    count = length // clip_frames
    if count < 1 or start + length > videos.shape[1]:
        raise UserError(
            f"drift window {start}..{start + length}: videos have {videos.shape[1]} frames; make longer ones"
        )
    clips = cut(videos, start, clip_frames, count).permute(0, 4, 1, 2, 3).contiguous()
    rows = cut(audio_features, start, clip_frames, count)
    reading = probes.read(clips)
    faces = reading.identity.unflatten(0, (len(videos), count)).flatten(1, 2)
    portrait = probes.read(portraits[:, :, None].expand(-1, -1, 2, -1, -1)).identity[:, 0]
    target = gesture.repeat_interleave(count)
    colour = clips.float().mean((2, 3, 4)).unflatten(0, (len(videos), count)).mean(1) - portraits.float().mean((2, 3))
    return {
        "identity": identity_agreement(faces, portrait)[0],
        "sync": mouth_sync(reading.mouth, probes.mouth_from_audio(rows))["sync"],
        "motion": class_agreement(reading.gesture, target)[0],
        "motion_energy": float(motion_energies(clips).mean()),
        "sharpness": float(sharpness_energies(clips).mean()),
        "colour": float(colour.norm(dim=1).mean()),
    }
