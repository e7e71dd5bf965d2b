"""examples/comfyui against ComfyUI's documented contract of nodes: what a node declares, what is passed, when it runs again.

`Comfy` is that contract in small: workflows in the API's format, checks of names and types before anything runs, results kept by
inputs and IS_CHANGED, hidden inputs.
"""

import importlib.util
import inspect
import json
from pathlib import Path

import pytest
import torch

from students import AvatarPipeline
from students.weights.checkpoint import save_student
from teachers.errors import UserError
from tests.support.tiny import a_bundle, some_sound

FOLDER = Path(__file__).parents[2] / "examples" / "comfyui"
PLAIN = {"STRING": str, "INT": int, "FLOAT": float, "BOOLEAN": bool}


@pytest.fixture(scope="module")
def nodes():
    spec = importlib.util.spec_from_file_location("avatar_distill_nodes", FOLDER / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comfyui") / "student"
    save_student(folder, a_bundle(), "card")
    return folder


class Given:
    """A node of ComfyUI's own that the test stands in for."""

    CATEGORY, FUNCTION = "test", "give"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": cls.takes}

    def give(self, **inputs):
        return self.gives(**inputs)


def given(types, takes, gives):
    return type("Node", (Given,), {"RETURN_TYPES": types, "takes": takes, "gives": staticmethod(gives)})


class Comfy:
    """Runs workflows {id: {class_type, inputs}}; `ran`: the nodes that the last run executed."""

    def __init__(self, classes):
        self.classes, self.kept, self.ran, self.versions = classes, {}, [], {}

    def run(self, workflow, output):
        self.ran, self.done = [], {}
        return self.value(workflow, output)

    def value(self, workflow, key):
        if key in self.done:
            return self.done[key]
        kind = self.classes[workflow[key]["class_type"]]
        declared, inputs, sources = kind.INPUT_TYPES(), {}, {}
        needed = {**declared["required"], **declared.get("optional", {})}
        for name, value in workflow[key]["inputs"].items():
            wanted = needed[name][0]
            if isinstance(value, list):
                source = self.classes[workflow[value[0]]["class_type"]]
                assert source.RETURN_TYPES[value[1]] == wanted, (key, name)
                inputs[name], sources[name] = self.value(workflow, value[0])[value[1]], (value, self.versions[value[0]])
            else:
                options = needed[name][1] if len(needed[name]) > 1 else {}
                assert value in wanted if isinstance(wanted, list) else isinstance(value, PLAIN[wanted]), (key, name)
                assert options.get("min", value) <= value <= options.get("max", value)
                inputs[name] = sources[name] = value
        assert set(inputs) == set(declared["required"]), key
        changed = getattr(kind, "IS_CHANGED", lambda **_: None)(**inputs)
        mark = kind, sources, changed
        if self.kept.get(key, (None,))[0] != mark or changed != changed:
            hidden = {name: key for name, word in declared.get("hidden", {}).items() if word == "UNIQUE_ID"}
            self.kept[key] = mark, getattr(kind(), kind.FUNCTION)(**inputs, **hidden)
            self.ran.append(key)
            self.versions[key] = self.versions.get(key, 0) + 1
        self.done[key] = self.kept[key][1]
        check_results(kind, self.done[key])
        return self.done[key]


def check_results(kind, results):
    """Results have the declared types, in ComfyUI's shapes."""
    assert isinstance(results, tuple)
    assert len(results) == len(kind.RETURN_TYPES)
    for name, value in zip(kind.RETURN_TYPES, results, strict=True):
        if name == "IMAGE":
            assert (value.ndim, value.shape[0] > 0, value.shape[3], value.dtype) == (4, True, 3, torch.float32)
            assert 0 <= value.min() <= value.max() <= 1
        elif name == "AUDIO":
            assert (value["waveform"].ndim, value["waveform"].dtype) == (3, torch.float32)
            assert isinstance(value["sample_rate"], int)
        elif name in PLAIN:
            assert isinstance(value, PLAIN[name])


PORTRAIT = torch.rand(2, 24, 32, 3, generator=torch.Generator().manual_seed(0))
SOUND = {"waveform": some_sound(20000).view(1, 1, -1).repeat(1, 2, 1), "sample_rate": 16000}


@pytest.fixture
def comfy(nodes):
    nodes.Stream.open.clear()
    stands = {
        "LoadImage": given(("IMAGE", "MASK"), {"image": ("STRING",)}, lambda image: (PORTRAIT, None)),
        "LoadAudio": given(("AUDIO",), {"audio": ("STRING",)}, lambda audio: (SOUND,)),
        "CreateVideo": given(
            ("VIDEO",), {"images": ("IMAGE",), "audio": ("AUDIO",), "fps": ("FLOAT",)}, lambda **k: (k,)
        ),
    }
    return Comfy({**nodes.NODE_CLASS_MAPPINGS, **stands})


def test_what_nodes_declare_is_what_their_functions_take(nodes):
    assert nodes.NODE_DISPLAY_NAME_MAPPINGS.keys() == nodes.NODE_CLASS_MAPPINGS.keys()
    for kind in nodes.NODE_CLASS_MAPPINGS.values():
        declared = kind.INPUT_TYPES()
        names = [name for group in declared.values() for name in group]
        assert [*inspect.signature(getattr(kind, kind.FUNCTION)).parameters][1:] == names
        assert len(kind.RETURN_NAMES) == len(kind.RETURN_TYPES)
        for wanted, *options in declared["required"].values():
            assert isinstance(wanted, list) or wanted.isupper()
            if options and isinstance(wanted, list):
                assert options[0]["default"] in wanted


def test_the_workflow_makes_the_pipelines_video(comfy, student):
    workflow = json.loads((FOLDER / "talk.json").read_text())
    assert workflow.pop("6")["class_type"] == "SaveVideo"
    workflow["1"]["inputs"]["folder"] = str(student)
    workflow["4"]["inputs"]["crop"] = "center"
    (video,) = comfy.run(workflow, "5")
    pixels = (PORTRAIT[0] * 255).round().to(torch.uint8).numpy()
    from PIL import Image

    pipe, text = AvatarPipeline.from_pretrained(student), workflow["4"]["inputs"]["text"]
    whole = pipe(Image.fromarray(pixels), SOUND["waveform"][0], text, output_type="pt", crop="center")
    assert torch.equal((video["images"] * 255).round().to(torch.uint8), whole.frames)
    assert torch.equal(video["audio"]["waveform"][0, 0], whole.audio)
    assert video["fps"] == whole.fps
    comfy.run(workflow, "5")
    assert comfy.ran == []
    (student / "spec.json").touch()
    comfy.run(workflow, "5")
    assert "1" in comfy.ran


def a_stream(folder):
    stream = {"text": "a person nods", "seed": 3, "crop": "center", "last": False, "restart": False}
    return {
        "load": {
            "class_type": "AvatarDistillLoad",
            "inputs": {"folder": str(folder), "device": "cpu", "dtype": "fp32"},
        },
        "image": {"class_type": "LoadImage", "inputs": {"image": "a.png"}},
        "sound": {"class_type": "Piece", "inputs": {"first": 0}},
        "stream": {
            "class_type": "AvatarDistillStream",
            "inputs": {"student": ["load", 0], "portrait": ["image", 0], "audio": ["sound", 0], **stream},
        },
    }


def pieces(first):
    return ({**SOUND, "waveform": SOUND["waveform"][..., first : first + 4000]},)


def test_a_stream_goes_on_from_run_to_run(comfy, nodes, student):
    comfy.classes["Piece"] = given(("AUDIO",), {"first": ("INT", {"default": 0})}, pieces)
    workflow, frames = a_stream(student), []
    for first in range(0, 20000, 4000):
        workflow["sound"]["inputs"]["first"] = first
        workflow["stream"]["inputs"]["last"] = first == 16000
        images, sound, new, number = comfy.run(workflow, "stream")
        assert "stream" in comfy.ran
        assert number == sum(map(len, frames))
        assert sound["waveform"].shape[2] == max(new, 1) * 1280
        frames += [images] if new else []
    workflow["stream"]["inputs"].update(last=True, restart=True)
    workflow["sound"] = {"class_type": "LoadAudio", "inputs": {"audio": "a.wav"}}
    whole = comfy.run(workflow, "stream")[0]
    assert torch.equal(torch.cat(frames), whole)


def test_equal_sound_is_pushed_again_and_a_new_seed_opens_a_new_stream(comfy, nodes, student):
    comfy.classes["Piece"] = given(("AUDIO",), {"first": ("INT", {"default": 0})}, pieces)
    workflow = a_stream(student)
    assert [comfy.run(workflow, "stream")[2:] for _ in range(3)] == [(3, 0), (0, 3), (4, 3)]
    workflow["stream"]["inputs"]["text"] = "someone smiles"
    assert comfy.run(workflow, "stream")[3] == 7
    assert next(iter(nodes.Stream.open.values())).session.point.text == "someone smiles"
    workflow["stream"]["inputs"]["seed"] = 4
    assert comfy.run(workflow, "stream")[3] == 0
    for number in range(6):
        comfy.run({**a_stream(student), f"s{number}": workflow["stream"]}, f"s{number}")
    assert len(nodes.Stream.open) == nodes.MOST_STREAMS


def test_mistakes_are_one_line(nodes, comfy, student, tmp_path):
    with pytest.raises(UserError, match="no student"):
        nodes.LoadStudent().load(str(tmp_path), "cpu", "fp32")
    pipe = nodes.LoadStudent().load(str(student), "cpu", "fp32")[0]
    with pytest.raises(UserError, match="audio is empty"):
        nodes.Talk().talk(pipe, PORTRAIT, {"waveform": torch.zeros(1, 1, 0), "sample_rate": 16000}, "", 0, "center")
