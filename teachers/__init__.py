"""What a student is made from: teacher networks and their noise process, conditions, codecs, encoders, checkpoints, media.

from teachers import Conditions, Guidance, load_teacher

teacher = load_teacher("Wan2.1-T2V-1.3B")                      # any published layout of Wan 2.1, OmniAvatar, Self Forcing
x0 = teacher.sample(conditions, noise, num_steps=50, shift=5.0, guidance=Guidance(text=5.0))
"""

from typing import TYPE_CHECKING

from teachers.lazy import offer

if TYPE_CHECKING:
    from teachers.conditions import Conditions
    from teachers.errors import UserError
    from teachers.guidance import Guidance
    from teachers.teacher import Teacher, load_teacher

__all__ = ["Conditions", "Guidance", "Teacher", "UserError", "load_teacher"]
__getattr__, __dir__ = offer(
    __name__,
    {
        "Conditions": "teachers.conditions",
        "Guidance": "teachers.guidance",
        "Teacher": "teachers.teacher",
        "UserError": "teachers.errors",
        "load_teacher": "teachers.teacher",
    },
)
