"""The labels of every frame of the procedural world."""

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
