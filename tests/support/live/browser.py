"""A headless Chromium: where it is, what its microphone gets, and a tape of what comes out of an avatar on a page."""

import base64
import json
import os
import shutil
import time
import wave

import numpy as np
import torch
from playwright.sync_api import Page, sync_playwright

from distill.live.voice import formant_voice
from tests.support.live.serving import MOUTH

HOW = "no browser: apt-get install chromium, or playwright install --with-deps chromium, or CHROMIUM=PATH of one"
REQUIRED = bool(os.environ.get("REQUIRE_BROWSER"))
"""Set by .ci/run where it has installed a browser: then a missing one is a failure."""
FLAGS = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
RATE = 16000
RECORD = """async ([who, mouth]) => {
  const avatar = who.split(".").reduce((found, name) => found[name], window), {context, canvas} = avatar;
  const code = `registerProcessor("tape", class extends AudioWorkletProcessor {
    process([input]) { if (input[0]) this.port.postMessage([currentTime, input[0].slice()]); return true; } });`;
  await context.audioWorklet.addModule(URL.createObjectURL(new Blob([code], {type: "text/javascript"})));
  const tape = new AudioWorkletNode(context, "tape", {numberOfOutputs: 0});
  window.sounds = []; window.drawn = [];
  tape.port.onmessage = event => sounds.push(event.data);
  avatar.out.connect(tape);
  const look = () => {
    const shown = avatar.shown, all = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
    const at = (x, y) => all[4 * (y * canvas.width + x)];
    if (!drawn.length || drawn[drawn.length - 1][1] !== shown)
      drawn.push([context.currentTime - (context.outputLatency || 0), shown, at(8, mouth), at(14, 5), at(0, 0)]);
    requestAnimationFrame(look);
  };
  look();
}"""
TAPES = """() => {
  const all = new Float32Array(sounds.reduce((length, [, block]) => length + block.length, 0));
  let at = 0, text = "";
  for (const [, block] of sounds) { all.set(block, at); at += block.length; }
  const bytes = new Uint8Array(all.buffer);
  for (let i = 0; i < bytes.length; i += 32768) text += String.fromCharCode(...bytes.subarray(i, i + 32768));
  return [btoa(text), sounds[0][0], JSON.stringify(drawn)];
}"""  # as text: of a list playwright makes an object a number


def find_chromium() -> str | None:
    """CHROMIUM, one on PATH, or one that playwright has installed; nothing is downloaded. None where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    if path := os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None):
        return path
    with sync_playwright() as driver:
        path = driver.chromium.executable_path
    return path if os.path.isfile(path) else None


def microphone_gets(file) -> None:
    """A sentence between two silences; the fake device repeats it."""
    speech = torch.cat([torch.zeros(RATE), *formant_voice("hello mama papa"), torch.zeros(2 * RATE)])
    with wave.open(str(file), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(RATE)
        out.writeframes((speech * 32767).short().numpy().tobytes())


def until(page: Page, condition: str, seconds: float = 30.0) -> None:
    """Wait for a JavaScript condition (wait_for_function would need eval, which the page forbids)."""
    end = time.monotonic() + seconds
    while not page.evaluate(f"Boolean({condition})"):
        notice = "document.getElementById('notice')?.textContent"
        assert time.monotonic() < end, f"not after {seconds} s: {condition}; the page says {page.evaluate(notice)!r}"
        page.wait_for_timeout(20)


def record(page: Page, who: str) -> None:
    """Begin the tape of the avatar that JavaScript's name `who` stands for, on a page that may make a worklet of text."""
    page.evaluate(RECORD, [who, MOUTH.start + 1])


def tapes(page: Page) -> tuple[np.ndarray, float, np.ndarray]:
    """The sound that came out, the context's time of its first sample, and rows (time played, frame, mouth, wall, noise)."""
    sound, began, drawn = page.evaluate(TAPES)
    return np.frombuffer(base64.b64decode(sound), np.float32).astype(np.float64), began, np.array(json.loads(drawn))
