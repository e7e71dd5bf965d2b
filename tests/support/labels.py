"""Labels of every frame of the embedded world, in the order of the tests' probes."""

FRAME_LABELS = (
    "mouth_open",
    "mouth_width",
    "blink",
    "gaze",
    "head_x",
    "head_y",
    "tilt",
    "light",
    "smile",
    "frown",
    "surprised",
)
