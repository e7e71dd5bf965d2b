"""What is made and served: causal students, their context, and sessions that stream them.

from students import AvatarPipeline, Session, load_student

clip = AvatarPipeline.from_pretrained("runs/mine/student")(image=image, audio=samples, prompt="a person talks")
session = Session(load_student("runs/mine/student"), reference, "a person talks")
"""

from typing import TYPE_CHECKING

from teachers.lazy import offer

if TYPE_CHECKING:
    from students.history import History
    from students.schedule import Schedule
    from students.serving.inputs import Starved
    from students.serving.pipeline import AvatarPipeline
    from students.serving.session import Chunk, Session
    from students.serving.snapshot import load_session, save_session
    from students.serving.together import step_together
    from students.weights.checkpoint import load_student, save_student

__all__ = [
    "AvatarPipeline",
    "Chunk",
    "History",
    "Schedule",
    "Session",
    "Starved",
    "load_session",
    "load_student",
    "save_session",
    "save_student",
    "step_together",
]
__getattr__, __dir__ = offer(
    __name__,
    {
        "AvatarPipeline": "students.serving.pipeline",
        "Chunk": "students.serving.session",
        "History": "students.history",
        "Schedule": "students.schedule",
        "Session": "students.serving.session",
        "Starved": "students.serving.inputs",
        "load_session": "students.serving.snapshot",
        "load_student": "students.weights.checkpoint",
        "save_session": "students.serving.snapshot",
        "save_student": "students.weights.checkpoint",
        "step_together": "students.serving.together",
    },
)
