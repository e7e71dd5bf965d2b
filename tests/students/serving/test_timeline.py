"""What happens when: a switch lies on its chunk and touches nothing before, however the sound is cut; scripts are read strictly."""

import math
from collections.abc import Callable
from fractions import Fraction
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml

from distill.commands.sample import command
from distill.data.procedural import render
from students.history import History
from students.serving.session import Chunk
from students.serving.snapshot import load_session, save_session
from students.serving.timeline import BEHAVIOURS, Cue, Director, Script, Timeline, TimelineEntry, chunk_at, read_script
from teachers.errors import UserError
from tests.distill.commands.sample.conftest import inputs, noted, student  # noqa: F401
from tests.distill.commands.sample.fakes import FPS, RATE, parse
from tests.distill.commands.sample.fakes import film as sample_film
from tests.students.test_every_student import PER_FRAME, STUDENTS, film, opened, play, sound_of
from tests.support.tiny import a_bundle, a_portrait, rng, some_sound

CHAT = Path(__file__).parents[3] / "examples" / "own_planner" / "chat_planner.py"
KINDS = ["sequential", "diagonal", "midas"]


@pytest.fixture(scope="module", params=KINDS)
def bundle(request):
    history, schedule, *changes = STUDENTS[request.param]
    return a_bundle(history, schedule=schedule, **(changes[0] if changes else {}))


@pytest.fixture
def script(tmp_path) -> Callable[[object], Path]:
    """Writes plain data, or text as it is, to a file."""

    def write(values: object) -> Path:
        file = tmp_path / "script.yaml"
        file.write_text(values if isinstance(values, str) else yaml.safe_dump(values), encoding="utf-8")
        return file

    return write


class Noted:
    """A planner that notes what it was asked and says the next of its texts, None where they end."""

    def __init__(self, every, texts=()):
        self.every, self.texts, self.asked = Fraction(every), list(texts), []

    def next(self, seconds, recent_audio, reference):
        self.asked.append((seconds, recent_audio.clone(), reference))
        return Cue(self.texts.pop(0)) if self.texts else None


def switch_at(spec, chunk) -> Fraction:
    """A time in the middle of a chunk."""
    start, stop = spec.pixel_frames(chunk)
    return Fraction(start + stop, 2) / spec.fps


def timeline(*entries) -> Timeline:
    return Timeline(tuple(script_of(entries).timeline))


def script_of(entries) -> Script:
    return Script(timeline=tuple(TimelineEntry(at=Fraction(at), do=do, how=how) for at, do, how in entries))


def test_every_frame_lies_in_its_chunk(bundle):
    spec = bundle.spec
    for chunk in range(6):
        for frame in range(*spec.pixel_frames(chunk)):
            assert chunk_at(spec, frame / spec.fps) == chunk
            assert chunk_at(spec, (frame + Fraction(99, 100)) / spec.fps) == chunk


@pytest.mark.parametrize("how", ["keep", "recache"])
def test_a_switch_is_on_its_chunk_and_no_earlier_frame_moves(bundle, how):
    spec, sound, at = bundle.spec, sound_of(bundle, 7), 4
    plain, start = play(opened(bundle), sound), spec.pixel_frames(at)[0]
    for seconds in (start / spec.fps, switch_at(spec, at), (spec.pixel_frames(at)[1] - Fraction(1, 100)) / spec.fps):
        session = opened(bundle)
        session.push(sound)
        frames = film(Director(session, timeline((seconds, "someone smiles", how))).frames())
        assert len(frames) == len(plain)
        assert torch.equal(frames[:start], plain[:start])
        assert not torch.equal(frames[start : start + 1], plain[start : start + 1])
        by_hand = opened(bundle)
        by_hand.set("someone smiles", at=at, how=how)
        assert torch.equal(frames, play(by_hand, sound))


def test_any_split_of_the_sound_and_a_save_give_the_same_film(bundle, tmp_path):
    spec, sound = bundle.spec, sound_of(bundle, 7)
    script = timeline((switch_at(spec, 2), "someone smiles", "recache"), (switch_at(spec, 5), "a person nods", "keep"))

    def directed(session, cuts):
        frames, director = [], Director(session, script)
        for start, stop in zip([0, *cuts], [*cuts, len(sound)], strict=True):
            session.push(sound[start:stop])
            frames += director.frames()
        return film(frames)

    whole = directed(opened(bundle), [])
    assert not torch.equal(whole, play(opened(bundle), sound))
    assert torch.equal(directed(opened(bundle), torch.arange(500, len(sound), 700).tolist()), whole)
    session = opened(bundle)
    session.push(sound)
    director = Director(session, script)
    first = [director.step() for _ in range(3)]
    save_session(session, tmp_path / "saved")
    rest = film(Director(load_session(bundle, tmp_path / "saved"), script).frames())
    assert torch.equal(torch.cat([film(first), rest]), whole)


def test_chunks_that_were_taken_back_are_told_again(bundle):
    spec, sound = bundle.spec, sound_of(bundle, 7)
    script = timeline((switch_at(spec, 2), "someone smiles", "keep"))
    calm = opened(bundle)
    calm.push(sound)
    whole = film(Director(calm, script).frames())
    session = opened(bundle, lead=3)
    session.push(sound)
    director, frames = Director(session, script), []
    shown = director.step()
    while isinstance(director.step(), Chunk):  # the text changes in frames that are not shown
        pass
    session.played(len(shown.frames))
    session.interrupt(keep_input=True)
    assert session.point.text == "a person nods"
    while chunk := director.step():
        frames.append(chunk.frames)
        session.played(chunk.first_frame + len(chunk.frames))
    assert torch.equal(torch.cat([shown.frames, *frames]), whole)


def test_a_planner_is_asked_on_the_clock_and_hears_the_last_seconds(bundle):
    spec, sound, reference = bundle.spec, sound_of(bundle, 14), a_portrait()
    asked = []
    for cuts in ([], torch.arange(900, len(sound), 1300).tolist()):
        session, planner = opened(bundle), Noted(Fraction(1, 2), ["someone smiles", "someone smiles"])
        director, texts = Director(session, planner, reference), []
        for start, stop in zip([0, *cuts], [*cuts, len(sound)], strict=True):
            session.push(sound[start:stop])
            texts += [session.point.text for _ in director.frames()]
        asked.append(planner.asked)
    starts = [spec.pixel_frames(k)[0] for k in range(14)]
    due = [k for k in range(1, 14) if starts[k] // (spec.fps / 2) > starts[k - 1] // (spec.fps / 2)]
    assert len(due) == math.floor(starts[-1] / spec.fps * 2) >= 2
    assert texts.index("someone smiles") == due[0]
    for (seconds, received, shown), k in zip(asked[0], due, strict=True):
        assert seconds == spec.pixel_frames(k)[1] / spec.fps
        end = starts[k] * PER_FRAME
        assert torch.equal(received, sound[max(0, end - 8000) : end])
        assert shown is reference
    assert all(torch.equal(a[1], b[1]) for a, b in zip(*asked, strict=True))


def test_a_planner_does_not_hear_what_was_taken_back():
    bundle = a_bundle()
    spec, received = bundle.spec, []
    for disturbed in (False, True):
        session, planner = opened(bundle, lead=4), Noted(Fraction(1))
        director = Director(session, planner)
        session.push(sound_of(bundle, 3))
        shown = director.step()
        if disturbed:
            director.step()
            director.step()
        session.played(len(shown.frames))
        session.interrupt()
        session.push(sound_of(bundle, 9, seed=5))
        while chunk := director.step():
            session.played(chunk.first_frame + len(chunk.frames))
        received.append([audio for _, audio, _ in planner.asked])
    assert len(received[0]) == len(received[1]) >= 2
    assert all(torch.equal(a, b) for a, b in zip(*received, strict=True))
    assert spec.pixel_frames(1)[0] * PER_FRAME < len(received[0][0])


def test_an_answer_to_what_was_taken_back_is_forgotten():
    """The user barges in: what was dropped was loud and called for a smile, what follows is not."""

    class Loud(Noted):
        def next(self, seconds, recent_audio, reference):
            super().next(seconds, recent_audio, reference)
            return Cue("someone smiles") if recent_audio[-2000:].abs().mean() > 0.01 else None

    bundle, films, planners = a_bundle(), [], []
    for dropped in (0, 4):
        session, planner = opened(bundle, lead=5), Loud(Fraction(1, 2))
        director = Director(session, planner)
        session.push(sound_of(bundle, 5)[: len(sound_of(bundle, 1 + dropped))])
        shown = director.step()
        assert len(list(director.frames())) == dropped
        session.played(len(shown.frames))
        session.interrupt()
        session.push(0.001 * sound_of(bundle, 8, seed=5))
        frames = []
        while chunk := director.step():
            frames.append(chunk.frames)
            session.played(chunk.first_frame + len(chunk.frames))
        films.append(torch.cat(frames))
        planners.append(planner)
    assert any(audio[-2000:].abs().mean() > 0.01 for _, audio, _ in planners[1].asked), "it did call for a smile"
    assert session.point.text == "a person nods"
    assert torch.equal(*films)


def test_a_planner_s_memory_is_bounded():
    bundle = a_bundle()
    session, held = opened(bundle, lead=2), []
    director = Director(session, Noted(Fraction(1), ["someone smiles", "a person nods"] * 20))
    session.push(sound_of(bundle, 2))
    for i in range(30):
        chunk = director.step()
        session.played(chunk.first_frame + len(chunk.frames))
        session.push(some_sound(4 * PER_FRAME, seed=i))
        held.append(sum(len(audio) for _, audio in director.played))
    assert held[-1] == held[10] < 3 * 16000
    assert len(director.planned) < 5


def test_the_default_behaviours_are_words_of_the_embedded_world():
    """Each is a sentence that the world could say, and no two mean the same."""
    meaning = {}
    for (e, faces), (g, moves) in product(enumerate(render._EXPRESSION_PHRASES), enumerate(render._GESTURE_PHRASES)):
        for who, face, move in product(render.SUBJECTS, faces, moves):
            meaning |= dict.fromkeys((f"{who} {face} talks and {move}", f"{who} {move} while talking, {face}"), (e, g))
    assert set(render.draw_conditions(render.WorldConfig(num_frames=3), 8, rng(3)).text) <= set(meaning)
    assert list(BEHAVIOURS) == ["speak", "listen", "think", "idle", "gesture"]
    assert len({meaning[text] for text in BEHAVIOURS.values()}) == 5


def test_a_script_is_read(script):
    file = script(
        "behaviours: {wave: someone smiles and waves, idle: someone sits}\n"
        "timeline:\n- {at: 0, do: listen}\n- {at: 0.1, do: wave, how: recache}\n- {at: 25/2, do: any text at all}\n"
    )
    given = read_script(file)
    assert [entry.at for entry in given.timeline] == [0, Fraction(1, 10), Fraction(25, 2)]
    assert [entry.do for entry in given.timeline] == [
        BEHAVIOURS["listen"],
        "someone smiles and waves",
        "any text at all",
    ]
    assert [entry.how for entry in given.timeline] == ["keep", "recache", "keep"]
    assert given.behaviours["idle"] == "someone sits"
    assert given.begins


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ("- a", "holds no mapping"),
        ("", "holds no mapping"),
        ("a: [", "not YAML"),
        ({"timeline": []}, "either timeline"),
        (
            {"timeline": [{"at": 0, "do": "idle"}], "planner": {"name": f"{CHAT}:Chat", "folder": "x"}},
            "either timeline",
        ),
        ({"timelines": []}, "unknown key 'timelines'.*did you mean 'timeline'"),
        ({"timeline": [{"at": 0, "doo": "idle"}]}, r"unknown key 'timeline\[0\]\.doo'.*did you mean 'do'"),
        ({"timeline": [{"do": "idle"}]}, r"missing key 'timeline\[0\]\.at'"),
        ({"timeline": [{"at": "soon", "do": "idle"}]}, r"timeline\[0\]\.at"),
        ({"timeline": [{"at": math.nan, "do": "idle"}]}, r"timeline\[0\]\.at"),
        ({"timeline": [{"at": -1, "do": "idle"}]}, r"timeline\[0\]\.at: got -1 s"),
        ({"timeline": [{"at": 2, "do": "idle"}, {"at": 2.0, "do": "speak"}]}, r"timeline\[1\]\.at: got 2 s.*must rise"),
        ({"timeline": [{"at": 0, "do": "speek"}]}, r"timeline\[0\]\.do: no behaviour 'speek'.*did you mean 'speak'"),
        ({"timeline": [{"at": 0, "do": ""}]}, r"timeline\[0\]\.do: no behaviour ''"),
        ({"timeline": [{"at": 0, "do": "idle", "how": "blend"}]}, r"timeline\[0\]\.how.*'keep', 'recache'"),
        ({"behaviours": {"two words": "a"}, "timeline": [{"at": 0, "do": "idle"}]}, r"behaviours\.two words"),
        ({"behaviours": {"wave": " "}, "timeline": [{"at": 0, "do": "idle"}]}, r"behaviours\.wave"),
        ({"planner": {"folder": "x"}}, r"missing key 'planner\.name'"),
        ({"planner": {"name": "nowhere:Thing"}}, r"no file of the planner 'nowhere'"),
    ],
)
def test_a_wrong_script_is_one_line_that_names_file_and_key(script, values, expected):
    with pytest.raises(UserError, match=rf"^[^\n]*{expected}[^\n]*$") as error:
        read_script(script(values))
    assert "script.yaml" in str(error.value)


def test_what_a_student_cannot_follow_is_refused(tmp_path):
    spec = a_bundle(History(sinks=1, window=2, commit="same_level")).spec
    with pytest.raises(UserError, match=r"^timeline\[1\]\.how: recache in [^\n]*use keep$"):
        script_of([(0, "a b", "keep"), (3, "b c", "recache")]).check(spec, tmp_path)
    two = script_of([(0, "a b", "keep"), (1, "b c", "keep"), (Fraction(101, 100), "a b", "keep")])
    with pytest.raises(UserError, match=r"^timeline\[2\]\.at: 1\.01 s lies in the chunk [^\n]*\(0\.88 to 1\.20 s\)"):
        two.check(spec, tmp_path)


def test_sample_follows_a_timeline(inputs, noted, script):  # noqa: F811
    sample_film(inputs)
    plain = torch.stack(noted.shown)
    file = script(
        {"timeline": [{"at": 1.0, "do": "someone nods"}, {"at": 1.6, "do": "someone smiles", "how": "recache"}]}
    )
    films = []
    for options in ((), ("--push-ms", "20"), ("--realtime",)):
        sample_film(inputs, "--timeline", str(file), *options)
        films.append(torch.stack(noted.shown))
    start = 11  # 1.0 s is frame 12; chunks begin at frames 0, 3, 7, 11
    assert torch.equal(films[0][:start], plain[:start])
    assert not torch.equal(films[0][start], plain[start])
    assert all(torch.equal(other, films[0]) for other in films[1:])


def test_sample_wants_a_text_until_the_timeline_begins(inputs, noted, script):  # noqa: F811
    def run(values, text):
        args = parse(inputs, "--timeline", str(script(values)))
        args.text = text
        command.run(args)
        return torch.stack(noted.shown)

    begins = {"timeline": [{"at": 0, "do": "smiles and nods"}]}
    assert torch.equal(run(begins, None), run(begins, "a person nods"))
    with pytest.raises(UserError, match=r"^--text is missing; [^\n]*script\.yaml says nothing of the beginning[^\n]*$"):
        run({"timeline": [{"at": 0.5, "do": "smiles and nods"}]}, None)
    args = parse(inputs)
    args.text = None
    with pytest.raises(UserError, match=r"^--text is missing"):
        command.run(args)
    planner = {"name": f"{CHAT}:Chat", "folder": str(inputs["out"].parent / "nowhere")}
    with pytest.raises(UserError, match=r"^no planner: [^\n]*nowhere[^\n]*config\.json"):
        run({"planner": planner}, "a person nods")


def test_the_clock_of_the_fixtures():
    assert (a_bundle().spec.fps, 24000, 16000) == (FPS, RATE, FPS * PER_FRAME)
