"""A recipe's own acceptance targets: names are read by one rule, and the report says which are met."""

import math

import pytest

from distill.compose import RECIPES
from distill.expect import SHOWN, Bounds, check, compare
from distill.pipeline.evaluation.evaluate import ratios, targets
from distill.recipe import load_recipe
from teachers.errors import UserError


def system(cost: float = 1.0, **means: float) -> dict:
    return {
        "metrics": {name: {"mean": mean} for name, mean in means.items()},
        "cost": {"seconds_per_video_second": cost, "batch_seconds_per_video_second": cost, "ttff_seconds": 2 * cost},
    }


SYSTEMS = {
    "teacher": system(cost=40.0, fid=2.0, sync=0.9, motion=0.5),
    "teacher_few_step": system(fid=5.0),
    "init": system(fid=4.0, sync=0.8, motion=0.4),
    "zero_shot": system(fid=0.0, sync=0.1, motion=0.3),
    "student": system(fid=3.0, sync=0.85, motion=0.6, motion_energy=1.2),
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fid_student_over_teacher", 1.5),
        ("fid_teacher_few_step_over_teacher", 2.5),
        ("sync_student_minus_init", 0.05),
        ("motion_energy_student", 1.2),
        ("sync_teacher", 0.9),
        ("cost_teacher_over_student", 40.0),
        ("ttff_student", 2.0),
        ("fvd_student_over_teacher", None),
        ("fid_student_over_ar_teacher", None),
        ("fid_init_over_zero_shot", math.nan),
    ],
)
def test_a_name_is_read_by_one_rule(name, value):
    assert compare(name, SYSTEMS) == pytest.approx(value, nan_ok=True)


def test_the_report_has_what_is_measured_and_every_expectation():
    assert set(ratios(SYSTEMS)) <= set(SHOWN)
    assert not any("fvd" in name or "ar_teacher" in name for name in ratios(SYSTEMS))
    expect = {
        "fid_student_over_teacher": Bounds(at_most=1.1),
        "motion_energy_student": Bounds(at_least=0.9, at_most=1.3),
        "fidd_student": Bounds(at_most=1.0),
        "diversity_student": Bounds(at_least=1.0),
    }
    found = targets(SYSTEMS, expect, {"diversity": "not known"})
    assert [found[name]["passed"] for name in found] == [False, True, None]
    assert found["fidd_student"]["value"] is None, "one that nothing measures is shown as such"
    assert "diversity_student" not in found


@pytest.mark.parametrize("name", ["fid_student_over", "fid_students", "student_over_teacher", "fid_student_times_init"])
def test_a_name_that_the_rule_does_not_read_is_refused(name):
    with pytest.raises(UserError, match=rf"^expect\.{name}: not QUANTITY_SYSTEM"):
        check({name: Bounds(at_most=1.0)})
    with pytest.raises(UserError, match=rf"expect\.{name}"):
        load_recipe(RECIPES / "scratch_avatar.yaml", [f"expect.{name}={{at_most: 1.0}}"])


def test_recipes_hold_their_own():
    own = load_recipe(RECIPES / "scratch_avatar.yaml").expect
    assert len(own) == 16
    assert own["fid_student_over_teacher"] == Bounds(at_most=1.1)
    assert load_recipe(RECIPES / "scratch_avatar.yaml", ["expect={}"]).expect == own, "an override adds"
    assert load_recipe(RECIPES / "livetalk.yaml", ["teacher.path=x"]).expect == {}
    with pytest.raises(UserError, match="expect: an entry without bounds"):
        load_recipe(RECIPES / "scratch_avatar.yaml", ["expect.fid_student={}"])
