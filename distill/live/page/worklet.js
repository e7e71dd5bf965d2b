// The microphone at 16 kHz, 40 ms at a time; of a faster context the samples of each 1/16000 s are averaged.
registerProcessor("microphone", class extends AudioWorkletProcessor {
  constructor() {
    super();
    Object.assign(this, {held: new Int16Array(640), count: 0, sum: 0, summed: 0, phase: 0});
  }
  process([input]) {
    for (const x of input[0] ?? []) {
      this.sum += x;
      this.summed++;
      this.phase += 16000 / sampleRate;
      if (this.phase < 1 - 1e-9) continue;
      this.phase -= 1;
      this.held[this.count++] = Math.max(-1, Math.min(1, this.sum / this.summed)) * 32767;
      this.sum = this.summed = 0;
      if (this.count < 640) continue;
      this.port.postMessage(this.held.slice().buffer);
      this.count = 0;
    }
    return true;
  }
});
