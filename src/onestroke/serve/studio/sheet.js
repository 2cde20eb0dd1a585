// The character sheet and the style sheet: words that are kept in one place and written into the prompts of all panels.
// "@Mara" in a prompt stands for all of Mara, "@Mara.hair" for one attribute; the style ends every prompt.

export const MAX_CHARACTERS = 24;
export const MAX_ATTRIBUTES = 16;
export const NAME = /^[\p{L}\p{N}_-]{1,40}$/u;
const MENTION = /@([\p{L}\p{N}_-]+)(?:\.([\p{L}\p{N}_-]+))?/gu;

export const newSheet = () => ({ style: "", characters: [] });

export function newCharacter(characters) {
  const taken = new Set(characters.map(({ name }) => name.toLowerCase()));
  const names = ["Mara", "Otto", "Ines", "Juno", "Piet", "Runa"];
  const name = names.find((one) => !taken.has(one.toLowerCase())) ?? `Character${characters.length + 1}`;
  const attributes = [["who", "a person"], ["hair", ""], ["face", ""], ["clothes", ""]].map(([label, words]) => ({ name: label, words }));
  return { id: crypto.randomUUID(), name, attributes };
}

const listed = (phrases) => (phrases.length < 2 ? phrases.join("") : `${phrases.slice(0, -1).join(", ")} and ${phrases.at(-1)}`);

// "a person with pink hair, round glasses and a hoodie"; "who" leads, wherever it stands.
export function wordsOf(character) {
  const said = character.attributes.map(({ name, words }) => ({ name: name.toLowerCase(), words: words.trim() })).filter(({ words }) => words);
  const who = said.filter(({ name }) => name === "who").map(({ words }) => words).join(" ");
  const rest = listed(said.filter(({ name }) => name !== "who").map(({ words }) => words));
  return who && rest ? `${who} with ${rest}` : who || rest;
}

// The prompt as the model reads it, and the mentions that the sheet does not have: {prompt, unknown}.
export function spoken(prompt, sheet) {
  const unknown = [];
  const told = prompt.replace(MENTION, (mention, name, attribute) => {
    const character = sheet.characters.find((one) => one.name.toLowerCase() === name.toLowerCase());
    const found = attribute ? character?.attributes.find((one) => one.name.toLowerCase() === attribute.toLowerCase()) : character;
    if (!found) unknown.push(mention);
    return found ? (attribute ? found.words.trim() : wordsOf(found)) : mention;
  }).trim();
  const style = sheet.style.trim();
  return { prompt: told && style ? `${told}, ${style}` : told, unknown };
}
