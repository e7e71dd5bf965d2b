"""Protocol cards: strict, hashed over every key that decides a number, and verified against the code that scores."""

import copy
import dataclasses
import re

import pytest
import yaml

from eval import cards
from eval.cards import PROSE, Card, first_difference, load_card, names
from eval.metrics.lip_sync import MAX_LAG
from eval.networks import syncnet
from eval.networks.weights import REGISTRY
from teachers.config import convert, to_plain
from teachers.errors import UserError

SHIPPED = ["embedded", "livetalk", "omniavatar", "strict", "syncnet_v2"]


def plain(name: str) -> dict:
    return to_plain(load_card(name))


def leaves(value, path=()):
    for key, item in value.items():
        if isinstance(item, dict):
            yield from leaves(item, (*path, key))
        else:
            yield (*path, key), item


def put(values: dict, path: tuple, value) -> dict:
    values = copy.deepcopy(values)
    node = values
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return values


def written(tmp_path, values: dict) -> str:
    path = tmp_path / "card.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_the_shipped_cards_are_complete_and_no_two_have_one_hash():
    assert names() == SHIPPED
    found = [load_card(name) for name in SHIPPED]
    assert [card.name for card in found] == SHIPPED
    assert len({card.sha256 for card in found}) == len(found)
    assert all(re.fullmatch("[0-9a-f]{64}", card.sha256) for card in found)
    assert all(card.source and card.note and card.choices for card in found)
    livetalk = load_card("livetalk")
    assert (livetalk.clips.num, livetalk.clips.frames / livetalk.clips.fps) == (100, 5)
    assert len(livetalk.choices) >= 8  # what the paper does not say
    omniavatar = load_card("omniavatar")
    assert omniavatar.clips.frames / omniavatar.clips.fps == 15
    assert load_card("strict").clips.lossless
    assert load_card("syncnet_v2").fid is None


def test_sync_is_syncnets_wherever_a_card_asks_for_it():
    for name in ("livetalk", "omniavatar", "strict", "syncnet_v2"):
        rule = load_card(name).sync
        assert (rule.max_lag, rule.crop_scale, rule.crop_pad) == (MAX_LAG, syncnet.CROP_SCALE, syncnet.PAD_VALUE)
        assert (rule.fps, rule.padding, rule.channels) == (25, "zeros", "bgr")


OTHER = {str: "other", int: 7, float: 0.7, bool: True, type(None): 3, list: [64, 64]}


@pytest.mark.parametrize("name", ["livetalk", "strict"])
def test_every_key_that_decides_changes_the_hash_and_is_named(name):
    values, card = plain(name), load_card(name)
    for path, item in leaves(values):
        other = dataclasses.replace(card)
        changed = put(values, path, not item if isinstance(item, bool) else OTHER[type(item)])
        if path[0] in PROSE:
            assert convert(Card, put(values, path, "x" if isinstance(item, str) else ["x"])).sha256 == card.sha256
            continue
        sha = cards.canonical_sha256({key: value for key, value in changed.items() if key not in PROSE})
        assert sha != other.sha256, path
        told = first_difference(card.plain(), {**changed, "sha256": sha})
        assert told.startswith(".".join(path)), told


def test_equal_cards_do_not_differ_and_the_first_key_is_told():
    strict, livetalk = load_card("strict").plain(), load_card("livetalk").plain()
    assert first_difference(strict, copy.deepcopy(strict)) is None
    assert first_difference(strict, livetalk) == "clips.num is None here and 100 there"
    assert "by hand" in first_difference(strict, {**strict, "sha256": "0" * 64})


def test_the_hash_of_a_run_is_part_of_the_embedded_card():
    card = load_card("embedded")
    assert card.embedded
    one, two = card.resolved("a" * 64), card.resolved("b" * 64)
    assert len({card.sha256, one.sha256, two.sha256}) == 3
    assert one.fid.sha256 == one.fvd.sha256 == one.sync.sha256 == one.identity.sha256 == "a" * 64
    strict = load_card("strict")
    assert not strict.embedded
    assert strict.resolved("a" * 64) == strict


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (("fid", "sha256"), "0" * 64, "'fid.sha256' is 000"),
        (("sync", "sha256"), REGISTRY["i3d"].sha256, "'sync.sha256' is bec"),
        (("pairs", "lpips_sha256"), "0" * 64, "'pairs.lpips_sha256' is another file"),
        (("fid", "antialias"), True, "'fid.antialias': True .* must be one of False"),
        (("fid", "resize"), "lanczos", "one of 'tf1', 'pytorch_fid', 'none'"),
        (("fid", "ddof"), 2, "wrong value of 'fid.ddof'"),
        (("fid", "every"), 0, "'fid' asks for what inception does not do"),
        (("fid", "resize"), "none", "'fid' asks for what inception does not do"),
        (("fvd", "resize"), "none", "'fvd.resize' none is not for i3d"),
        (("sync", "channels"), "rgb", "'sync.channels' must be bgr for syncnet"),
        (("sync", "padding"), "none", "'sync.padding' must be zeros"),
        (("sync", "crop_pad"), 0, "'sync.crop_pad' must be 110"),
        (("sync", "fps"), 30, "'sync.fps' must be 25"),
        (("sync", "max_lag"), 0, "'sync.max_lag' must be at least 1"),
        (("sync", "crop_scale"), None, "'sync.crop_scale' and 'sync.resample' must be given"),
        (("clips", "frames"), 0, "clips.frames must be at least 1"),
        (("clips", "frames"), 9, "'clips.frames' must be at least 10 for FVD"),
        (("clips", "fps"), -1, "clips.fps must be above 0"),
        (("clips", "given"), -1, "clips.given must leave a frame"),
        (("floor_splits",), 1, "'floor_splits' must be at least 2"),
        (("fid", "extractor"), "probes", "'fid.sha256' is"),
        (("crop",), 0.5, "'crop'"),
    ],
)
def test_a_card_that_asks_for_what_the_code_does_not_do_is_refused(tmp_path, path, value, told):
    with pytest.raises(UserError, match=told) as caught:
        load_card(written(tmp_path, put(plain("strict"), path, value)))
    assert "\n" not in str(caught.value)
    assert "card" in str(caught.value)


def test_a_missing_key_a_missing_file_and_an_unknown_name_are_one_line(tmp_path):
    values = plain("strict")
    del values["floor_splits"]
    for name, told in (
        (written(tmp_path, values), "floor_splits"),
        (str(tmp_path / "none.yaml"), "cannot be read"),
        ("livetalks", "did you mean 'livetalk'?"),
    ):
        with pytest.raises(UserError, match=re.escape(told)) as caught:
            load_card(name)
        assert "\n" not in str(caught.value)
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(UserError, match="no YAML"):
        load_card(str(tmp_path / "bad.yaml"))


def test_a_users_card_with_the_same_keys_has_the_same_hash(tmp_path):
    assert load_card(written(tmp_path, plain("livetalk"))).sha256 == load_card("livetalk").sha256
