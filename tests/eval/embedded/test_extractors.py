"""The probes on a toy world of blobs: a face that moves as asked, with a mouth whose size follows the sound."""

import dataclasses
import json
import math
from fractions import Fraction

import pytest
import torch

from eval.cards import first_difference, load_card
from eval.embedded import probe_training
from eval.embedded.admission import admit, known_cases
from eval.embedded.evaluation import Evaluation, clips_of
from eval.embedded.extractors import Probes, blur, change_map
from eval.embedded.protocol import EvalConfig, Geometry, run_card
from eval.metric import Clip, Column
from eval.metrics.motion import ratio_with_error
from eval.metrics.pairs.gap import frame_squares
from teachers.errors import UserError

FRAMES, SIZE = 15, 32
CONFIG = EvalConfig(probe_steps=150, probe_batch=64)
CARD = load_card("embedded")


@dataclasses.dataclass(frozen=True)
class Blobs:
    video: torch.Tensor
    decoded: torch.Tensor
    labels: dict[str, torch.Tensor]
    audio: torch.Tensor

    def first(self, num: int) -> "Blobs":
        labels = {name: x[:num] for name, x in self.labels.items()}
        return Blobs(self.video[:num], self.decoded[:num], labels, self.audio[:num])


def blobs(num: int, seed: int) -> Blobs:
    """Two gestures (still, shake), two expressions (colour of the lips), identity = colour of face and wall."""
    rng = torch.Generator().manual_seed(seed)
    time = torch.arange(FRAMES)
    smooth = torch.rand(num, FRAMES + 1, 2, generator=rng)
    mouth = (smooth[:, 1:] + smooth[:, :-1]) / 2
    mouth[:, 0] = 0.2
    gesture, expression = (torch.randint(2, (num,), generator=rng) for _ in range(2))
    phase, hertz = torch.rand(num, 1, generator=rng) * 2 * math.pi, 0.9 + 0.3 * torch.rand(num, 1, generator=rng)
    swing = gesture[:, None] * torch.sin(hertz * time + phase)
    nuisance = torch.rand(num, 4, 1, generator=rng) * 2 - 1
    moving = (time > 0).float()
    labels = {
        "mouth_open": mouth[..., 0],
        "mouth_width": mouth[..., 1],
        "head_x": (swing + 0.3 * nuisance[:, 0]) * moving,
        "head_y": 0.5 * nuisance[:, 1] * moving,
        "light": nuisance[:, 2].expand(-1, FRAMES) * moving,
        "gaze": nuisance[:, 3].expand(-1, FRAMES) * moving,
        "blink": (torch.rand(num, FRAMES, generator=rng) < 0.15).float() * moving,
        "expression": expression,
        "gesture": gesture,
        "identity": torch.rand(num, 6, generator=rng),
    }
    video = draw(labels)
    noise = 3 * torch.randn(video.shape, generator=rng)
    soft = video.float() + 0.4 * (blur(video.float().flatten(0, 1)).unflatten(0, (num, 3)) - video)
    decoded = (soft + noise).clamp(0, 255).round().to(torch.uint8)
    audio = torch.cat((mouth, mouth.square(), torch.rand(num, FRAMES, 4, generator=rng)), dim=2)
    return Blobs(video, decoded, labels, audio)


def draw(labels: dict[str, torch.Tensor]) -> torch.Tensor:
    axis = (torch.arange(SIZE) + 0.5) / SIZE * 2 - 1
    x, y = axis[None, None, None, :], axis[None, None, :, None]
    at = {name: labels[name][:, :, None, None] for name in labels if labels[name].ndim == 2 and name != "identity"}
    colours = labels["identity"][:, :, None, None, None]
    u, v = x - 0.25 * at["head_x"], y - 0.25 * at["head_y"]

    def box(cx, cy, rx, ry):
        return torch.sigmoid(12 * (1 - ((u - cx) / rx).abs().clamp_min(((v - cy) / ry).abs())))

    image = (0.2 + 0.6 * colours[:, :3]).expand(-1, -1, FRAMES, SIZE, SIZE)
    face = torch.sigmoid(8 * (1 - (u / 0.6) ** 2 - (v / 0.8) ** 2))[:, None]
    image = image + face * (0.3 + 0.6 * colours[:, 3:] - image)
    eyes = (box(-0.25, -0.25, 0.13, 0.12) + box(0.25, -0.25, 0.13, 0.12)) * (1 - at["blink"])
    image = image + eyes[:, None] * (1 - image)
    pupils = box(-0.25 + 0.08 * at["gaze"], -0.25, 0.05, 0.09) + box(0.25 + 0.08 * at["gaze"], -0.25, 0.05, 0.09)
    image = image * (1 - (pupils * (1 - at["blink"]))[:, None] * 0.9)
    lips = box(0, 0.35, 0.16 + 0.25 * at["mouth_width"], 0.05 + 0.25 * at["mouth_open"])[:, None]
    tint = torch.tensor([[0.5, 0.0, 0.0], [0.0, 0.0, 0.5]])[labels["expression"]][:, :, None, None, None]
    image = image + lips * (tint - image)
    lit = image * (1 + 0.35 * at["light"] * x)[:, None]
    return lit.clamp(0, 1).mul(255).round().to(torch.uint8)


def real_clips(data: Blobs) -> list[Clip]:
    labels = {name: data.labels[name] for name in ("gesture", "expression")}
    return clips_of(data.video, Fraction(25, 2), CARD, labels=labels, audio_features=data.audio)


def fit(data: Blobs, seed: int = 0, config: EvalConfig = CONFIG) -> Probes:
    rng = torch.Generator().manual_seed(seed)
    return probe_training.fit(data.video, data.labels, data.audio, config, rng, degraded_video=data.decoded)


@pytest.fixture(scope="module")
def train() -> Blobs:
    return blobs(192, 1)


@pytest.fixture(scope="module")
def held_out() -> Blobs:
    return blobs(64, 2)


@pytest.fixture(scope="module")
def probes(train: Blobs) -> Probes:
    return fit(train)


@pytest.mark.slow
def test_clips_without_their_labels_are_refused(probes: Probes, held_out: Blobs):
    with pytest.raises(UserError, match=r"trained on labels that these clips have not .*set eval.probes=null"):
        probes.check(held_out.video, {"brightness_0": held_out.audio[:, :, 0]}, held_out.audio)


@pytest.mark.slow
def test_probes_read_held_out_clips(probes: Probes, held_out: Blobs):
    for video in (held_out.video, held_out.decoded):
        scores = probes.check(video, held_out.labels, held_out.audio)
        assert scores["mouth_open"] > 0.9
        assert scores["head_x"] > 0.9
        assert scores["light"] > 0.9
        assert scores["gesture"] > 0.9
        assert scores["expression"] > 0.9
        assert min(scores["audio_mouth_open"], scores["audio_mouth_width"]) > 0.95


def test_fit_is_a_function_of_its_generator_and_leaves_the_global_one_alone(train: Blobs):
    few = dataclasses.replace(CONFIG, probe_steps=3)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    some = train.first(16)
    first, other_seed = fit(some, 0, few), fit(some, 1, few)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(6)
    assert fit(some, 0, few).sha256 == first.sha256
    assert other_seed.sha256 != first.sha256


@pytest.mark.slow
def test_save_and_load_round_trip(probes: Probes, held_out: Blobs, tmp_path):
    probes.save(tmp_path)
    loaded = Probes.load(tmp_path)
    assert loaded.sha256 == probes.sha256
    mine, theirs = probes.read(held_out.video[:4]), loaded.read(held_out.video[:4])
    torch.testing.assert_close(mine.clip_features, theirs.clip_features, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine.mouth, theirs.mouth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(probes.mouth_from_audio(held_out.audio[:4]), loaded.mouth_from_audio(held_out.audio[:4]))


@pytest.mark.slow
def test_changed_or_missing_files_are_refused(probes: Probes, tmp_path):
    with pytest.raises(UserError, match="no tensor file"):
        Probes.load(tmp_path / "nowhere")
    probes.save(tmp_path)
    meta = json.loads((tmp_path / "probes.json").read_text())
    (tmp_path / "probes.json").write_text(json.dumps({**meta, "sha256": "0" * 64}))
    with pytest.raises(UserError, match="do not match their hash"):
        Probes.load(tmp_path)
    (tmp_path / "probes.json").write_text(json.dumps({**meta, "audio": meta["audio"] + 1}))
    with pytest.raises(UserError, match="weights do not fit: probe audio_probe"):
        Probes.load(tmp_path)


@pytest.mark.slow
def test_reading_does_not_depend_on_how_many_are_read_at_once(probes: Probes, held_out: Blobs, monkeypatch):
    all_at_once = probes.read(held_out.video[:6])
    monkeypatch.setattr("teachers.machine.CPU_PIXELS_AT_ONCE", 1)
    one = probes.read(held_out.video[:6])
    torch.testing.assert_close(one.clip_features, all_at_once.clip_features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one.gesture, all_at_once.gesture, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_other_lengths_and_sizes_can_be_read(probes: Probes, held_out: Blobs):
    longer = held_out.video[:2].repeat(1, 1, 3, 2, 2)
    reading = probes.read(longer)
    assert reading.frame_features.shape == (2, 3 * FRAMES, 64)
    assert reading.mouth.shape == (2, 3 * FRAMES, 2)


def test_labels_that_do_not_fit_are_refused(train: Blobs):
    rng = torch.Generator()
    few = {key: value for key, value in train.labels.items() if key != "gesture"}
    with pytest.raises(UserError, match="the label gesture"):
        probe_training.fit(train.video, few, train.audio, CONFIG, rng)
    with pytest.raises(UserError, match="one audio row a pixel frame"):
        probe_training.fit(train.video, train.labels, train.audio[:, 1:], CONFIG, rng)
    with pytest.raises(UserError, match="multiples of 16"):
        probe_training.fit(train.video[..., 1:], train.labels, train.audio, CONFIG, rng)


def test_training_computes_on_its_device_alone():
    """Tensors of two devices do not mix, and a meta tensor is on a device of its own; the clips stay on the CPU."""
    few = blobs(8, 5)
    config = dataclasses.replace(CONFIG, probe_steps=2, probe_batch=4)
    rng = torch.Generator().manual_seed(0)
    made = probe_training.fit(few.video, few.labels, few.audio, config, rng, None, few.decoded, "meta")
    assert {value.device.type for net in (made.frame, made.clip, made.audio_probe) for value in net.parameters()} == {
        "meta"
    }
    assert {value.device.type for value in made.scales.values()} == {"meta"}
    ours = probe_training.fit(few.video, few.labels, few.audio, config, torch.Generator().manual_seed(0))
    assert ours.device.type == "cpu"


@pytest.fixture(scope="module")
def admission(probes: Probes, held_out: Blobs) -> dict:
    rng = torch.Generator().manual_seed(3)
    return admit(Evaluation(CARD, probes, real_clips(held_out), held_out.decoded, blobs(96, 4).video), rng)


@pytest.mark.slow
def test_known_cases_are_ranked_and_admitted(admission: dict):
    assert all(admission["admitted"].values()), admission
    cases = admission["cases"]
    assert cases["fvd"]["shuffled"] > 2 * cases["fvd"]["decoded"]
    assert cases["sync"]["shifted_offset"] == 3
    assert abs(cases["identity"]["swapped"]) < 0.35
    assert cases["motion_energy"]["static"] == 0


@pytest.mark.slow
def test_an_untrained_metric_is_not_admitted(train: Blobs, held_out: Blobs):
    held_out = held_out.first(24)
    untrained = fit(train.first(16), 0, dataclasses.replace(CONFIG, probe_steps=1))
    rng = torch.Generator().manual_seed(3)
    result = admit(Evaluation(CARD, untrained, real_clips(held_out), held_out.decoded, blobs(32, 4).video), rng)
    assert not result["admitted"]["sync"]
    assert not result["admitted"]["motion"]
    columns = CARD.columns
    assert not columns["sync_offset_frames"].admitted(result["admitted"])
    assert not columns["expression"].admitted(result["admitted"])  # stands on motion
    assert not Column("of a metric that was not tried", stands_on="other").admitted(result["admitted"])
    assert columns["seam"].admitted(result["admitted"])  # needs no probe


def test_known_cases_are_what_they_say(held_out: Blobs):
    cases = known_cases(held_out.video, held_out.decoded, torch.Generator().manual_seed(0))
    assert all(case.shape == held_out.video.shape and case.dtype == torch.uint8 for case in cases.values())
    assert not cases["static"].float().diff(dim=2).any()
    assert torch.equal(cases["shuffled"].float().mean(2), held_out.decoded.float().mean(2))
    assert torch.equal(cases["frozen"][:, :, -1], held_out.decoded[:, :, FRAMES // 2])


@pytest.mark.slow
def test_scores_of_one_system(probes: Probes, held_out: Blobs):
    videos = torch.stack((held_out.decoded, held_out.video))
    spread = torch.stack([blobs(6, 30 + i).video for i in range(3)])
    evaluation = Evaluation(
        CARD, probes, real_clips(held_out), held_out.decoded, blobs(96, 4).video, seams=(5, 10), world=spread
    )
    scores = evaluation.score(videos, spread)
    for name in ("fid", "fvd", "kid", "sync", "identity", "motion", "motion_energy", "sharpness", "diversity"):
        score = scores[name]
        assert score["mean"] == pytest.approx(sum(score["seeds"]) / 2, rel=0.05)
        assert score["error"] >= 0
    low, high = sorted(scores["fid"]["seeds"])
    assert scores["fid"]["spread"] == pytest.approx((high - low) / 2)
    assert scores["sharpness"]["seeds"][0] == pytest.approx(1)
    assert scores["motion_energy"]["seeds"][0] == pytest.approx(1)
    assert scores["sync"]["mean"] > 0.85
    assert scores["sync_offset_frames"]["mean"] == 0
    assert scores["sync_offset_frames"]["error"] is None
    assert scores["identity"]["mean"] > 0.7
    assert scores["diversity"]["mean"] == pytest.approx(1)
    assert scores["diversity"]["parts"]["blink_rate"] == pytest.approx(1)
    assert scores["seam"]["seeds"][0] == pytest.approx(1, abs=0.5)
    assert "gap" not in scores  # no teacher
    swapped = evaluation.score(videos[:1].roll(1, 1))
    assert "diversity" not in swapped
    assert swapped["identity"]["mean"] < 0.3
    assert swapped["sync"]["mean"] < 0.3
    assert swapped["fid"]["mean"] == pytest.approx(scores["fid"]["seeds"][0], rel=1e-6)  # marginals are the same


@pytest.mark.slow
def test_a_gap_is_of_the_first_seed_and_needs_the_teacher(probes: Probes, held_out: Blobs):
    evaluation = Evaluation(CARD, probes, real_clips(held_out), held_out.decoded, held_out.video)
    videos = torch.stack((held_out.decoded, held_out.video))
    beside = {"teacher_same_noise": held_out.video, "teacher": held_out.video.roll(1, 0)}
    scores = evaluation.score(videos, beside=beside, only=("gap", "motion"))
    assert set(scores) == {"gap", "motion", "motion_probability"}
    own, other = (
        torch.stack([frame_squares(*pair) for pair in zip(video, held_out.video, strict=True)]).mean(1)
        for video in (held_out.decoded, held_out.video.roll(1, 0))
    )
    want, error = ratio_with_error(own, other)
    assert (scores["gap"]["mean"], scores["gap"]["error"]) == (want, error)
    assert scores["gap"]["seeds"] == [want]
    assert len(scores["motion"]["seeds"]) == 2


@pytest.mark.slow
def test_scores_refuse_other_counts(probes: Probes, held_out: Blobs):
    evaluation = Evaluation(CARD, probes, real_clips(held_out), held_out.decoded, held_out.video)
    with pytest.raises(UserError, match="for 64 conditions"):
        evaluation.score(held_out.video[None, :9])


def test_change_map_measures_change():
    clips = torch.zeros(1, 3, 4, 32, 32)
    clips[:, :, 2:, :8, :8] = 0.5
    changes = change_map(clips)
    assert changes.shape == (1, 4, 16)
    assert changes[0, 2].tolist() == [2.0] + [0.0] * 15
    assert not changes[0, 3].any()


def test_the_card_of_a_run_hashes_what_decides_comparability():
    geometry = Geometry(frames=15, height=32, width=32, fps=Fraction(25, 2))

    def card(sha256: str = "a" * 64, **changes):
        return run_card(EvalConfig(**changes), geometry, sha256, {"fid": True}, {"run": 1}).plain()

    one = card()
    assert json.loads(json.dumps(one)) == one
    assert "not comparable" in one["note"]
    assert first_difference(one, card(sheet_frames=4)) is None
    assert first_difference(one, card(num_reference=100)) == "run.counts.num_reference is 288 here and 100 there"
    assert first_difference(one, card("b" * 64)).startswith("probes is aaa")
    shipped = load_card("embedded").resolved("a" * 64).plain()
    assert first_difference(one, shipped) is not None


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(UserError, match=r"eval\.num_conditions is too small"):
        EvalConfig(num_conditions=0)
