// The WebSocket: asks for pictures, keeps what is unanswered over a lost connection, and never shows an older picture
// after a newer one.

const RETRY_MS = [300, 800, 1500, 3000, 5000];

export class Live extends EventTarget {
  constructor(token) {
    super();
    this.token = token;
    this.wanted = new Map(); // panel -> the newest frame without an answer
    this.shown = new Map(); // panel -> id of the newest answer
    this.contexts = new Map(); // id -> what the asker gave along
    this.nextId = 1;
    this.attempts = 0;
    this.state = "connecting";
    this._connect();
    setInterval(() => this._send({ type: "ping" }), 20_000);
  }

  // Ask for a picture of `panel`; the answer is an event "picture" with the same `context`.
  ask(panel, order, context) {
    const frame = { type: "draw", panel, id: this.nextId++, ...order };
    this.wanted.set(panel, { frame, context });
    this.contexts.set(frame.id, context);
    this._send(frame);
  }

  cancel(panel) {
    if (this.wanted.delete(panel)) this._send({ type: "cancel", panel });
  }

  waits(panel) {
    return this.wanted.has(panel);
  }

  _send(frame) {
    // The socket may be open before its event has come, which sends all that is wanted: nothing may go out twice.
    if (this.state === "open" && this.socket.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(frame));
  }

  _connect() {
    const protocols = this.token ? ["onestroke", `onestroke.token.${this.token}`] : ["onestroke"];
    const scheme = location.protocol === "https:" ? "wss" : "ws";
    const socket = new WebSocket(`${scheme}://${location.host}/v1/live`, protocols);
    socket.binaryType = "arraybuffer";
    this.socket = socket;
    socket.onopen = () => {
      this.attempts = 0;
      this._become("open");
      for (const { frame } of this.wanted.values()) this._send(frame);
    };
    socket.onmessage = ({ data }) => this._take(data);
    socket.onclose = () => {
      const wanted = new Set([...this.wanted.values()].map(({ frame }) => frame.id));
      for (const id of this.contexts.keys()) if (!wanted.has(id)) this.contexts.delete(id);
      this._become("lost");
      setTimeout(() => this._connect(), RETRY_MS[Math.min(this.attempts++, RETRY_MS.length - 1)]);
    };
  }

  _become(state) {
    if (this.state === state) return;
    this.state = state;
    this.dispatchEvent(new Event("state"));
  }

  _take(data) {
    if (typeof data !== "string") return this._takePicture(data);
    const answer = JSON.parse(data);
    if (answer.type === "superseded" && this.wanted.get(answer.panel)?.frame.id !== answer.id) this.contexts.delete(answer.id);
    if (answer.type !== "error" || answer.panel === null) return;
    const waiting = this.wanted.get(answer.panel);
    if (waiting?.frame.id !== answer.id) return;
    if (answer.retry_after) {
      setTimeout(() => this.wanted.get(answer.panel) === waiting && this._send(waiting.frame), 1000 * answer.retry_after);
    } else {
      this.wanted.delete(answer.panel);
      this.contexts.delete(answer.id);
    }
    this.dispatchEvent(new CustomEvent("fault", { detail: { ...answer, context: waiting.context } }));
  }

  _takePicture(data) {
    const length = new DataView(data).getUint32(0);
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length)));
    const context = this.contexts.get(header.id);
    this.contexts.delete(header.id);
    if (header.id < (this.shown.get(header.panel) ?? 0)) return;
    this.shown.set(header.panel, header.id);
    if (this.wanted.get(header.panel)?.frame.id === header.id) this.wanted.delete(header.panel);
    const blob = new Blob([new Uint8Array(data, 4 + length)], { type: header.media_type });
    this.dispatchEvent(new CustomEvent("picture", { detail: { header, blob, context } }));
  }
}
