// The project in this browser's own database, after every change: a closed tab or a crash loses no work. A write is one
// transaction, the old project or the new one.

import { readProject, writeProject } from "./project.js";

const DELAY_MS = 400;

const database = () => new Promise((done, failed) => {
  const request = indexedDB.open("onestroke-studio", 1);
  request.onupgradeneeded = () => request.result.createObjectStore("projects");
  request.onsuccess = () => done(request.result);
  request.onerror = () => failed(request.error);
});

const settled = (request) => new Promise((done, failed) => {
  request.onsuccess = () => done(request.result);
  request.onerror = () => failed(request.error);
});

let timer;

// Keep the project and the pictures that it shows. Resolves once they are kept.
export function remember(store, desk) {
  clearTimeout(timer);
  return new Promise((done, failed) => {
    timer = setTimeout(async () => {
      try {
        const content = writeProject(store.project, await desk.shownPictures());
        const kept = (await database()).transaction("projects", "readwrite").objectStore("projects");
        done(await settled(kept.put(content, "current")));
      } catch (error) {
        failed(error);
      }
    }, DELAY_MS);
  });
}

// {project, pictures}, or null where there is none that can be read.
export async function recall() {
  try {
    const kept = (await database()).transaction("projects").objectStore("projects");
    const content = await settled(kept.get("current"));
    return content ? readProject(content) : null;
  } catch {
    return null;
  }
}
