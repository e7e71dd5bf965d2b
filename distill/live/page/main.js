// The page of `distill serve`: puts conversation, picture, microphone and transcript behind the controls of index.html.
import {Conversation, STATES} from "./conversation.js";
import {Cropper} from "./cropper.js";
import {HandsFree, Recording} from "./microphone.js";
import {Transcript} from "./transcript.js";

const $ = id => document.getElementById(id);
const SENTENCES = {
  echo: ["Hello, nice to meet you.", "Good morning, how may I help you today?", "The train to the lake leaves at ten past nine."],
  conversation: ["Hello, who are you?", "What can you help me with?", "Tell me something about the sea."],
};
const HINTS = {
  ready: "Choose a face, then press Start or a sentence.", closed: "The conversation has ended.", full: "No place is free at the moment.",
};
const FORMATS = ["RGB", "JPEG", "VP8"];
const chosen = {portrait: 0, picture: null, scales: {}};
const transcript = new Transcript($("transcript"));
const conversation = new Conversation($("canvas"), {
  stream: () => ({...chosen, text: $("condition").value}),
  changed: show, received: receive, turned: turn => transcript.begin(turn),
});
const cropper = new Cropper(bytes => conversation.checkPicture(bytes));
const page = window.page = {conversation, chosen, hello: null, handsFree: null, recording: null};

// ---- what is shown

function tell(text, kind = "warning") {  // kind: warning, hint, or line, which the next connection removes
  $("notice").textContent = text;
  $("notice").className = kind;
  clearTimeout(tell.timer);
  if (kind === "warning") tell.timer = setTimeout(() => tell("", ""), 12000);
}

function show(state, detail = "") {
  const {live} = conversation, waiting = state === "connecting";
  $("state").dataset.state = state;
  $("stateText").textContent = STATES[state];
  $("canvas").setAttribute("aria-label", `The avatar, an AI-generated video: ${STATES[state].toLowerCase()}`);
  if (detail || HINTS[state]) tell(detail || HINTS[state], detail ? "line" : "hint");
  else if (live && $("notice").className !== "warning") tell("", "");
  $("start").hidden = live || waiting;
  $("start").textContent = {closed: "Start again", full: "Try again"}[state] ?? "Start talking";
  $("stop").disabled = state !== "thinking" && state !== "talking";
  $("end").disabled = !live && !waiting;
  if (!live && page.handsFree) handsFree(false);
}

function receive(message) {
  switch (message.type) {
    case "error": case "note": tell(message.message); break;
    case "opened":  // with the student's own scales, while the sliders stay where they are
      transcript.restart();
      if (Object.keys(chosen.scales).length) guide();
      break;
    case "words": transcript.words(message); break;
    case "stats": statistics(message); break;
  }
}

function statistics(s) {
  const ms = x => x === undefined ? "" : `${Math.round(x)} ms`, {avatar, latency} = conversation;
  const rows = [["first frame", ms(s.ttff_ms)], ["chunk, p50 / p95", `${ms(s.p50_ms)} / ${ms(s.p95_ms)}`], ["real-time factor", s.rtf?.toFixed(3)],
    ["lead", ms(s.lead_ms)], ["stalls", avatar?.stalls], ["answer seen after", ms(latency)], ["viewers", s.viewers], ["voice", page.hello.talker],
    ["video", `${page.hello.width} x ${page.hello.height}, ${page.hello.fps} frames/s, ${FORMATS[avatar?.format] ?? ""}`]];
  $("panel").replaceChildren(...rows.map(([name, value]) => {
    const row = document.createElement("tr"), head = document.createElement("th"), cell = document.createElement("td");
    head.scope = "row";
    head.textContent = name;
    cell.textContent = value ?? "";
    row.append(head, cell);
    return row;
  }));
}

// ---- who

function addTile(source, label, choose) {
  const tile = document.createElement("label"), button = document.createElement("input"), image = document.createElement("img");
  Object.assign(button, {type: "radio", name: "portrait", onchange: () => choose(image)});
  Object.assign(image, {src: source, alt: label});
  tile.className = "tile";
  tile.append(button, image);
  $("tiles").append(tile);
  return {button, image};
}

function choose(portrait, picture, image) {
  Object.assign(chosen, {portrait, picture});
  if (!conversation.live) preview(image);
  conversation.reopen();
}

function preview(image) {
  const {width, height} = page.hello;
  if ($("canvas").width !== width || $("canvas").height !== height) Object.assign($("canvas"), {width, height});
  $("canvas").getContext("2d").drawImage(image, 0, 0, width, height);
}

async function usePicture(file) {
  if (!file) return;
  const used = await cropper.choose(file, page.hello);
  if (!used) return;
  page.ownTile?.button.parentElement.remove();
  page.ownTile = addTile(used.image, "Your picture", image => choose(null, used.bytes, image));
  page.ownTile.button.checked = true;
  choose(null, used.bytes, page.ownTile.image);
}

// ---- what is said

const tooLarge = bytes => {
  const large = bytes.size + 1 > page.hello.limits.bytes;
  if (large) tell("This file is too large.");
  return large;
};
const say = text => { if (text) conversation.say(text); };
function sendSound(bytes, words) {
  if (tooLarge(bytes)) return;
  tell("The sound is being read ...", "hint");
  conversation.sendSound(bytes, words);
}
const sendFile = file => { if (file) sendSound(file, "(sound file)"); };

async function handsFree(on) {
  $("microphone").setAttribute("aria-pressed", on);
  if (!on) {
    page.handsFree?.close();
    page.handsFree = null;
    conversation.avatar?.send({type: "microphone", on: false});
    return;
  }
  try {
    if (!await conversation.start()) throw new Error("there is no connection");
    conversation.avatar.send({type: "microphone", on: true});
    page.handsFree = await HandsFree.open(pcm => conversation.avatar?.sendBytes(0, pcm));
  } catch (error) {
    tell(`No microphone: ${error.message}`);
    $("microphone").setAttribute("aria-pressed", false);
  }
}

async function record() {
  const {recording} = page;
  if (recording) {
    page.recording = null;
    $("record").setAttribute("aria-pressed", false);
    $("record").textContent = "Record";
    const {bytes, seconds} = await recording.finish();
    sendSound(bytes, `(spoken, ${seconds.toFixed(0)} s)`);
    return;
  }
  try {
    conversation.start();
    page.recording = await Recording.open();
    $("record").setAttribute("aria-pressed", true);
    $("record").textContent = "Send recording";
  } catch (error) { tell(`No microphone: ${error.message}`); }
}

// ---- controls

$("start").onclick = () => { conversation.start(); $("say").focus({preventScroll: true}); };
$("stop").onclick = () => conversation.stop();
$("end").onclick = () => { conversation.end(); $("start").focus(); };
$("sayForm").onsubmit = event => { event.preventDefault(); say($("say").value.trim()); $("say").value = ""; };
$("conditionForm").onsubmit = event => { event.preventDefault(); conversation.setText($("condition").value); };
$("microphone").onclick = () => handsFree(!page.handsFree);
$("record").onclick = record;
$("file").onchange = ({target}) => { sendFile(target.files[0]); target.value = ""; };
$("picture").onchange = ({target}) => { usePicture(target.files[0]); target.value = ""; };
addEventListener("keydown", event => { if (event.key === "Escape" && !$("cropper").open && !document.fullscreenElement) conversation.stop(); });

function setVolume() {
  const muted = $("mute").getAttribute("aria-pressed") === "true";
  conversation.setVolume(muted ? 0 : $("volume").value / 100);
}
$("volume").oninput = setVolume;
$("mute").onclick = () => { $("mute").setAttribute("aria-pressed", $("mute").getAttribute("aria-pressed") !== "true"); setVolume(); };

$("fullscreen").hidden = !document.fullscreenEnabled;
$("fullscreen").onclick = () => document.fullscreenElement ? document.exitFullscreen() : $("scene").requestFullscreen();
document.onfullscreenchange = () => $("fullscreen").setAttribute("aria-pressed", Boolean(document.fullscreenElement));

addEventListener("dragover", event => { event.preventDefault(); document.body.classList.add("over"); });
addEventListener("dragleave", () => document.body.classList.remove("over"));
addEventListener("drop", event => {
  event.preventDefault();
  document.body.classList.remove("over");
  const file = event.dataTransfer.files[0];
  if (file?.type.startsWith("image/")) usePicture(file);
  else sendFile(file);
});

// ---- how closely it follows its words and its sound

let guided = 0, guiding;
function guide() {  // once a key is let go: each message has chunks drawn anew, and the server takes one every two seconds
  clearTimeout(guiding);
  const wait = Math.max(400, guided + 2100 - performance.now());
  guiding = setTimeout(() => { guided = performance.now(); conversation.guide(chosen.scales); }, wait);
}
const SCALES = {text: "How closely it follows these words", audio: "How closely the mouth follows the sound", both: "How closely it follows words and sound"};
function addScale(name, {least, most, served}) {
  const row = document.createElement("div"), label = document.createElement("label"), range = document.createElement("input"), value = document.createElement("output");
  Object.assign(range, {type: "range", id: `guidance-${name}`, min: least, max: most, step: (most - least) / 100, value: served});
  Object.assign(label, {htmlFor: range.id, textContent: SCALES[name]});
  value.textContent = served.toFixed(2);
  range.oninput = () => { value.textContent = Number(range.value).toFixed(2); };
  range.onchange = () => { chosen.scales[name] = Number(range.value); guide(); };
  row.append(label, range, value);
  $("guidance").append(row);
}

// ---- the beginning

async function begin() {
  const hello = page.hello = await (await fetch("hello")).json(), {mode, takes_speech, talker, portraits} = hello;
  for (let i = 0; i < portraits; i++) {
    const tile = addTile(`portraits/${i}.png`, `Portrait ${i + 1}`, image => choose(i, null, image));
    if (i === 0) { tile.button.checked = true; tile.image.onload = () => { if (conversation.state === "ready") preview(tile.image); }; }
  }
  $("mode").textContent = mode === "echo"
    ? `Echo mode: the avatar repeats what you type or say. Voice: ${talker}.`
    : `Conversation: ${hello.model} answers${takes_speech ? "" : " what you type"}. Voice: ${talker}.`;
  $("sayLabel").textContent = mode === "echo" ? "What the avatar is to say" : "What you say to the avatar";
  $("say").placeholder = mode === "echo" ? "Type what the avatar is to say" : "Ask something";
  for (const sentence of SENTENCES[mode]) {
    const button = document.createElement("button");
    Object.assign(button, {type: "button", textContent: sentence, onclick: () => say(sentence)});
    $("sentences").append(button);
  }
  for (const [name, range] of Object.entries(hello.guidance)) addScale(name, range);
  $("voiceRow").hidden = !takes_speech;
  if (!navigator.mediaDevices) for (const id of ["microphone", "record"]) {  // only secure origins have one
    $(id).disabled = true;
    $(id).title = "Browsers give a microphone to https and to localhost alone";
  }
  tell(HINTS.ready, "hint");
}
begin().catch(() => tell("The server does not answer; reload the page."));
