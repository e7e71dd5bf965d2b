"""Prometheus' text format, by its grammar."""

import re

from distill.live.operations.metrics import Histogram, exposition

LINE = re.compile(r'[a-zA-Z_:][\w:]*(\{\w+="[^"\\\n]*"\})? (\+Inf|-?\d+(\.\d+)?(e[+-]?\d+)?)')


def test_a_histogram_counts_those_below_each_bound():
    histogram = Histogram(1, 2.5, 4)
    for value in (0.5, 1, 2, 3, 9):
        histogram.add(value)
    assert list(histogram.lines("x")) == [
        'x_bucket{le="1"} 2',
        'x_bucket{le="2.5"} 3',
        'x_bucket{le="4"} 4',
        'x_bucket{le="+Inf"} 5',
        "x_sum 15.5",
        "x_count 5",
    ]


def test_every_line_is_what_prometheus_reads():
    text = exposition(
        [
            ("a_total", "counter", "Of a.", 3),
            ("b", "gauge", "Of b.", 0.25),
            ("c_seconds", "histogram", "Of c.", Histogram(0.1, 1)),
            ("d_total", "counter", "Of d.", {"full": 1, "closing": 0}),
        ]
    )
    assert text.endswith("\n")
    kinds = {}
    for line in text.splitlines():
        if line.startswith("# TYPE"):
            _, _, name, kind = line.split(" ")
            kinds[name] = kind
        elif not line.startswith("# HELP"):
            assert LINE.fullmatch(line), line
            name = re.split("[ {]", line)[0]
            assert name in kinds or re.sub("_(bucket|sum|count)$", "", name) in kinds
    assert kinds == {"a_total": "counter", "b": "gauge", "c_seconds": "histogram", "d_total": "counter"}
    assert 'd_total{reason="full"} 1' in text.splitlines()
