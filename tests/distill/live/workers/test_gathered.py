"""The health and the metrics of all workers as one."""

import pytest

from distill.live.operations.metrics import Histogram, exposition
from distill.live.workers.gathered import labelled, overall


@pytest.mark.parametrize(
    ("statuses", "wanted"),
    [
        (["ok", "full"], "ok"),
        (["full", "stuck"], "full"),
        (["stuck", "ended"], "stuck"),
        (["starting", "ended"], "starting"),
        (["ended", "ended"], "ended"),
        (["closing", "ended"], "closing"),
    ],
)
def test_the_server_is_as_well_as_its_best_worker(statuses, wanted):
    assert overall(statuses) == wanted
    assert overall(statuses[::-1]) == wanted


def test_each_series_has_its_worker_and_each_name_one_head():
    histogram = Histogram(0.1, 1)
    histogram.add(0.5)
    texts = {
        worker: exposition(
            [
                ("a", "gauge", "Of a.", number),
                ("b_seconds", "histogram", "Of b, {seconds}.", histogram),
                ("c_total", "counter", "Of c.", {"full": number}),
            ]
        )
        for worker, number in (("0", 1), ("1", 2.5))
    }
    texts["parent"] = exposition([("c_total", "counter", "Of c.", {"sockets": 3})])
    lines = labelled(texts).splitlines()
    assert lines[:4] == ["# HELP a Of a.", "# TYPE a gauge", 'a{worker="0"} 1', 'a{worker="1"} 2.5']
    assert lines.count("# TYPE b_seconds histogram") == 1
    assert 'b_seconds_bucket{worker="1",le="+Inf"} 1' in lines
    assert 'b_seconds_sum{worker="0"} 0.5' in lines
    assert lines[-3:] == [
        'c_total{worker="0",reason="full"} 1',
        'c_total{worker="1",reason="full"} 2.5',
        'c_total{worker="parent",reason="sockets"} 3',
    ]
    assert labelled({"0": "", "1": ""}) == "\n"
