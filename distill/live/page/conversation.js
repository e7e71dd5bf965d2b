// A conversation that outlives its connection: connects, connects again, opens the stream, and says in which state it is.
import {Avatar} from "../client.js";

export const STATES = {
  ready: "Ready", connecting: "Connecting", listening: "Listening", thinking: "Thinking", talking: "Talking", closed: "Closed", full: "Full",
};
const TRIES = 6, LONGEST = 16, STEADY = 10000;  // connections in a row; seconds between two; ms after which one counts as good

export class Conversation {
  // `stream()` gives what a stream is opened with, {portrait, text}, and `picture`, bytes to send before it, or null.
  // changed(state, detail), received(message) for every message of the server, turned({number, asked}) as a turn begins.
  constructor(canvas, {stream, changed, received, turned}) {
    Object.assign(this, {canvas, stream, changed, received, turned});
    Object.assign(this, {state: "ready", avatar: null, context: null, volume: 1, asked: [], turns: new Map(), answers: [], tries: 0, waiting: [], had: -Infinity});
  }
  get live() { return ["listening", "thinking", "talking"].includes(this.state); }
  show(state, detail = "") {
    if (state === this.state && !detail) return;
    this.state = state;
    this.changed(state, detail);
  }
  // ---- the connection
  start() {  // in a handler of a click or a key, or there is no sound; fulfilled with whether the stream is open
    if (this.live) return Promise.resolve(true);
    this.context ??= new AudioContext({sampleRate: 16000, latencyHint: "interactive"});
    this.context.resume();
    const opened = new Promise(resolve => this.waiting.push(resolve));
    if (this.state !== "connecting") { this.tries = 0; this.connect(); }
    return opened;
  }
  async connect() {
    clearTimeout(this.timer);
    this.timer = null;
    this.ending = this.why = "";
    this.show("connecting");
    const line = this.line = {};  // what comes late from an older one is not for this one
    const on = message => { if (line === this.line) this.take(message); };
    try {
      this.avatar = await Avatar.connect(this.canvas, {on, context: this.context});
    } catch { return; }  // `take` has been given "full" or "closed"
    this.since = performance.now();
    this.avatar.out.gain.value = this.volume;
    this.open();
  }
  async open() {
    const {picture, ...stream} = this.stream();
    if (picture) await this.sendPicture(picture);
    this.avatar?.open({...stream, seed: Math.floor(Math.random() * 1e9)});
  }
  sendPicture(bytes) {  // fulfilled with the message `portrait`, `error`, or {type: "lost"}
    this.avatar.sendBytes(1, bytes);
    return new Promise(resolve => { this.pictureRead = resolve; });
  }
  settle(open) { for (const resolve of this.waiting.splice(0)) resolve(open); }
  reopen() { if (this.live) this.open(); }
  end() {  // by the user
    this.ending = "user";
    this.line = null;
    clearTimeout(this.timer);
    this.avatar?.close();
    this.lost();
  }
  lost() {
    if (this.avatar) this.had = performance.now();
    if (this.avatar && performance.now() - this.since > STEADY) this.tries = 0;
    Object.assign(this, {avatar: null, asked: [], thinking: null, from: undefined});
    this.turns.clear();
    this.pictureRead?.({type: "lost"});
    if (this.ending === "full" && performance.now() - this.had < STEADY) this.ending = "";  // the server has not missed that one yet
    if (this.ending || this.tries >= TRIES) this.settle(false);
    if (this.ending === "full") return this.show("full", this.why);
    if (this.ending || this.tries >= TRIES) {
      return this.show("closed", this.ending === "user" ? "" : `no connection after ${TRIES} tries${this.why ? `: ${this.why}` : ""}`);
    }
    const seconds = Math.min(LONGEST, 2 ** this.tries++) / 2;
    this.show("connecting", `The connection was lost; trying again in ${seconds} s (${this.tries} of ${TRIES})`);
    this.timer = setTimeout(() => this.connect(), 1000 * seconds);
  }
  // ---- what the user does
  async say(text) {
    if (!await this.start()) return;
    this.ask(text);
    this.avatar.say(text);
  }
  async sendSound(bytes, words) {
    if (!await this.start()) return;
    this.ask(words);
    this.avatar.sendBytes(2, bytes);
  }
  async checkPicture(bytes) {
    for (let tries = 0; tries < TRIES && await this.start(); tries++) {
      const answer = await this.sendPicture(bytes);
      if (answer.type !== "lost") return answer;
    }
    return {type: "error", message: this.why || "there is no connection"};
  }
  ask(text) { this.asked.push({text, at: performance.now()}); }
  stop() { if (this.live) { this.thinking = null; this.avatar.interrupt(); } }
  guide(scales) { if (this.live) this.avatar.send({type: "guidance", scales}); }
  setText(text) { if (this.live) this.avatar.send({type: "text", text}); }
  setVolume(volume) { this.volume = volume; if (this.avatar) this.avatar.out.gain.value = volume; }
  // ---- what the server says
  take(message) {
    switch (message.type) {
      case "full": this.ending = "full"; this.why = message.message; break;
      case "error": this.why = message.message; this.asked = []; this.pictureRead?.(message); break;
      case "portrait": this.pictureRead?.(message); break;
      case "opened":
        Object.assign(this, {thinking: null, from: undefined, until: 0, asked: []});
        this.turns.clear();
        this.show("listening");
        this.settle(true);
        break;
      case "rewind": if (!message.speech) this.until = Math.min(this.until, message.frame); break;
      case "thinking": {
        const {text, at} = this.asked.shift() ?? {text: null, at: performance.now()};
        this.thinking = message.turn;
        this.turns.set(message.turn, {asked: at});
        this.turned({number: message.turn, asked: text});
        this.show("thinking");
        break;
      }
      case "turn":
        Object.assign(this.turns.get(message.turn) ?? {}, {frame: message.frame});
        Object.assign(this, {thinking: null, from: message.frame, until: Infinity});
        break;
      case "answer": this.answers.push(message); break;
      case "done": this.until = message.frame; if (this.thinking === message.turn) this.thinking = null; break;
      case "stats": this.stats = message; break;
      case "shown": this.follow(message.frame); return;
      case "closed": this.lost(); break;
    }
    this.received(message);
  }
  follow(frame) {  // the state belongs to what is seen
    for (const [number, turn] of this.turns) {
      if (turn.frame === undefined || turn.ms || frame < turn.frame) continue;
      turn.ms = this.latency = performance.now() - turn.asked;
      this.avatar.send({type: "seen", turn: number, ms: turn.ms});
    }
    if (frame >= this.from && frame < this.until) this.show("talking");
    else this.show(this.thinking ? "thinking" : "listening");
  }
}
