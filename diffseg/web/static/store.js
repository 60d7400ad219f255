// What the server said last, which picture is selected, and who wants to know of changes.

import { get } from './api.js';
import { say } from './dom.js';

const BUSY = 500; // ms between questions while features are extracted
const IDLE = 2500;
const HIDDEN = 10_000;

export const store = {
  revision: '',
  folder: '',
  model: '',
  default: '',
  pictures: [],
  choices: [],
  annotations: 0,
  loaded: null,
  limits: { bytes: 5e7, pixels: 5e7 },
  selected: null, // id
  matching: null, // id of the choice that pictures are matched with; null is the default
  reachable: true,
};

const listeners = new Set();

export function onChange(listener) {
  listeners.add(listener);
}

export function changed(what) {
  for (const listener of listeners) listener(what);
}

export const byId = (id) => store.pictures.find((picture) => picture.id === id);
export const usable = () => store.pictures.filter((picture) => picture.error === null);
export const selected = () => byId(store.selected) ?? null;
export const choiceOf = (id) => store.choices.find((choice) => choice.id === id);
export const matchingChoice = () => store.matching ?? store.default;

export function isReady(choice, picture) {
  return choiceOf(choice)?.doneSet.has(picture) ?? false;
}

export function select(id) {
  if (store.selected === id) return;
  store.selected = id;
  changed('selected');
}

export function step(by) {
  const pictures = usable();
  const at = pictures.findIndex((picture) => picture.id === store.selected);
  if (pictures.length) select(pictures[(at + by + pictures.length) % pictures.length].id);
}

export function isBusy() {
  const count = usable().length;
  return store.choices.some((c) => c.done.length + Object.keys(c.errors).length < count);
}

export async function refresh() {
  let state;
  try {
    state = await get(`/api/state?revision=${encodeURIComponent(store.revision)}`);
  } catch (error) {
    if (store.reachable) say(error.message);
    store.reachable = false;
    changed('reachable');
    return;
  }
  const back = !store.reachable;
  store.reachable = true;
  if (back) changed('reachable');
  if (!state.pictures) return;
  const listed = store.pictures.map((p) => p.id + p.error).join();
  for (const choice of state.choices) choice.doneSet = new Set(choice.done);
  Object.assign(store, state);
  if (!selected()) store.selected = usable()[0]?.id ?? null;
  if (store.matching && !choiceOf(store.matching)) store.matching = null;
  changed(store.pictures.map((p) => p.id + p.error).join() === listed ? 'progress' : 'pictures');
}

export async function poll() {
  await refresh();
  setTimeout(poll, document.hidden ? HIDDEN : isBusy() ? BUSY : IDLE);
}
