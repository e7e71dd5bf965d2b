// The user's voice: hands-free, sample after sample, or recorded and sent as a whole.
const WANTED = {audio: {echoCancellation: true, noiseSuppression: true}};
const LONGEST = 60000;  // ms of a recording

export class HandsFree {
  // send(pcm) gets 40 ms of Int16 samples at 16 kHz at a time; rejects where there is no microphone
  static async open(send) {
    const line = new HandsFree();
    line.stream = await navigator.mediaDevices.getUserMedia(WANTED);
    try {
      line.context = new AudioContext({sampleRate: 16000});
      line.source = line.context.createMediaStreamSource(line.stream);
    } catch {  // some browsers do not resample; the worklet does then
      line.context?.close();
      line.context = new AudioContext();
      line.source = line.context.createMediaStreamSource(line.stream);
    }
    await line.context.audioWorklet.addModule(new URL("worklet.js", import.meta.url));
    const node = new AudioWorkletNode(line.context, "microphone", {numberOfOutputs: 0});
    node.port.onmessage = event => send(event.data);
    line.source.connect(node);
    return line;
  }
  close() {
    for (const track of this.stream.getTracks()) track.stop();
    this.context.close();
  }
}

export class Recording {
  static async open() {
    const made = new Recording();
    made.stream = await navigator.mediaDevices.getUserMedia(WANTED);
    made.recorder = new MediaRecorder(made.stream);
    made.parts = [];
    made.began = performance.now();
    made.recorder.ondataavailable = event => made.parts.push(event.data);
    made.recorder.start();
    made.timer = setTimeout(() => made.recorder.stop(), LONGEST);
    return made;
  }
  finish() {  // fulfilled with {bytes, seconds}
    clearTimeout(this.timer);
    return new Promise(resolve => {
      const end = () => {
        for (const track of this.stream.getTracks()) track.stop();
        resolve({bytes: new Blob(this.parts, {type: this.recorder.mimeType}), seconds: (performance.now() - this.began) / 1000});
      };
      if (this.recorder.state === "inactive") return end();
      this.recorder.onstop = end;
      this.recorder.stop();
    });
  }
}
