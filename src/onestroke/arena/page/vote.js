// Shows one pair after another and sends the answers. It is never told which model drew which picture.
"use strict";

const QUESTIONS = ["quality", "adherence"];
const ANSWERS = { ArrowLeft: "left", ArrowDown: "tie", ArrowRight: "right" };
const by = (id) => document.getElementById(id);
const form = by("ballot");
let trial = null;
let shownAt = 0;
let isBusy = false;

const radios = (question) => [...form.querySelectorAll(`input[name=${question}]`)];
const answerTo = (question) => radios(question).find((radio) => radio.checked)?.value ?? null;
const open = () => QUESTIONS.find((question) => answerTo(question) === null) ?? null;

function focusOn(question) {
  form.querySelector(`fieldset[data-question=${question}]`).focus();
}

function current() {
  return document.activeElement?.closest("fieldset")?.dataset.question ?? open();
}

function mark() {
  for (const fieldset of form.querySelectorAll("fieldset")) {
    const question = fieldset.dataset.question;
    fieldset.classList.toggle("answered", answerTo(question) !== null);
    fieldset.classList.toggle("current", question === current());
  }
  by("next").classList.toggle("ready", open() === null);
}

function choose(question, answer) {
  radios(question).find((radio) => radio.value === answer).checked = true;
  goOn(question);
}

function goOn(question) {
  const next = QUESTIONS[QUESTIONS.indexOf(question) + 1];
  if (next) focusOn(next);
  else by("next").focus();
  say("");
  mark();
}

function goBack() {
  const at = document.activeElement === by("next") ? QUESTIONS.length : QUESTIONS.indexOf(current());
  if (at > 0) focusOn(QUESTIONS[at - 1]);
  mark();
}

function say(text) {
  by("message").textContent = text;
}

async function loaded(image, address) {
  image.src = address;
  await image.decode();
}

async function show(state) {
  trial = state.trial;
  if (!trial) {
    location.assign("/results");
    return;
  }
  form.classList.add("waiting");
  form.hidden = false;
  try {
    // Both or neither: the picture that comes first would have an advantage.
    await Promise.all([loaded(by("left"), trial.left), loaded(by("right"), trial.right)]);
  } catch {
    say("A picture cannot be read. Start onestroke arena again and reload this page.");
    return;
  }
  form.reset();
  by("prompt").textContent = trial.prompt;
  by("place").textContent = `${trial.number} of ${state.total}`;
  by("bar").style.setProperty("--done", (trial.number - 1) / state.total);
  by("said").textContent = `Pair ${trial.number} of ${state.total}. ${trial.prompt}`;
  by("finish").hidden = trial.number === 1;
  form.classList.remove("waiting");
  by("prompt").focus();
  mark();
  say("");
  shownAt = performance.now();
  for (const address of state.preload) new Image().src = address;
}

async function send(address, content) {
  const request = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(content) };
  const answer = await fetch(address, request).catch(() => null);
  if (!answer) throw new Error("The vote was not kept: nobody answers. Start onestroke arena again, then press Enter.");
  const state = await answer.json();
  // 409: this trial was voted on before, as by a second window; the answer tells where to go on.
  if (!answer.ok && answer.status !== 409) throw new Error(`The vote was not kept: ${state.detail}`);
  return state;
}

async function submit(event) {
  event.preventDefault();
  if (isBusy || form.classList.contains("waiting")) return;
  if (open()) {
    say("Answer both questions first.");
    focusOn(open());
    return;
  }
  isBusy = true;
  try {
    const seconds = Math.min((performance.now() - shownAt) / 1000, 86400);
    const answers = { number: trial.number, quality: answerTo("quality"), adherence: answerTo("adherence"), seconds };
    await show(await send("/api/votes", answers));
  } catch (error) {
    say(error.message);
  } finally {
    isBusy = false;
  }
}

function press(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.shiftKey || by("sure").open || form.hidden) return;
  const question = current();
  if (event.key in ANSWERS && question) choose(question, ANSWERS[event.key]);
  else if (event.key === "ArrowUp") goBack();
  else if (event.key === "Enter" && document.activeElement.tagName !== "BUTTON") form.requestSubmit();
  else return;
  event.preventDefault();
}

function resume() {
  if (open()) focusOn(open());
  else by("next").focus();
}

async function stop() {
  try {
    await show(await send("/api/finish", {}));
  } catch (error) {
    by("sure").close();
    say(error.message);
  }
}

form.addEventListener("submit", submit);
form.addEventListener("focusin", mark);
form.addEventListener("click", (event) => {
  // A mouse's click on an answer goes on to the next question, as an arrow key does; detail is 0 for a key's click.
  if (event.target.name && event.detail > 0) goOn(event.target.name);
});
form.addEventListener("change", mark);
document.addEventListener("keydown", press);
by("finish").addEventListener("click", () => by("sure").showModal());
by("stay").addEventListener("click", () => {
  by("sure").close();
  resume();
});
by("stop").addEventListener("click", stop);
by("sure").addEventListener("close", resume); // Escape closes it too
fetch("/api/trial")
  .then((answer) => answer.json())
  .then(show)
  .catch(() => say("The arena does not answer. Start onestroke arena again and reload this page."));
