"""The doctor says what is there, what is missing and where it goes."""

from distill.cli import main
from distill.commands import doctor


def test_what_the_embedded_recipe_needs_is_here(capsys):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "ready"
    assert not [line for line in lines if line.startswith("MISSING")]
    assert any(line.startswith("ok") and "libx264" in line for line in lines)
    for part in ("wav2vec2-base-960h", "umt5-xxl", "Wan2.1_VAE.pth", "taew2_1", "dc-ae-f64c128"):
        assert any(line.startswith("optional") and part in line for line in lines), part


def test_a_missing_module_is_named_and_the_exit_is_1(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "MODULES", ("torchvision", "no_such_module"))
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("MISSING") and "no_such_module" in line]
    assert lines[-1].startswith("not ready")


def test_metric_weights_are_looked_for_and_compared(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("AVATAR_DISTILL_WEIGHTS", str(tmp_path))
    main(["doctor"])
    before = capsys.readouterr().out
    assert f"{tmp_path / 'i3d_torchscript.pt'} is not there" in before
    (tmp_path / "i3d_torchscript.pt").write_bytes(b"something else")
    main(["doctor"])
    assert "i3d_torchscript.pt is another file" in capsys.readouterr().out
