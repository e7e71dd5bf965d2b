// Client of `distill serve`, protocol 1 (docs/serving.md): draws the avatar on a canvas, plays its sound, and tells what was seen.
// Connect in a click's handler, or the browser holds the sound back.
const VERSION = 1, RATE = 16000;

export class Avatar {
  static video = false;  // whether VP8 is decoded: frames above 128 x 128 come as that then, else as JPEGs
  static {
    globalThis.VideoDecoder?.isConfigSupported({codec: "vp8", codedWidth: 512, codedHeight: 512}).then(({supported}) => { this.video = supported; });
  }
  // Resolves when the stream can be opened; rejects with the server's words. on(message) gets every message of the server,
  // {type: "shown", frame} for each frame that is drawn, and {type: "closed"} in the end. A context of your own is left open.
  static connect(canvas, {url = new URL("live", import.meta.url), on = () => {}, context} = {}) {
    const avatar = new Avatar(), socket = avatar.socket = new WebSocket(String(url).replace(/^http/, "ws"));
    Object.assign(avatar, {canvas, on, frames: new Map(), awaited: new Map(), nodes: [], origin: null, last: -1, shown: -1, epoch: 0, stalls: 0});
    avatar.context = context ?? new AudioContext({sampleRate: RATE, latencyHint: "interactive"});
    avatar.ownContext = !context;
    avatar.out = avatar.context.createGain();  // its gain is the volume
    avatar.out.connect(avatar.context.destination);
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
        else { avatar.start(message); avatar.send({type: "hello", version: VERSION, video: Avatar.video ? ["vp8"] : []}); resolve(avatar); }
        on(message);
      };
    });
  }
  send(message) { if (this.socket.readyState === 1) this.socket.send(JSON.stringify(message)); }
  sendBytes(kind, bytes) { if (this.socket.readyState === 1) this.socket.send(new Blob([new Uint8Array([kind]), bytes])); }  // 0 microphone, 1 picture, 2 sound file, 3 speech
  open({portrait = 0, text = "a person talks", seed = 0} = {}) { this.send({type: "open", portrait, text, seed}); }
  say(text) { this.send({type: "say", text}); }  // a turn of the user, which the server's talker answers
  speak(pcm) { for (let i = 0; i < pcm.length; i += RATE) this.sendBytes(3, pcm.slice(i, i + RATE)); }  // Int16Array, 16 kHz: what the avatar says
  spoken() { this.send({type: "spoken"}); }
  interrupt() { this.send({type: "interrupt"}); }
  close() {
    if (this.closed) return;
    this.closed = true;
    clearInterval(this.timer);
    this.cut(0);
    this.out.disconnect();
    if (this.decoder?.state === "configured") this.decoder.close();
    this.socket.close();
    if (this.ownContext) this.context.close();
  }
  start(hello) {
    Object.assign(this, {hello, frame: hello.samples_per_frame / RATE});
    if (this.canvas.width !== hello.width || this.canvas.height !== hello.height) Object.assign(this.canvas, {width: hello.width, height: hello.height});
    this.timer = setInterval(() => this.report(), 50);
    const tick = () => { if (!this.closed) { this.draw(); requestAnimationFrame(tick); } };
    tick();
  }
  place() { return this.origin === null ? -1 : Math.min(Math.floor((this.context.currentTime - (this.context.outputLatency || 0) - this.origin) / this.frame + 1e-6), this.last); }
  report() { const seen = this.place() + 1; if (seen > 0) this.send({type: "played", frame: seen, epoch: this.epoch}); }  // also in a tab that is not drawn
  take(message) {
    if (message.type === "opened") { this.cut(0); Object.assign(this, {epoch: message.epoch, origin: null, last: -1, shown: -1}); }
    if (message.type === "rewind") { this.cut(message.frame); this.epoch = message.epoch; }
  }
  cut(frame) {  // nothing from this frame on is heard or seen
    for (const {first, node} of this.nodes) node.stop(first >= frame ? 0 : Math.max(0, this.origin + frame * this.frame));
    this.nodes = this.nodes.filter(({first}) => first < frame);
    for (const held of [this.frames, this.awaited]) for (const number of [...held.keys()]) if (number >= frame) held.delete(number);
    this.last = Math.min(this.last, frame - 1);
    this.shown = Math.min(this.shown, this.last);
  }
  play(data) {  // one chunk: a header of 16 bytes, the frames, the sound
    const view = new DataView(data), count = view.getUint16(2, true), first = view.getUint32(4, true), epoch = view.getUint32(8, true);
    const format = this.format = view.getUint8(1);
    const {width, height} = this.hello, samples = view.getUint32(12, true), pcm = new DataView(data, data.byteLength - 2 * samples);
    if (epoch !== this.epoch) return;  // the server sends none, or VP8's packets would miss one
    for (let i = 0, place = 16; i < count; i++) {
      const raw = format === 0, length = raw ? 3 * width * height : view.getUint32(place, true);
      const bytes = new Uint8Array(data, place += raw ? 0 : 4, length), number = first + i;
      const keep = image => { if (this.awaited.get(number) === bytes) { this.frames.set(number, image); this.awaited.delete(number); } };
      this.awaited.set(number, bytes);
      if (format === 2) this.decode(bytes, keep);
      else createImageBitmap(raw ? this.rgba(bytes) : new Blob([bytes])).then(keep);
      place += length;
    }
    const buffer = this.context.createBuffer(1, samples, RATE), node = this.context.createBufferSource(), now = this.context.currentTime;
    buffer.copyToChannel(Float32Array.from({length: samples}, (_, i) => pcm.getInt16(2 * i, true) / 32767), 0);
    const due = this.origin === null ? -1 : this.origin + first * this.frame;
    if (due < now + 0.003) {  // the first, or late: the clock waits
      this.stalls += this.origin === null ? 0 : 1;
      this.origin = now + (this.origin === null ? 0.03 : 0.01) - first * this.frame;
    }
    Object.assign(node, {buffer}).connect(this.out);
    node.start(this.origin + first * this.frame);
    this.nodes = [...this.nodes.slice(-8), {first, node}];
    this.last = first + count - 1;
  }
  rgba(rgb) {
    const image = new ImageData(this.hello.width, this.hello.height);
    image.data.fill(255);
    for (let p = 0, q = 0; p < rgb.length; p += 3, q += 4) for (let c = 0; c < 3; c++) image.data[q + c] = rgb[p + c];
    return image;
  }
  decode(data, keep) {  // every packet, in order, also of frames that are not shown: the next one builds on it
    this.decoder ??= this.makeDecoder();
    if (this.decoder.state !== "configured") return;
    this.waiting.push(keep);
    this.decoder.decode(new EncodedVideoChunk({type: data[0] & 1 ? "delta" : "key", timestamp: this.decoded++, data}));
  }
  makeDecoder() {
    Object.assign(this, {waiting: [], decoded: 0});
    const output = frame => { const keep = this.waiting.shift(); createImageBitmap(frame).then(keep).finally(() => frame.close()); };
    const error = () => { Avatar.video = false; this.socket.close(); };  // the next connection gets JPEGs
    const decoder = new VideoDecoder({output, error});
    decoder.configure({codec: "vp8", codedWidth: this.hello.width, codedHeight: this.hello.height, optimizeForLatency: true});
    return decoder;
  }
  draw() {  // the frame that belongs to what is heard now
    const number = this.place(), image = this.frames.get(number);
    if (!image || number <= this.shown) return;
    this.canvas.getContext("2d").drawImage(image, 0, 0);
    this.shown = number;
    for (const [old, picture] of this.frames) if (old < number) { picture.close(); this.frames.delete(old); }
    this.on({type: "shown", frame: number});
  }
}
