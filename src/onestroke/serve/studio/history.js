// The project and everything that was done to it. Projects are never changed in place, so that a step of the history is
// the project as it was.

const MERGE_MS = 1200; // changes of one name within this time are one step
const MOST = 300;

export class History extends EventTarget {
  constructor(project) {
    super();
    this.project = project;
    this.past = [];
    this.future = [];
    this.last = { name: "", at: 0 };
  }

  // Replace the project by `make(project)`. `name` says what was done; quick repetitions of it are one step.
  change(name, make) {
    const next = make(this.project);
    if (next === this.project) return;
    const now = performance.now();
    const merges = this.last.name === name && now - this.last.at < MERGE_MS && this.past.length > 0;
    if (!merges) this.past.push({ name, project: this.project });
    if (this.past.length > MOST) this.past.shift();
    this.future = [];
    this.last = { name, at: now };
    this._set(next);
  }

  panel(index, name, fields) {
    this.change(`${name} of panel ${index + 1}`, (project) => ({
      ...project,
      panels: project.panels.map((panel, i) => (i === index ? { ...panel, ...fields } : panel)),
    }));
  }

  balloon(id, name, fields) {
    this.change(`${name} of balloon ${id}`, (project) => ({
      ...project,
      balloons: project.balloons.map((balloon) => (balloon.id === id ? { ...balloon, ...fields } : balloon)),
    }));
  }

  open(project) {
    this.change("open", () => project);
    this.last = { name: "", at: 0 };
  }

  // End the step that is being made: the next change is a step of its own.
  settle() {
    this.last = { name: "", at: 0 };
  }

  undo() {
    this._step(this.past, this.future);
  }

  redo() {
    this._step(this.future, this.past);
  }

  _step(from, to) {
    const step = from.pop();
    if (!step) return;
    to.push({ name: step.name, project: this.project });
    this.settle();
    this._set(step.project);
  }

  _set(project) {
    this.project = project;
    this.dispatchEvent(new Event("change"));
  }
}
