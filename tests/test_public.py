"""The public face: what each package offers, and that importing one loads nothing heavy."""

import subprocess
import sys
from importlib import import_module, resources

import pytest

FACE = {
    "teachers": {"Conditions", "Guidance", "Teacher", "UserError", "load_teacher"},
    "students": {
        *("AvatarPipeline", "Chunk", "History", "Schedule", "Session", "Starved"),
        *("load_session", "load_student", "save_session", "save_student", "step_together"),
    },
    "eval": {"Card", "load_card"},
    "distill": {"Recipe", "load_recipe", "load_teacher", "run"},
}


@pytest.mark.parametrize("name", FACE)
def test_a_package_offers_its_face_documented_and_typed(name):
    package = import_module(name)
    assert set(package.__all__) == FACE[name]
    assert set(package.__all__) <= set(dir(package))
    for offered in package.__all__:
        value = getattr(package, offered)
        assert value.__module__.partition(".")[0] in FACE
        assert value.__doc__
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'nothing'"):
        _ = package.nothing
    assert resources.files(name).joinpath("py.typed").is_file()


def test_importing_the_packages_is_light():
    script = f"import sys, {', '.join(FACE)}; print(sorted(set(sys.modules) & {{'torch', 'diffusers', 'av', 'yaml'}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
