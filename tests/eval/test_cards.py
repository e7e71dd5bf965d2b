"""Protocol cards: strict, hashed over every key that decides a number, and made of the metrics that score."""

import copy
import pickle
import re

import pytest
import yaml

from eval.cards import PROSE, first_difference, from_plain, load_card, metric_classes, names
from eval.metrics.lip_sync import MAX_LAG
from eval.networks import syncnet
from eval.networks.weights import REGISTRY
from teachers.errors import UserError

HASHES = {
    "embedded": "223d98446d99",
    "livetalk": "653c8f9febe4",
    "omniavatar": "95b7c673ba43",
    "strict": "c461cbcad630",
    "syncnet_v2": "730977541668",
}
"""A change here is a change of every number's meaning: say in the commit which key changed, and why."""


def plain(name: str) -> dict:
    values = load_card(name).plain()
    del values["sha256"], values["weights"]
    return values


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
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return str(path)


def test_the_shipped_cards_are_complete_and_each_has_one_hash():
    assert names() == list(HASHES)
    found = [load_card(name) for name in HASHES]
    assert [card.name for card in found] == list(HASHES)
    assert {card.name: card.sha256[:12] for card in found} == HASHES
    assert len({card.sha256 for card in found}) == len(found)
    assert all(card.source and card.note and card.choices for card in found)
    livetalk = load_card("livetalk")
    assert (livetalk.clips.num, livetalk.clips.frames / livetalk.clips.fps) == (100, 5)
    assert len(livetalk.choices) >= 8  # what the paper does not say
    omniavatar = load_card("omniavatar")
    assert omniavatar.clips.frames / omniavatar.clips.fps == 15
    assert load_card("strict").clips.lossless
    assert "fid" not in load_card("syncnet_v2").metrics


def test_every_metric_of_the_package_is_on_some_card_and_no_two_columns_are_one():
    used = {type(metric) for name in names() for metric in load_card(name).metrics.values()}
    assert used == set(metric_classes().values())
    for name, kind in metric_classes().items():
        assert kind.__module__.startswith("eval.metrics.")
        assert kind.__module__.rpartition(".")[2] == name, "one file, of the metric's name"


def test_sync_is_syncnets_wherever_a_card_asks_for_it():
    for name in ("livetalk", "omniavatar", "strict", "syncnet_v2"):
        metric = load_card(name).metrics["sync"]
        assert (metric.name, metric.max_lag, metric.crop_scale) == ("lip_sync", MAX_LAG, syncnet.CROP_SCALE)
        assert load_card(name).plain()["weights"]["syncnet"] == REGISTRY["syncnet"].sha256


OTHERS = {
    "extractor": None,
    "resize": {"tf1": "pytorch_fid", "stylegan_v": "common_metrics"},
    "pooling": {"set": "pair"},
    "ddof": {1: 0},
    "resample": {"duplicate": "blend"},
    "sound": {"own": "real", "real": "own"},
    "retime": {"refuse": "shown", "shown": "refuse"},
    "fit": {"refuse": "crop", "crop": "refuse"},
    "name": None,
    "errors": None,
}


@pytest.mark.parametrize("name", ["livetalk", "strict"])
def test_every_key_that_decides_changes_the_hash_and_is_named(name):
    values, card = plain(name), load_card(name)
    tried = 0
    for path, item in leaves(values):
        if path[0] in PROSE:
            assert from_plain(put(values, path, "x" if isinstance(item, str) else ["x"])).sha256 == card.sha256
            continue
        if path[-1] == "size":
            other = [64, 64]
        elif path[-1] in OTHERS:
            other = (OTHERS[path[-1]] or {}).get(item)
        else:
            other = {bool: lambda x: not x, int: lambda x: x + 1, float: lambda x: x / 2, list: lambda _: [64, 64]}.get(
                type(item), lambda _: 12
            )(item)
        if other is None or path in (("probes",), ("run",)):
            continue
        changed = from_plain(put(values, path, other))
        assert changed.sha256 != card.sha256, path
        assert first_difference(card.plain(), changed.plain()).startswith(".".join(path)), path
        tried += 1
    assert tried > 20
    fewer = copy.deepcopy(values)
    del fewer["metrics"]["quality"]
    assert "metrics.quality.window_seconds is 1 here and None there" in first_difference(
        card.plain(), from_plain(fewer).plain()
    )


def test_equal_cards_do_not_differ_and_the_first_key_is_named():
    strict, livetalk = load_card("strict").plain(), load_card("livetalk").plain()
    assert first_difference(strict, copy.deepcopy(strict)) is None
    assert first_difference(strict, livetalk) == "clips.num is None here and 100 there"
    assert "by hand" in first_difference(strict, {**strict, "sha256": "0" * 64})


def test_the_hash_of_a_run_is_part_of_the_embedded_card():
    card = load_card("embedded")
    assert card.embedded
    one, two = card.resolved("a" * 64), card.resolved("b" * 64)
    assert len({card.sha256, one.sha256, two.sha256}) == 3
    assert one.probes == "a" * 64
    strict = load_card("strict")
    assert not strict.embedded
    assert strict.resolved("a" * 64) == strict


def test_a_card_survives_another_process():
    card = load_card("embedded").resolved("a" * 64, {"admitted": {"fid": True}})
    again = pickle.loads(pickle.dumps(card))  # noqa: S301
    assert again == card
    assert again.sha256 == card.sha256


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("metrics", "fid", "antialias"), True, "unknown key 'metrics.fid.antialias'"),
        (("metrics", "fid", "resize"), "lanczos", "one of 'tf1', 'pytorch_fid', 'none'"),
        (("metrics", "fid", "ddof"), 2, "wrong value of 'metrics.fid.ddof'"),
        (("metrics", "fid", "every"), 0, "wrong value in 'metrics.fid': .* every must be at least 1: got 0"),
        (("metrics", "fid", "resize"), "none", "resize none is not for inception"),
        (("metrics", "kid", "resize"), "none", "resize none is not for inception"),
        (("metrics", "fvd", "resize"), "none", "resize none is not for i3d"),
        (("metrics", "sync", "max_lag"), 0, "max_lag must be at least 1"),
        (("metrics", "sync", "crop_scale"), None, "wrong value of 'metrics.sync.crop_scale'"),
        (("metrics", "quality", "window_seconds"), 0, "window_seconds must be above 0"),
        (("metrics", "quality"), 3, "wrong value of 'metrics.quality': 3"),
        (("metrics", "fidd"), {}, "unknown metric 'fidd': metrics.fidd in .*did you mean 'fid'"),
        (("metrics", "twice"), {"name": "psnr"}, "'metrics.twice' and 'metrics.psnr' both score 'psnr'"),
        (
            ("metrics", "mine"),
            {"name": "no_such_module:Thing"},
            "no file of the metric 'no_such_module': metrics.mine in .*",
        ),
        (("metrics",), {}, "'metrics' is empty"),
        (("metrics",), None, "a protocol card is a mapping with 'metrics'"),
        (("clips", "frames"), 0, "clips.frames must be at least 1"),
        (("clips", "fps"), -1, "clips.fps must be above 0"),
        (("clips", "given"), -1, "clips.given must leave a frame"),
        (("floor_splits",), 1, "'floor_splits' must be at least 2"),
        (("metrics", "fid", "extractor"), "probes", "resize tf1 is not for probes"),
        (("crop",), 0.5, "'crop'"),
    ],
)
def test_a_card_that_asks_for_what_the_code_does_not_do_is_refused(tmp_path, path, value, expected):
    with pytest.raises(UserError, match=expected) as caught:
        load_card(written(tmp_path, put(plain("strict"), path, value)))
    assert "\n" not in str(caught.value)
    assert "card" in str(caught.value)


def test_a_missing_key_a_missing_file_and_an_unknown_name_are_one_line(tmp_path):
    values = plain("strict")
    del values["floor_splits"]
    for name, expected in (
        (written(tmp_path, values), "floor_splits"),
        (str(tmp_path / "none.yaml"), "cannot be read"),
        ("livetalks", "did you mean 'livetalk'?"),
    ):
        with pytest.raises(UserError, match=re.escape(expected)) as caught:
            load_card(name)
        assert "\n" not in str(caught.value)
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(UserError, match="not YAML"):
        load_card(str(tmp_path / "bad.yaml"))


def test_a_users_card_with_the_same_keys_has_the_same_hash(tmp_path):
    assert load_card(written(tmp_path, plain("livetalk"))).sha256 == load_card("livetalk").sha256
