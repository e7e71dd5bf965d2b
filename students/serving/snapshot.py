"""A session as one safetensors file: tensors, and everything else as JSON in its header. Nothing is unpickled."""

import json
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from students.kv_cache import CachedChunk
from students.schedule import InFlight
from students.serving.draw import Event, Point, lead
from students.serving.inputs import named
from students.serving.session import Session
from students.student import Finished
from students.weights.checkpoint import Bundle
from teachers.conditions import Conditions
from teachers.errors import UserError
from teachers.files import save_tensors

FORMAT = 4
ROLLING = ("drawn", "rolled")


def save_session(session: Session, path: Path, how: Literal["exact", "light"] = "exact") -> None:
    """Write the session to one safetensors file, whole or not at all; UserError where that cannot be.

    exact holds the context and goes on bit for bit; light holds the visible latents and commits them again, so what left the
    window is partly lost.
    """
    path = Path(path)
    if how not in ("exact", "light"):
        raise UserError(f"save how={how!r}: exact or light")
    if how == "light" and session.spec.history.commit == "same_level":
        raise UserError("save how=light: this student's history has no clean pass to repeat; use exact")
    if session.bundle.shared is not None:
        raise UserError(
            "session not saved: several ranks share it, each with its heads of the context; save it in one process"
        )
    with session.lock:
        _save(session, path, how)


def _save(session: Session, path: Path, how: str) -> None:
    with torch.inference_mode():
        session.settle()
    point, tensors = session.point, {}
    if session.reference is not None:
        tensors["reference"] = session.reference
    if session.portrait is not None:
        tensors["portrait"] = session.portrait
    inputs, streams = session.inputs.state()
    tensors |= {f"inputs.{name}": value for name, value in streams.items()}
    for i, past in enumerate(point.seen):
        tensors[f"seen.{i}.x0"] = past.x0
        for name, value in past.conditions.timed.items():
            if name not in session.inputs.given.features:  # these, like text and reference, are the session's own
                tensors[f"seen.{i}.{name}"] = value
    tensors |= {f"flight.{i}": chunk.x for i, chunk in enumerate(point.state.flight)}
    tensors |= {f"encoder.{i}": value for i, value in enumerate(point.encoder or ())}
    if point.last is not None:
        tensors["last"] = point.last
    read = point.state.read
    tensors |= {f"anchors.{name}": x for name in ROLLING if (x := getattr(read, name)) is not None}
    if how == "exact":
        tensors |= {f"decoder.{i}": value for i, value in enumerate(point.decoder or ())}
        for i, entry in enumerate(point.state.cached):
            for name in ("keys", "values"):
                tensors |= {f"kept.{i}.{name}.{j}": value for j, value in enumerate(getattr(entry, name))}
    facts = {
        "format": FORMAT,
        "how": how,
        "student": session.bundle.fingerprint,
        "seed": session.seed,
        "chunk": point.chunk,
        "frame": point.frame,
        "began": point.began,
        "text": point.text,
        "seen": [past.chunk for past in point.seen],
        "kept": [entry.chunk for entry in point.state.cached] if how == "exact" else [],
        "parts": [entry.part for entry in point.state.cached],
        "passes": len(point.state.cached[0].keys) if point.state.cached else 0,
        "flight": [chunk.done for chunk in point.state.flight],
        "pending": how == "exact" and point.state.pending is not None,
        "decoder": None if point.decoder is None else len(point.decoder),
        "encoder": None if point.encoder is None else len(point.encoder),
        "events": [
            (e.at, e.soon, None if e.features is None else e.text, e.how, dict(e.guidance))
            for e in session.events
            if e.at >= point.chunk
        ],
        "inputs": inputs,
        "viewed": session.viewed,
        "lead": session.lead,
        "idle": session.idle,
        "drop": list(session.drop),
        "guidance": session.guidance,
        "scales": [None if (x := past.conditions.guidance) is None else x.tolist() for past in point.seen],
    }
    try:
        save_tensors(path, tensors, {"session": json.dumps(facts)})
    except (OSError, SafetensorError) as error:
        raise UserError(f"session not saved: {path} ({error}); choose a writable place with room") from error


def load_session(bundle: Bundle, path: Path) -> Session:
    """The session that `save_session` wrote to `path`, going on with `bundle`; UserError if the file is damaged or another
    student's."""
    path = Path(path)
    facts, tensors = _read(path)
    try:
        return _loaded(bundle, path, facts, tensors)
    except UserError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"damaged session: {path} ({type(error).__name__} {error}); save it again") from error


def _loaded(bundle: Bundle, path: Path, facts: dict, tensors: dict[str, Tensor]) -> Session:
    if facts.get("student") != bundle.fingerprint:
        raise UserError(f"another student's session: {path}; load it with the student that it was saved from")
    spec, device = bundle.spec, next(bundle.student.parameters()).device
    session = Session(
        bundle,
        torch.zeros(3, spec.height, spec.width) if spec.takes_image else None,
        facts["text"],
        facts["seed"],
        lead=facts["lead"],
        idle=facts["idle"],
        drop=tuple(facts["drop"]),
        guidance=facts["guidance"],
        film="film" in facts["inputs"],
    )
    session.reference = tensors["reference"].to(device) if "reference" in tensors else None
    session.portrait = tensors["portrait"].to(device) if "portrait" in tensors else None
    session.viewed = facts["viewed"]
    session.inputs.restore(facts["inputs"], named(tensors, "inputs."))
    with torch.inference_mode():
        session.events = tuple(
            Event(at, soon, text or "", None if text is None else session._read(text), how, guidance)
            for at, soon, text, how, guidance in facts["events"]
        )
        session.point = _point(session, facts, {name: value.to(device) for name, value in tensors.items()})
    session.points = deque([session.point], maxlen=session.points.maxlen)
    return session


def _point(session: Session, facts: dict, tensors: dict[str, Tensor]) -> Point:
    start, student = session.point, session.bundle.student
    seen = []
    for i, chunk in enumerate(facts["seen"]):
        timed = named(tensors, f"seen.{i}.")
        x0 = timed.pop("x0")
        given = session.inputs.features(chunk, x0.shape[2]) | timed
        scales = None if facts["scales"][i] is None else torch.tensor(facts["scales"][i])
        own = {"text": start.features, "reference": session.reference, "guidance": scales}
        seen.append(Finished(chunk, x0, Conditions(given, **own).to(session.device).drop(*session.drop)))
    if facts["how"] == "exact":
        cached = []
        for i, chunk in enumerate(facts["kept"]):
            keys, values = (_listed(tensors, f"kept.{i}.{name}", facts["passes"]) for name in ("keys", "values"))
            cached.append(CachedChunk(chunk, keys, values, facts["parts"][i] if "parts" in facts else 0))
        state = student.restore(start.state, cached, seen, facts["chunk"])
        decoder = None if facts["decoder"] is None else _listed(tensors, "decoder", facts["decoder"])
    else:
        state = student.recommit(start.features, seen, facts["chunk"], cache="inplace")
        decoder = _warm(session, seen, facts["chunk"])
    flight = tuple(InFlight(tensors[f"flight.{i}"], done) for i, done in enumerate(facts["flight"]))
    pending = seen[-1] if facts["pending"] else state.pending
    rolling = replace(state.read, **{name: tensors.get(f"anchors.{name}") for name in ROLLING})
    state = replace(state, flight=flight, pending=pending, read=rolling)
    return Point(
        facts["chunk"],
        facts["frame"],
        state,
        facts["text"],
        start.features,
        decoder,
        tuple(seen),
        tensors["last"].cpu() if "last" in tensors else None,
        facts["began"],
        None if facts.get("encoder") is None else _listed(tensors, "encoder", facts["encoder"]),
        start.guidance,
    )


def _listed(tensors: dict[str, Tensor], name: str, count: int) -> tuple[Tensor, ...]:
    return tuple(tensors[f"{name}.{i}"] for i in range(count))


def _warm(session: Session, seen: list[Finished], chunk: int):
    """A decoder that has seen the newest latents without a gap before chunk number `chunk`."""
    recent = [past for past in seen if all(any(p.chunk == k for p in seen) for k in range(past.chunk, chunk))]
    decoder = None
    for past in recent:
        _, decoder = session.bundle.codec.decode_chunk(
            past.x0 if past.chunk else lead(past.x0, [session.portrait]), decoder
        )
    return () if decoder is None and chunk else decoder


def _read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {}).get("session", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except FileNotFoundError as error:
        raise UserError(f"no session: {path}; give the file that save wrote") from error
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise UserError(f"damaged session: {path} ({error}); save it again") from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise UserError(f"not a session of format {FORMAT}: {path}; give the file that save wrote")
    return facts, tensors
