import base64
import io
import json
import re
from fractions import Fraction
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from eval.embedded.protocol import EvalConfig, Geometry, run_card
from eval.report.conclusion import conclusion, is_withheld
from eval.report.figures import curve_svg, dot_svg, number, sheet_image, ticks
from eval.report.run_report import target, write_report


def score(mean: float, **more) -> dict:
    return {"mean": mean, "spread": 0.01, "error": 0.02, "seeds": [mean - 0.01, mean, mean + 0.01], **more}


def small_report(**admitted: bool) -> dict:
    every = {"fid": True, "kid": True, "fvd": True, "sync": True, "motion": True, "diversity": True, **admitted}
    geometry = Geometry(frames=15, height=32, width=32, fps=Fraction(25, 2))
    card = run_card(EvalConfig(), geometry, "a" * 64, every, {"run": 1})
    parts = {"pixels": 0.9, "head_spread": 0.8, "light_spread": 1.0, "gaze_spread": 0.7, "blink_rate": 0.6}

    def system(fid: float) -> dict:
        metrics = {
            "fid": score(fid),
            "fvd": score(2 * fid),
            "sync": score(0.77123),
            "diversity": score(0.8, parts=parts),
        }
        metrics["sync_offset_frames"] = {"mean": 0.0, "spread": 0.0, "error": None, "seeds": [0.0]}
        return {"metrics": metrics, "cost": {"nfe_per_chunk": 3, "seconds_per_video_second": 0.08, "fps": float("inf")}}

    names = ("student", "init", "zero_shot", "teacher_few_step", "teacher")
    return {
        "recipe": "tiny <recipe>",
        "versions": {"torch": torch.__version__},
        "device": {"threads": 2},
        "stages": {
            "data": {"seconds": 9.0, "fingerprint": "abc", "metrics": {"clips": 12, "nested": {"a": 1}}},
            "extractors": {"metrics": {"admitted": every, "cases": {"fid": {"real": 1.0, "decoded": 2.0}}}},
        },
        "systems": {name: system(1.0 + i) for i, name in enumerate(names)},
        "floor": {"fid": score(0.5), "sync": score(0.77123)},
        "codec": {"metrics": {"fid": score(0.6)}},
        "targets": {"fid_student_over_teacher": target(0.94, at_most=1.1), "motion": target(0.5, at_least=0.85)},
        "columns": {name: column.plain() for name, column in card.columns.items()},
        "protocol": card.plain(),
    }


CURVES = {"teacher loss": {"loss": [(step, 1 / (step + 1)) for step in range(1000)]}, "empty": {"nothing": []}}


def clips(num: int) -> list[torch.Tensor]:
    return list(
        torch.randint(0, 256, (num, 3, 15, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    )


class Page(HTMLParser):
    """Checks that tags nest, collects rows of tables and addresses."""

    def __init__(self):
        super().__init__()
        self.open, self.sources, self.rows = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img", "br", "link", "input", "circle", "line", "polyline"):
            self.open.append(tag)
        self.sources += [value for key, value in attrs if key in ("src", "href")]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and ("td" in self.open or "th" in self.open):
            self.rows[-1][-1] += data.strip()


def read_page(path) -> tuple[str, Page]:
    text = path.read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    return text, page


def test_report_is_one_page_and_one_document(tmp_path):
    sample = tmp_path / "samples" / "student.mp4"
    sample.parent.mkdir()
    sample.write_bytes(b"not a real film")
    sheets = {"teacher": clips(2), "student": clips(2)}
    videos = {"a <i>smile</i>": {"real": sample, "student": sample}, "nods": {"student": sample}}
    path = write_report(small_report() | {"notes": ["One person."]}, CURVES, sheets, videos, tmp_path, ["a <b>nod</b>"])
    text, page = read_page(path)
    assert "embedded extractors; not comparable with published FID" in text
    assert all(source.startswith("data:") for source in page.sources)
    heads = " / ".join(re.findall(r"<h2>(.*?)</h2>", text))
    assert heads.startswith(
        "Videos / Targets / Scores / Training curves / Contact sheets / Admission of the metrics / "
    )
    assert "http" not in re.sub(r"data:[^\"]*", "", text)
    assert text.count("data:image/webp") == 2
    assert [group.count("<video controls") for group in text.split('<div class="group">')[1:]] == [2, 1]
    assert 'data-fps="12.5"' in text
    assert "a &lt;i&gt;smile&lt;/i&gt;" in text
    assert "tiny &lt;recipe&gt;" in text
    assert "a &lt;b&gt;nod&lt;/b&gt;" in text
    assert "1 of 2 targets are met" in text
    assert '<p class="lead">One person.</p>' in text
    assert ["FID", "admitted", "real 1.00, decoded 2.00"] in page.rows
    assert not re.search(r"<[a-z ]+ at 0x|built-in method|undefined", text)
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["systems"]["student"]["cost"]["fps"] is None
    assert document["systems"]["student"]["metrics"]["fid"]["seeds"] == pytest.approx([0.99, 1.0, 1.01])
    assert document["videos"]["nods"] == {"student": "samples/student.mp4"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json", "report.md", "samples"]


def test_systems_come_in_reading_order(tmp_path):
    _, page = read_page(write_report(small_report(), {}, {}, {}, tmp_path))
    first = next(i for i, row in enumerate(page.rows) if row and row[0] == "floor")
    names = [row[0] for row in page.rows[first : first + 7]]
    assert names == ["floor", "codec", "teacher", "teacher few step", "zero shot", "init", "student"]
    assert page.rows[first + 6][1].startswith("1.00")


def test_a_metric_that_was_not_admitted_is_no_score_anywhere(tmp_path):
    text, page = read_page(write_report(small_report(sync=False), {}, {}, {}, tmp_path))
    student = next(row for row in page.rows if row and row[0] == "student")
    assert student.count("not admitted") == 2  # sync and the offset that stands on it
    assert "0.771" not in text
    document = json.loads((tmp_path / "report.json").read_text())
    assert "sync" not in document["systems"]["student"]["metrics"]
    assert document["systems"]["student"]["not_admitted"]["sync"]["mean"] == pytest.approx(0.77123)


def test_a_target_on_a_metric_that_was_not_admitted_is_not_evaluated(tmp_path):
    text, page = read_page(write_report(small_report(motion=False, fid=False), {}, {}, {}, tmp_path))
    assert ["FID student over teacher", "not admitted", "at most 1.1", ""] in page.rows
    assert "0 of 1 targets are met" in text  # the other stands on motion, which no system was scored on here
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["targets"]["fid_student_over_teacher"]["passed"] is None


def test_an_almost_empty_report_still_renders(tmp_path):
    text, _ = read_page(write_report({"systems": {}}, {}, {}, {}, tmp_path))
    assert "Targets" not in text


def test_large_samples_are_linked_relative_to_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr("eval.report.videos.EMBED_LIMIT", 3)
    sample = tmp_path / "samples" / "a.mp4"
    sample.parent.mkdir()
    sample.write_bytes(b"12345")
    _, page = read_page(write_report({}, {}, {}, {"nods": {"a": sample}}, tmp_path))
    assert page.sources == ["samples/a.mp4"]


def test_targets_say_whether_they_are_met():
    assert target(1.05, at_most=1.1) == {"value": 1.05, "target": "at most 1.1", "passed": True}
    assert target(0.8, at_least=0.85)["passed"] is False
    assert target(1.2, 0.88, 1.15)["passed"] is False
    assert target(3.0)["passed"] is None


def test_numbers_are_short():
    assert [number(x) for x in (0, 1.23456, 0.0123456, 123.4, None, float("nan"), -2.5, 4, 117984, -0.0)] == [
        "0",
        "1.23",
        "0.0123",
        "123",
        "-",
        "-",
        "-2.50",
        "4",
        "117,984",
        "0",
    ]


def test_ticks_are_round_and_inside():
    assert ticks(0, 1) == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert all(0.13 <= mark <= 17.2 for mark in ticks(0.13, 17.2))


def test_figures_survive_odd_values():
    assert curve_svg({"a": [(0, float("nan"))]}) == ""
    assert "polyline" in curve_svg({"a": [(3, 1.0)]})
    assert "polyline" in curve_svg({"a": [(0, -1.0), (1, 2.0)], "b": [(0, 0.0), (1, float("inf"))]})
    assert "nan" not in dot_svg([("a", {"mean": -0.5, "error": None}), ("b", {"mean": 0.0})], target=1.0)
    assert dot_svg([("a", {"mean": None})]) == ""


def labels(svg: str, anchor: str) -> list[str]:
    return re.findall(rf'<text class="tick"[^>]*text-anchor="{anchor}">([^<]*)</text>', svg)


def test_a_curve_of_few_steps_has_whole_steps_and_room_for_long_labels():
    svg = curve_svg({"a": [(2, 0.297980), (4, 0.297990)]})
    assert labels(svg, "middle") == ["2", "3", "4"]
    longest = max(map(len, labels(svg, "end")))
    assert longest > 7
    assert all(
        float(x) > 6 * longest for x in re.findall(r'<text class="tick" x="([\d.]+)"[^>]*text-anchor="end"', svg)
    )


def test_a_run_keeps_its_name_in_plots():
    assert ">dmd_avatar</text>" in dot_svg([("dmd_avatar", {"mean": 1.0})])


def test_sheet_keeps_every_pixel():
    rows = clips(2)
    image = Image.open(io.BytesIO(base64.b64decode(sheet_image(rows, 8).split(",")[1])))
    assert image.size == (8 * 32 + 7, 2 * 32 + 1)
    assert image.getpixel((33 + 5, 33 + 7))[:3] == tuple(rows[1][:, 2, 7, 5].tolist())


def said(ratios: dict, targets: dict, withheld: tuple[str, ...] = ()) -> str:
    student = {"metrics": {"fid": 1, "motion_energy": 1}, "not_admitted": dict.fromkeys(withheld, 1)}
    return conclusion({"ratios": ratios, "targets": targets, "systems": {"student": student}})


def test_the_conclusion_is_one_sentence_of_what_was_measured_and_admitted():
    ratios = {"fid_student_over_teacher": 1.02, "sync_student_over_teacher": -3.1, "motion_student_over_teacher": 0.98}
    speeds = {"batch_cost_teacher_over_student": 18.2, "ttff_teacher_over_student": None}
    good, bad = target(1.02, at_most=1.1), target(2.0, at_most=1.1)
    assert said(ratios | speeds, {"fid_student_over_teacher": good}) == (
        "Against its teacher the student has 1.02 times the FID and 0.980 times the motion and generates 18.2 times as fast in a "
        "batch; its one target is met."
    )
    unjudged = {**bad, "passed": None, "not_admitted": True}
    text = said(ratios, {"fid_student": bad, "cost_student": good, "motion_student": unjudged}, ("motion",))
    assert text == (
        "Against its teacher the student has 1.02 times the FID; 1 of 2 targets are met, missed: FID student; "
        "1 more could not be evaluated."
    )
    assert said({}, {}) == ""


def test_a_metric_whose_name_begins_like_a_refused_one_is_evaluated():
    systems = {"student": {"metrics": {"motion_energy": 1}, "not_admitted": {"motion": 1, "sync": 1}}}
    names = ("motion_energy_student", "motion_student", "sync_student_over_teacher", "cost_student")
    assert [is_withheld(name, systems) for name in names] == [False, True, True, False]
