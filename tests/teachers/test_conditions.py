"""Conditions: one table of features drives what is dropped, cut, joined and stored."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from teachers.conditions import FEATURES, Conditions, Feature, blank_features, declare, known, pack_rows
from teachers.errors import UserError
from tests.support.tiny import MOOD, declared, randn, some_conditions, some_mood


def test_a_dropped_modality_is_zero_and_the_rest_is_untouched():
    given = some_conditions()
    for name, other in [("text", "audio"), ("audio", "text")]:
        dropped = given.drop(name)
        assert not getattr(dropped, name).any()
        assert torch.equal(getattr(dropped, other), getattr(given, other))
        assert torch.equal(dropped.reference, given.reference)
    assert given.text.any()
    assert given.audio.any()


def test_rows_are_dropped_one_by_one():
    given = some_conditions(batch=3)
    dropped = given.drop_rows(text=torch.tensor([True, False, False]), audio=torch.tensor([False, False, True]))
    assert [bool(row.any()) for row in dropped.text] == [False, True, True]
    assert [bool(row.any()) for row in dropped.audio] == [True, True, False]
    assert torch.equal(dropped.text[1:], given.text[1:])


def test_what_bidirectional_networks_see_goes_with_the_audio():
    given = some_conditions(batch=3)
    given = replace(given, clip_audio=given.audio + 1)
    assert not given.drop("audio").clip_audio.any()
    assert torch.equal(given.drop("text").clip_audio, given.clip_audio)
    dropped = given.drop_rows(audio=torch.tensor([False, True, False]))
    assert [bool(row.any()) for row in dropped.clip_audio] == [True, False, True]
    assert torch.equal(given.frames(2, 4).clip_audio, given.clip_audio[:, 2:4])
    assert torch.equal(given.index([1]).clip_audio, given.clip_audio[1:2])


def test_frames_and_rows_are_selected():
    given = some_conditions(batch=3, frames=8)
    part = given.frames(2, 4)
    assert part.num_frames == 2
    assert torch.equal(part.audio, given.audio[:, 2:4])
    assert torch.equal(part.text, given.text)
    one = given.index(torch.tensor([2]))
    assert torch.equal(one.reference, given.reference[2:])
    assert one.to(torch.float64).audio.dtype == torch.float64


def test_audio_rows_are_packed_on_the_latent_clock():
    """Latent i covers pixel frames stride i - (stride - 1) .. stride i; the first row is repeated in front."""
    rows = torch.arange(1.0, 8.0).view(1, 7, 1)
    assert pack_rows(rows, 2)[0, :, :, 0].tolist() == [[1, 1], [2, 3], [4, 5], [6, 7]]
    assert pack_rows(rows[:, :5], 4)[0, :, :, 0].tolist() == [[1, 1, 1, 1], [2, 3, 4, 5]]
    with pytest.raises(ValueError, match=r"got T=6, need T = 1 \+ 2 \(F - 1\)"):
        pack_rows(rows[:, :6], 2)


# ---- features that this package does not know


@pytest.fixture
def mood():
    with declared(*MOOD):
        yield replace(some_conditions(3, 8), **some_mood(3, 8))


def test_every_clock_is_cut_by_its_own_rule(mood):
    """Stream and anchor stay, latent and grid are cut; a grid holds its last frame beyond its end."""
    part = mood.frames(2, 5)
    assert part.num_frames == 3
    for name in ("mood", "idol"):
        assert torch.equal(getattr(part, name), getattr(mood, name))
    assert torch.equal(part.mood_track, mood.mood_track[:, 2:5])
    assert torch.equal(part.scenery, mood.scenery[:, :, 2:5])
    late = mood.frames(7, 10)
    assert torch.equal(late.scenery, mood.scenery[:, :, [7, 7, 7]])
    assert late.mood_track.shape[1] == late.audio.shape[1] == 1
    held = mood.frames(9, 11, hold=True)
    assert torch.equal(held.mood_track, mood.mood_track[:, [7, 7]])


def test_every_clock_is_dropped_selected_moved_and_joined(mood):
    for name in ("mood", "mood_track", "scenery", "idol"):
        value, dropped = getattr(mood, name), mood.drop(name)
        assert not getattr(dropped, name).any()
        assert torch.equal(dropped.audio, mood.audio)
        rows = mood.drop_rows(**{name: torch.tensor([False, True, False])})
        assert [bool(row.any()) for row in getattr(rows, name)] == [True, False, True]
        assert torch.equal(getattr(mood.index([2, 0]), name), value[[2, 0]])
        assert getattr(mood.to(torch.float64), name).dtype == torch.float64
        assert torch.equal(getattr(mood.roll_rows(name), name), value.roll(1, 0))
    again = Conditions.join_frames([mood.frames(0, 3), mood.frames(3, 8)])
    beside = Conditions.join_rows([mood.index([0]), mood.index([1, 2])])
    for name, value in mood.features.items():
        assert torch.equal(getattr(again, name), value), name
        assert torch.equal(getattr(beside, name), value), name
    with pytest.raises(ValueError, match="conditions to join differ"):
        Conditions.join_rows([mood, some_conditions(3, 8)])


def test_the_table_says_what_runs_with_the_frames_and_what_is_stored(mood):
    assert set(mood.timed) == {"audio", "mood_track", "scenery"}
    assert set(mood.stored) == {"text", "audio", "mood", "mood_track", "scenery", "idol"}


def test_an_empty_value_may_be_another_feature():
    """As the negative prompt stands for the text; where it is not given, zeros do; what follows a feature goes with it."""
    calm = Feature(name="calm", clock="stream", stored=False)
    with declared(calm, Feature(name="temper", clock="stream", empty="calm", follows="text")):
        given = replace(some_conditions(), temper=randn(2, 3), calm=randn(2, 3, seed=4))
        assert torch.equal(given.drop("temper").temper, given.calm)
        assert torch.equal(given.drop("text").temper, given.calm)
        assert torch.equal(given.drop("audio").temper, given.temper)
        assert not replace(given, calm=None).drop("temper").temper.any()
        assert not given.drop_rows(text=torch.tensor([True, False])).temper[0].any(), "in training zeros"


def test_a_negative_prompt_takes_the_text_s_place():
    given = replace(some_conditions(), negative=randn(2, 5, 16, seed=9))
    assert torch.equal(given.drop("text").text, given.negative)
    assert torch.equal(given.drop("audio").text, given.text)


def test_what_is_not_given_reads_as_none_and_drops_as_nothing():
    given = some_conditions()
    assert given.pose is None
    assert "pose" not in given.drop("pose").features
    assert replace(given, audio=None).audio is None
    assert replace(given, reference=None).known == ()
    with pytest.raises(ValueError, match="conditions without latent frames: text"):
        _ = Conditions(text=given.text).num_frames


@pytest.mark.parametrize(
    "use",
    [
        lambda given: given.drop("adio"),
        lambda given: given.drop_rows(adio=torch.tensor([True])),
        lambda given: replace(given, adio=given.audio),
        lambda given: known("adio"),
    ],
)
def test_an_unknown_name_is_one_clear_error(use):
    with pytest.raises(
        UserError, match=r"^unknown condition 'adio': did you mean 'audio'\? \(a new one is declared by "
    ):
        use(some_conditions())
    with pytest.raises(AttributeError, match="unknown condition 'adio'; did you mean 'audio'"):
        _ = some_conditions().adio


@pytest.mark.parametrize(
    ("feature", "words"),
    [
        ({"name": "no name", "clock": "stream"}, "'no name': not a name"),
        ({"name": "frames", "clock": "stream"}, "'frames': not a name"),
        ({"name": "smell", "clock": "weekly"}, "unknown clock 'weekly'; known: anchor, grid, latent, stream"),
        ({"name": "smell", "clock": "stream", "empty": "air"}, "unknown condition 'air'"),
        ({"name": "audio", "clock": "stream"}, "'audio' is declared twice"),
    ],
)
def test_a_bad_declaration_is_one_line(feature, words):
    before = dict(FEATURES)
    with pytest.raises(UserError, match=words) as error:
        declare(Feature(**feature))
    assert "\n" not in str(error.value)
    assert before == FEATURES
    assert declare(FEATURES["audio"]) is FEATURES["audio"], "the same again is nothing new"
    with declared(Feature(name="smell", clock="stream", mirror=lambda value: -value)):
        declare(Feature(name="smell", clock="stream", mirror=lambda value: -value))  # its file was read twice


def test_a_planner_has_zeros_of_what_a_network_takes(mood):
    takes = SimpleNamespace(takes=("text", "audio", "mood", "mood_track", "scenery", "idol"))
    blank = blank_features(takes, 2, 6)
    assert {name: tuple(value.shape) for name, value in blank.items()} == {
        "mood": (2, 7),
        "mood_track": (2, 6, 3),
        "scenery": (2, 2, 6, 4, 4),
        "idol": (2, 4, 1, 4, 4),
    }
    assert blank_features(SimpleNamespace(), 2, 6) == {}
    with (
        declared(Feature(name="smell", clock="stream")),
        pytest.raises(UserError, match="'smell': its Feature has no size"),
    ):
        blank_features(SimpleNamespace(takes=("smell",)), 2, 6)


@pytest.mark.parametrize(("clock", "flipped"), [("stream", False), ("latent", False), ("grid", True), ("anchor", True)])
def test_images_are_flipped_in_a_clip_s_mirror_image(clock, flipped):
    value = torch.arange(12.0).reshape(1, 1, 1, 3, 4)
    mirrored = Feature(name="sight", clock=clock).mirrored(value)
    assert torch.equal(mirrored, value.flip(-1) if flipped else value)


def test_the_row_before_lends_a_feature_and_its_followers():
    rows = torch.arange(3.0)
    given = Conditions(audio=rows.view(3, 1, 1, 1), clip_audio=10 * rows.view(3, 1, 1, 1), text=rows.view(3, 1, 1))
    rolled = given.roll_rows("audio")
    assert rolled.audio.flatten().tolist() == [2, 0, 1]
    assert rolled.clip_audio.flatten().tolist() == [20, 0, 10]
    assert torch.equal(rolled.text, given.text)
