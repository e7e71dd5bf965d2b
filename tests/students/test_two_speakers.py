"""Two speakers: InfiniteTalk's student and duplex MIDAS take the same pushes; regions as halves, boxes and masks."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from students.history import History
from students.networks.midas import Midas
from students.serving.session import Session, Starved
from students.spec import Spec
from students.weights.checkpoint import Bundle, make_student
from teachers.codecs.linear import CodecConfig, EigenCodec
from teachers.encoders.small import AudioConfig
from teachers.encoders.speakers import HALVES, SpeakersConfig, speaker_regions
from teachers.errors import UserError
from teachers.flow import sigma_grid
from tests.support.networks.talk import CHANNELS, HEIGHT, SMALL, STRIDE, WIDTH
from tests.support.tiny import MIDAS, a_bundle, make_spec, randn, randomise, some_sound, text_encoder

SIZE = HEIGHT * 4, WIDTH * 4


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The folder of a small CLIP."""
    folder = tmp_path_factory.mktemp("clip")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        SpeakersConfig(dim=16, tokens=5).write_random(folder)
    return folder


@pytest.fixture(scope="module")
def talk(clip):
    """InfiniteTalk's student of two speakers."""
    spec = Spec(
        height=SIZE[0],
        width=SIZE[1],
        fps=Fraction(25),
        chunk_frames=2,
        sigmas=sigma_grid(2, 7.0)[:-1],
        horizon_frames=4,
        history=History(sinks=1, window=1),
        network=SMALL,
        codec=CodecConfig(stride=STRIDE, patch=4, channels=CHANNELS),
        audio=AudioConfig(num_mels=5),
        text=make_spec().text,
        image=SpeakersConfig(path=clip, dim=16, tokens=5),
        speakers=2,
    )
    student = make_student(spec)
    randomise(student.net)
    codec = EigenCodec(spec.codec, *SIZE).fit(0.3 * randn(32, 3, 9, *SIZE, seed=5))
    parts = (codec, spec.audio.load(spec.samples_per_frame), text_encoder())
    return Bundle(student.eval().requires_grad_(False), *parts, image_encoder=spec.image.load())


def portrait(bundle) -> torch.Tensor:
    return (0.3 * randn(3, bundle.spec.height, bundle.spec.width, seed=17)).clamp(-1, 1)


def film(bundle, own, other, **given) -> torch.Tensor:
    """Frames [T, H, W, 3] of a stream, its sound in two pushes."""
    session = Session(bundle, portrait(bundle), "a person nods", seed=1, **given)
    half = len(own) // 2
    for part in (slice(0, half), slice(half, None)):
        session.push(audio=own[part], other=None if other is None else other[part])
    session.close()
    return torch.cat([chunk.frames for chunk in session.frames()])


@pytest.mark.parametrize("kind", ["infinitetalk", "midas"])
def test_both_kinds_take_the_same_pushes(kind, talk):
    bundle = talk if kind == "infinitetalk" else a_bundle(network=MIDAS, chunk_frames=1, speakers=2)
    assert isinstance(bundle.student, Midas) == (kind == "midas")
    own, other = some_sound(12_000), some_sound(12_000, seed=9)
    both = film(bundle, own, other)
    assert len(both) >= 9
    assert torch.equal(film(bundle, own, other), both)
    assert not torch.equal(film(bundle, other, own), both), "who says what makes no difference"
    assert not torch.equal(film(bundle, own, None), both), "the other speaker changes the film"
    session = Session(bundle, portrait(bundle), "a person nods")
    assert isinstance(session.step(), Starved)
    with pytest.raises(UserError, match="audio and other are one stretch of time"):
        session.push(audio=own, other=other[1:])


def test_regions_are_halves_boxes_or_masks(talk, clip):
    own, other = some_sound(8_000), some_sound(8_000, seed=9)
    halves = film(talk, own, other)
    boxes = replace(talk.spec.image, boxes=((0.0, 0.0, 1.0, 0.25), (0.5, 0.5, 1.0, 1.0)))
    boxed = film(replace(talk, image_encoder=boxes.load()), own, other)
    assert not torch.equal(boxed, halves)
    masks = speaker_regions(boxes.boxes, HEIGHT, WIDTH)[0]
    assert torch.equal(film(talk, own, other, conditions={"regions": masks}), boxed)
    given = {"regions": speaker_regions(None, HEIGHT, WIDTH)[0]}
    assert torch.equal(film(talk, own, other, conditions=given), halves)
    swapped = film(talk, own, other, conditions={"regions": given["regions"].flip(0)})
    assert not torch.equal(swapped, halves)
    with pytest.raises(UserError, match=r"conditions: regions \(1, 4, 8\) does not fit its declared size \(2, 4, 8\)"):
        film(talk, own, other, conditions={"regions": masks[:1]})
    with pytest.raises(UserError, match="conditions: image is not given there"):
        film(talk, own, other, conditions={"image": randn(5, 16)})


def test_halves_have_the_published_margins():
    regions = speaker_regions(None, 40, 80)
    assert regions.shape == (1, 2, 40, 80)
    left = torch.zeros(40, 80)
    left[2:38, 2:38] = 1.0  # rows 5 % to 95 %, columns 5 % to 95 % of the half
    assert torch.equal(regions[0, 0], left)
    assert torch.equal(regions[0, 1], left.flip(1))
    assert len(HALVES) == 2
    for box in ((0.0, 0.0, 0.0, 1.0), (0.0, 0.5, 1.0, 1.1), (0.5, 0.0, 0.4, 1.0)):
        with pytest.raises(UserError, match="is no box; give"):
            SpeakersConfig(boxes=(box,))
    with pytest.raises(UserError, match=r"data\.image\.face: got box"):
        SpeakersConfig(face="box")
