"""Conversation mode without a network: sentences, the memory of a conversation, interrupts, and what the server makes of it."""

import threading

import pytest
import torch

from distill.live.answering.talker import MAX_TURNS, Answering, Choice, plain, sentences
from distill.live.client import Client
from distill.live.talkers import Echo, Words
from teachers.errors import UserError
from tests.support.live.serving import a_puppet, serving


class Chat:
    """Answers what it is given to, and keeps what it was asked."""

    name = "chat"

    def __init__(self, *pieces: str):
        self.pieces, self.asked = pieces, []

    def answer(self, messages):
        self.asked.append(messages)
        yield from self.pieces


class Ears:
    def transcribe(self, sound):
        return "" if float(sound.abs().max()) == 0 else "what was spoken"


def words(pieces) -> list[tuple[str, str]]:
    return [(piece.who, piece.text) for piece in pieces if isinstance(piece, Words)]


def test_sentences_come_as_soon_as_they_are_complete_and_without_markup_or_thoughts():
    given = [
        "<thi",
        "nk>Hm. A greeting. </think>",
        "**Hello",
        "!** I am",
        " 3.5 years old; you?\n- Yes",
        "。好。",
        " # end",
    ]
    assert list(sentences(given)) == ["Hello!", "I am 3.5 years old;", "you?", "Yes。", "好。", "end"]
    seen = []

    def pieces():
        for piece in ("One. ", "Two", ". Three"):
            seen.append(piece)
            yield piece

    found = sentences(pieces())
    assert next(found) == "One."
    assert seen == ["One. "]
    assert list(sentences(["<think>never ends. "])) == []
    assert plain("- 2  apples\n") == "2 apples"


def test_a_conversation_is_remembered_and_nothing_of_another_ones():
    chat = Chat("Fine, thanks. ", "And you?")
    talker = Answering(Echo(), chat, Ears(), prompt="Be brief.")
    one, other = talker.conversation(), talker.conversation()
    assert words(one.turn("How are you?")) == [("avatar", "Fine, thanks."), ("avatar", "And you?")]
    assert words(one.turn(torch.ones(100))) == [
        ("user", "what was spoken"),
        *[("avatar", x) for x in ("Fine, thanks.", "And you?")],
    ]
    list(other.turn("Hello"))
    assert chat.asked[1] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How are you?"},
        {"role": "assistant", "content": "Fine, thanks. And you?"},
        {"role": "user", "content": "what was spoken"},
    ]
    assert [message["content"] for message in chat.asked[2]] == ["Be brief.", "Hello"]
    assert list(one.turn(torch.zeros(100))) == []
    for _ in range(2 * MAX_TURNS):
        list(one.turn("again"))
    assert len(chat.asked[-1]) == 2 + 2 * MAX_TURNS


def test_an_answer_that_is_broken_off_is_remembered_as_far_as_it_was_begun():
    chat = Chat("One. ", "Two. ", "Three.")
    talker = Answering(Echo(), chat)
    turn = talker.turn("Count")
    while next(turn) != Words("avatar", "Two."):
        pass
    turn.close()
    list(talker.turn("Go on"))
    assert [message["content"] for message in chat.asked[1][1:]] == ["Count", "One. Two.", "Go on"]
    silent = Answering(Echo(), Chat())
    list(silent.turn("Hello?"))
    list(silent.turn("Anybody?"))
    assert [message["content"] for message in silent.chat.asked[1][1:]] == ["Anybody?"]
    with pytest.raises(UserError, match="type instead"):
        next(talker.turn(torch.ones(10)))


def test_options_that_do_not_belong_together_are_refused(tmp_path):
    assert Choice().join(Echo(), {}).name == "echo"
    with pytest.raises(UserError, match="--transcribe is of conversation mode; give --answer"):
        Choice(transcribe="http://127.0.0.1:9/v1").join(Echo(), {})
    answering = Answering(Echo(), Chat())
    with pytest.raises(UserError, match="answers by itself"):
        Choice(answer="http://127.0.0.1:9/v1").join(answering, {})
    with pytest.raises(UserError, match=r"no chat model: .* has no config\.json"):
        Choice(answer=str(tmp_path)).join(Echo(), {})


def test_a_viewer_gets_the_words_of_a_turn_and_a_failure_in_a_line():
    class Broken(Chat):
        def answer(self, messages):
            raise UserError("401 wrong key: 127.0.0.1")

    talker = Answering(Echo(), Chat("Yes. ", "No."))
    with serving(a_puppet(), talker, viewers=1) as (address, _), Client(f"ws://{address}/live") as client:
        assert (client.hello["mode"], client.hello["model"], client.hello["takes_speech"]) == (
            "conversation",
            "chat",
            False,
        )
        client.open()
        client.converse("Well?")
        said = [message for message in client.messages if message["type"] == "words"]
        assert [(one["turn"], one["who"], one["text"]) for one in said] == [(1, "avatar", "Yes."), (1, "avatar", "No.")]
        talker.chat.answer = Broken().answer
        client.ask("Well?")
        client.until(lambda: client.answers[2].end is not None, 10)
        assert any("401 wrong key" in message.get("message", "") for message in client.messages)


def test_after_an_interrupt_no_more_words_come():
    class Slow(Chat):
        def answer(self, messages):
            yield "One. "
            go_on.wait(20)
            yield "Two. "

    def said() -> list[str]:
        return [message["text"] for message in client.messages if message["type"] == "words"]

    go_on = threading.Event()
    with (
        serving(a_puppet(), Answering(Echo(), Slow()), viewers=1) as (address, _),
        Client(f"ws://{address}/live") as client,
    ):
        client.open()
        client.ask("Count")
        client.until(said, 10)
        client.interrupt()
        client.until(lambda: client.answers[1].end is not None, 10)
        go_on.set()
        client.pump(0.3)
        assert said() == ["One."]
