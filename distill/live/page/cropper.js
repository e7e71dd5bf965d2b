// The dialog of an uploaded picture: which part of it, what the avatar gets of it, and the warning where it cannot draw it.
const $ = id => document.getElementById(id);
const LONGEST = 2048;  // pixels of a side that is sent
const EVERY = 2100;  // ms between two pictures: the server takes one every 2 s

export class Cropper {
  // check(bytes) gives the server's {type: "portrait", image, note} or {type: "error", message}; `limit` in bytes
  constructor(check) {
    this.check = check;
    const frame = $("cropFrame");
    frame.addEventListener("pointerdown", event => { this.held = [event.clientX, event.clientY]; frame.setPointerCapture(event.pointerId); });
    frame.addEventListener("pointermove", event => {
      if (!this.held) return;
      const scale = this.window().width / frame.clientWidth;
      this.move((this.held[0] - event.clientX) * scale, (this.held[1] - event.clientY) * scale);
      this.held = [event.clientX, event.clientY];
    });
    for (const name of ["pointerup", "pointercancel"]) frame.addEventListener(name, () => { this.held = null; });
    frame.addEventListener("keydown", event => this.key(event));
    $("zoom").oninput = () => this.move(0, 0);
    $("cropAuto").onclick = () => this.whole();
    $("cropper").addEventListener("close", () => { clearTimeout(this.timer); this.done?.($("cropper").returnValue === "use" ? this.sent : null); });
  }
  // Fulfilled with {bytes, image}, or null where it is not used. `bytes` of a file the browser cannot read go as they are.
  async choose(file, {width, height, limits}) {
    Object.assign(this, {file, shape: width / height, limit: limits.bytes, image: null, sent: null, last: 0});
    this.image = await createImageBitmap(file).catch(() => null);
    for (const id of ["cropFrame", "zoom", "cropAuto"]) $(id).hidden = !this.image;
    $("cropCanvas").width = 320;
    $("cropCanvas").height = Math.round(320 / this.shape);
    $("cropSeen").hidden = true;
    $("cropper").returnValue = "cancel";
    $("cropper").showModal();
    this.whole();
    return new Promise(resolve => { this.done = resolve; });
  }
  whole() {  // the server places the part around the face
    this.auto = true;
    $("zoom").value = 100;
    Object.assign(this, {x: (this.image?.width ?? 0) / 2, y: (this.image?.height ?? 0) / 2});
    this.draw();
    this.later();
  }
  window() {  // the part of the picture that is chosen, in its pixels
    const {width: w, height: h} = this.image, zoom = $("zoom").value / 100;
    const width = Math.min(w, h * this.shape) / zoom, height = width / this.shape;
    this.x = Math.min(Math.max(this.x, width / 2), w - width / 2);
    this.y = Math.min(Math.max(this.y, height / 2), h - height / 2);
    return {x: this.x - width / 2, y: this.y - height / 2, width, height};
  }
  move(dx, dy) {
    if (!this.image) return;
    this.auto = false;
    this.x += dx;
    this.y += dy;
    this.draw();
    this.later();
  }
  key(event) {
    const step = this.image ? this.window().width / 20 : 0;
    const moves = {ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step]};
    const zooms = {"+": 10, "=": 10, "-": -10};
    if (zooms[event.key]) $("zoom").value = Number($("zoom").value) + zooms[event.key];
    if (!moves[event.key] && !zooms[event.key]) return;
    event.preventDefault();
    this.move(...(moves[event.key] ?? [0, 0]));
  }
  draw() {
    if (!this.image) return;
    const canvas = $("cropCanvas"), pen = canvas.getContext("2d"), {width: w, height: h} = this.image;
    pen.clearRect(0, 0, canvas.width, canvas.height);
    if (this.auto) {
      const scale = Math.min(canvas.width / w, canvas.height / h);
      pen.drawImage(this.image, (canvas.width - w * scale) / 2, (canvas.height - h * scale) / 2, w * scale, h * scale);
    } else {
      const part = this.window();
      pen.drawImage(this.image, part.x, part.y, part.width, part.height, 0, 0, canvas.width, canvas.height);
    }
  }
  later() {
    clearTimeout(this.timer);
    $("cropUse").disabled = true;
    this.say("Looking at it ...");
    this.timer = setTimeout(() => this.look(), Math.max(this.last ? 600 : 0, this.last + EVERY - performance.now()));
  }
  async look() {
    this.last = performance.now();
    const bytes = await this.bytes(), turn = this.last;
    if (bytes.size >= this.limit) return this.say("This file is too large.", true);
    const answer = await this.check(bytes);
    if (turn !== this.last || !$("cropper").open) return;  // a later one was sent
    if (answer.type === "error") return this.say(answer.message, true);
    this.sent = {bytes, image: answer.image};
    $("cropSeen").src = answer.image;
    $("cropSeen").hidden = false;
    $("cropUse").disabled = false;
    this.say(answer.note || "This picture is fine.", Boolean(answer.note));
  }
  async bytes() {  // the file as it is, or the chosen part; smaller where it is large
    if (!this.image || (this.auto && this.file.size < this.limit)) return this.file;
    const part = this.auto ? {x: 0, y: 0, width: this.image.width, height: this.image.height} : this.window();
    const scale = Math.min(1, LONGEST / Math.max(part.width, part.height)), canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.round(part.width * scale));
    canvas.height = Math.max(1, Math.round(this.auto ? part.height * scale : canvas.width / this.shape));
    canvas.getContext("2d").drawImage(this.image, part.x, part.y, part.width, part.height, 0, 0, canvas.width, canvas.height);
    return new Promise(resolve => canvas.toBlob(resolve, "image/jpeg", 0.95));
  }
  say(text, warning = false) {
    $("cropNote").textContent = text;
    $("cropNote").className = warning ? "warning" : "";
  }
}
