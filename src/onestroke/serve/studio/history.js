// The project and everything that was done to it. Projects are never changed in place, so that a step of the history is
// the project as it was. `at` is the page that is shown; a step knows its own, and undoing it turns there.

const MERGE_MS = 1200; // changes of one name within this time are one step
const MOST = 300;

export class History extends EventTarget {
  constructor(project) {
    super();
    this.project = project;
    this.at = 0;
    this.past = [];
    this.future = [];
    this.last = { name: "", at: 0 };
  }

  get page() {
    return this.project.pages[this.at];
  }

  // Replace the project by `make(project)`. `name` says what was done; quick repetitions of it are one step.
  change(name, make, at = this.at) {
    const next = make(this.project);
    if (next === this.project) return;
    const now = performance.now();
    const merges = this.last.name === name && now - this.last.at < MERGE_MS && this.past.length > 0;
    if (!merges) this.past.push({ name, project: this.project, at: this.at });
    if (this.past.length > MOST) this.past.shift();
    this.future = [];
    this.last = { name, at: now };
    this._set(next, at);
  }

  // Replace the page that is shown by `make(page)`.
  changePage(name, make) {
    this.change(name, (project) => ({ ...project, pages: project.pages.map((page, i) => (i === this.at ? make(page) : page)) }));
  }

  panel(index, name, fields) {
    this.changePage(`${name} of panel ${index + 1}`, (page) => ({
      ...page,
      panels: page.panels.map((panel, i) => (i === index ? { ...panel, ...fields } : panel)),
    }));
  }

  balloon(id, name, fields) {
    this.changePage(`${name} of balloon ${id}`, (page) => ({
      ...page,
      balloons: page.balloons.map((balloon) => (balloon.id === id ? { ...balloon, ...fields } : balloon)),
    }));
  }

  open(project) {
    this.change("open", () => project, 0);
    this.settle();
  }

  // Show another page, which is no step.
  turnTo(at) {
    if (at === this.at || !this.project.pages[at]) return;
    this.settle();
    this._set(this.project, at);
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
    to.push({ name: step.name, project: this.project, at: this.at });
    this.settle();
    this._set(step.project, step.at);
  }

  _set(project, at) {
    const before = [this.at, this.page.id];
    this.project = project;
    this.at = Math.min(at, project.pages.length - 1);
    if (this.page.id !== before[1]) this.dispatchEvent(new CustomEvent("turn", { detail: { moved: this.at !== before[0] } }));
    this.dispatchEvent(new Event("change"));
  }
}
