// Elements are made here, and text is always set as text: names of files and classes are not trusted.

export const $ = (id) => document.getElementById(id);

export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
    else if (name === 'class') element.className = value;
    else if (name === 'data') Object.assign(element.dataset, value);
    else if (name === 'style') for (const [key, v] of Object.entries(value)) element.style.setProperty(key, v);
    else if (name in element && !name.startsWith('aria')) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export function field(text, control, ...more) {
  return make('label', { class: 'field' }, make('span', { textContent: text }), control, ...more);
}

export function replace(element, ...children) {
  element.replaceChildren(...children.filter((child) => child !== null && child !== undefined));
}

const SHOWN = 12_000; // ms

export function say(text, kind = 'error') {
  const messages = $('messages');
  for (const message of messages.children) if (message.firstChild.textContent === text) return;
  const close = make('button', { class: 'icon', type: 'button', 'aria-label': 'Dismiss', textContent: '×' });
  const message = make('div', { class: `message ${kind}` }, make('span', { textContent: text }), close);
  close.addEventListener('click', () => message.remove());
  messages.append(message);
  setTimeout(() => message.remove(), SHOWN);
}

export function isTyping(target) {
  return target.closest('input:not([type=range]):not([type=checkbox]):not([type=radio]), select, textarea') !== null;
}
