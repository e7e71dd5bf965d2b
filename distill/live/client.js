// Client of `distill serve`, protocol 1 (docs/serving.md): draws the avatar on a canvas, plays its sound, and tells what was seen.
// Connect in a click's handler, or the browser holds the sound back.
const VERSION = 1, RATE = 16000;

export class Avatar {
  // Resolves when the stream can be opened; rejects with the server's words. on(message) gets every message of the server.
  static connect(canvas, {url = new URL("live", import.meta.url), on = () => {}} = {}) {
    const avatar = new Avatar(), socket = avatar.socket = new WebSocket(String(url).replace(/^http/, "ws"));
    Object.assign(avatar, {canvas, on, frames: new Map(), nodes: [], origin: null, last: -1, shown: -1, epoch: 0});
    socket.binaryType = "arraybuffer";
    return new Promise((resolve, reject) => {
      const refuse = text => { socket.close(); reject(new Error(text)); };
      socket.onclose = () => { avatar.close(); reject(new Error("the connection is closed")); on({type: "closed"}); };
      socket.onmessage = ({data}) => {
        if (typeof data !== "string") return avatar.play(data);
        const message = JSON.parse(data);
        if (message.type === "full") refuse(message.message);
        else if (message.type !== "hello") avatar.take(message);
        else if (message.version !== VERSION) refuse(`the server speaks protocol ${message.version}, this client ${VERSION}; update the older one`);
        else { avatar.start(message); avatar.send({type: "hello", version: VERSION}); resolve(avatar); }
        on(message);
      };
    });
  }
  send(message) { if (this.socket.readyState === 1) this.socket.send(JSON.stringify(message)); }
  sendBytes(kind, bytes) { this.socket.send(new Blob([new Uint8Array([kind]), bytes])); }  // 0 microphone, 1 picture, 2 sound file, 3 speech
  open({portrait = 0, text = "a person talks", seed = 0} = {}) { this.send({type: "open", portrait, text, seed}); }
  say(text) { this.send({type: "say", text}); }  // a turn of the user, which the server's talker answers
  speak(pcm) { for (let i = 0; i < pcm.length; i += RATE) this.sendBytes(3, pcm.slice(i, i + RATE)); }  // Int16Array, 16 kHz: what the avatar says
  spoken() { this.send({type: "spoken"}); }
  interrupt() { this.send({type: "interrupt"}); }
  close() { clearInterval(this.timer); this.closed = true; this.socket.close(); this.context?.close(); this.context = null; }
  start(hello) {
    Object.assign(this, {hello, frame: hello.samples_per_frame / RATE, context: new AudioContext({sampleRate: RATE})});
    Object.assign(this.canvas, {width: hello.width, height: hello.height});
    this.out = this.context.createGain();
    this.out.connect(this.context.destination);
    this.timer = setInterval(() => { if (this.shown >= 0) this.send({type: "played", frame: this.shown + 1, epoch: this.epoch}); }, 50);
    const tick = () => { if (!this.closed) { this.draw(); requestAnimationFrame(tick); } };
    tick();
  }
  take(message) {
    if (message.type === "opened") { this.cut(0); Object.assign(this, {epoch: message.epoch, origin: null, shown: -1}); }
    if (message.type === "rewind") { this.cut(message.frame); this.epoch = message.epoch; }
  }
  cut(frame) {  // nothing from this frame on is heard or seen
    for (const {first, node} of this.nodes) node.stop(first >= frame ? 0 : Math.max(0, this.origin + frame * this.frame));
    this.nodes = this.nodes.filter(({first}) => first < frame);
    for (const number of [...this.frames.keys()]) if (number >= frame) this.frames.delete(number);
    this.last = Math.min(this.last, frame - 1);
  }
  play(data) {  // one chunk: a header of 16 bytes, the frames, the sound
    const view = new DataView(data), count = view.getUint16(2, true), first = view.getUint32(4, true), epoch = view.getUint32(8, true);
    const {width, height} = this.hello, samples = view.getUint32(12, true), pcm = new DataView(data, data.byteLength - 2 * samples);
    if (epoch !== this.epoch) return;
    for (let i = 0, place = 16; i < count; i++) {
      const raw = view.getUint8(1) === 0, length = raw ? 3 * width * height : view.getUint32(place, true);
      const bytes = new Uint8Array(data, place += raw ? 0 : 4, length), rgba = new Uint8ClampedArray(4 * width * height).fill(255);
      if (raw) for (let p = 0; p < width * height; p++) rgba.set(bytes.subarray(3 * p, 3 * p + 3), 4 * p);
      createImageBitmap(raw ? new ImageData(rgba, width) : new Blob([bytes])).then(image => { if (epoch === this.epoch || first + i <= this.last) this.frames.set(first + i, image); });
      place += length;
    }
    const buffer = this.context.createBuffer(1, samples, RATE), node = this.context.createBufferSource(), now = this.context.currentTime;
    buffer.copyToChannel(Float32Array.from({length: samples}, (_, i) => pcm.getInt16(2 * i, true) / 32767), 0);
    if (this.origin === null || this.origin + first * this.frame < now) this.origin = now + 0.03 - first * this.frame;  // late: the clock waits
    Object.assign(node, {buffer}).connect(this.out);
    node.start(this.origin + first * this.frame);
    this.nodes = [...this.nodes.slice(-8), {first, node}];
    this.last = first + count - 1;
  }
  draw() {  // the frame that belongs to what is heard now
    const heard = this.context.currentTime - (this.context.outputLatency || 0) - this.origin;
    const number = this.origin === null ? -1 : Math.min(Math.floor(heard / this.frame + 1e-6), this.last), image = this.frames.get(number);
    if (!image || number === this.shown) return;
    this.canvas.getContext("2d").drawImage(image, 0, 0);
    this.shown = number;
    for (const old of this.frames.keys()) if (old < number) this.frames.delete(old);
  }
}
