// Makes the page quicker: links and searches fetch the new page and swap its content, so that the field keeps the focus.
// Without this script the same links and the same form work, but for the search by an image of one's own.
"use strict";

const $ = (selector) => document.querySelector(selector);
const SLOW = 8000; // ms after which the page says that a search still runs
let shown = here(); // the address of the search on the page
let running = null; // AbortController of the request whose answer is awaited

document.documentElement.classList.add("scripted");

function here() {
  return location.pathname + location.search;
}

/** Loads the search at `url`. `keep`: leave the form as the user has just filled it in. */
async function load(url, { keep = false, push = true } = {}) {
  running?.abort();
  const request = (running = new AbortController());
  busy(true);
  const slow = setTimeout(() => say("Still searching …"), SLOW);
  try {
    const answer = await fetch(url, { signal: request.signal });
    const text = await answer.text();
    if (!(answer.headers.get("Content-Type") || "").startsWith("text/html")) throw new Error(text.trim());
    const page = new DOMParser().parseFromString(text, "text/html");
    if (push) history.pushState(null, "", url);
    shown = here();
    show(page, keep);
    if (push && !keep) scrollTo({ top: 0 });
  } catch (error) {
    if (request.signal.aborted) return;
    fail(error);
  } finally {
    clearTimeout(slow);
    if (running === request) {
      running = null;
      busy(false);
    }
  }
}

function show(page, keep) {
  document.title = page.title;
  const opened = $("#more").open;
  if (keep) {
    for (const part of ["#asked", "#results", ".examples"]) {
      const [old, made] = [$(part), page.querySelector(part)];
      if (old && made) old.replaceWith(made);
      else if (old) old.remove();
      else if (made) $("#more").before(made);
    }
  } else {
    $("main").replaceWith(page.querySelector("main"));
    $("#more").open = opened;
    $("#results").focus({ preventScroll: true });
  }
  prepare();
  announce($("#results .count, #results .message:not(.error)")?.innerText ?? "");
}

function busy(now) {
  $("#results").setAttribute("aria-busy", now);
}

/** Says something in the place where the number of results stands. */
function say(text) {
  const place = $("#results .count");
  if (place) place.textContent = text;
  announce(text);
}

/** Has a screen reader read something out. It does so only for an element that was there before its text. */
function announce(text) {
  $("#announced").textContent = text;
}

/** Shows what went wrong in place of the results. A failed fetch is a TypeError. */
function fail(error) {
  const box = document.createElement("div");
  box.className = "message error";
  box.setAttribute("role", "alert");
  const [title, text] = ["h2", "p"].map((name) => document.createElement(name));
  title.textContent = error instanceof TypeError ? "The server does not answer" : "This did not work";
  text.textContent = error instanceof TypeError ? "Is “upperson search serve” still running in its terminal? Search again once it is." : error.message;
  box.append(title, text);
  $("#results").replaceChildren(box);
}

/** The address of what the form asks for. Fields that are empty or as at first are left out. */
function addressOf(form) {
  const asked = new URLSearchParams();
  for (const [name, value] of new FormData(form)) {
    const field = form.elements[name];
    const usual = field instanceof HTMLInputElement && ["range", "number"].includes(field.type) && value === field.dataset.usual;
    if (typeof value === "string" && value.trim() && !usual) asked.append(name, value.trim());
  }
  if (!asked.has("not")) asked.delete("weight");
  return asked.size ? `/?${asked}` : "/";
}

async function upload(file) {
  busy(true);
  try {
    const answer = await fetch("/upload", { method: "POST", body: file, headers: { "Content-Type": "application/octet-stream" } });
    if (!answer.ok) throw new Error((await answer.text()).trim());
    const { image } = await answer.json();
    const asked = new URLSearchParams(addressOf($("#form")).slice(2));
    for (const name of ["q", "not", "weight", "every", "like", "image"]) asked.delete(name);
    asked.append("image", image);
    await load(`/?${asked}`);
  } catch (error) {
    fail(error);
    busy(false);
  }
}

function prepare() {
  const [slider, output] = [$("#weight"), $("output[for=weight]")];
  output.textContent = `${Math.round(slider.value * 100)} %`;
}

/** The picture that is `key` away from `from` in the grid, by the pictures' places on the screen. */
function neighbour(from, key) {
  const pictures = [...document.querySelectorAll("a.picture")];
  const index = pictures.indexOf(from);
  if (key === "Home") return pictures[0];
  if (key === "End") return pictures.at(-1);
  if (key === "ArrowLeft" || key === "ArrowRight") return pictures[index + (key === "ArrowLeft" ? -1 : 1)];
  const top = from.parentElement.offsetTop;
  const columns = pictures.filter((picture) => picture.parentElement.offsetTop === top).length;
  return pictures[index + (key === "ArrowUp" ? -columns : columns)];
}

document.addEventListener("submit", (event) => {
  if (event.target.id !== "form") return;
  event.preventDefault();
  load(addressOf(event.target), { keep: true });
});

document.addEventListener("click", (event) => {
  const link = event.target.closest("a[data-swap]");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey || event.altKey || event.button) return;
  event.preventDefault();
  load(link.getAttribute("href"));
});

addEventListener("popstate", () => {
  if (here() !== shown) load(here(), { push: false }); // else only the part after # has changed
});

document.addEventListener("input", (event) => {
  if (event.target.id === "weight") prepare();
});

document.addEventListener("change", (event) => {
  if (event.target.id === "file" && event.target.files.length) upload(event.target.files[0]);
});

document.addEventListener("paste", (event) => {
  const file = event.clipboardData?.files[0];
  if (file) {
    event.preventDefault();
    upload(file);
  }
});

const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
document.addEventListener("dragover", (event) => {
  if (!carriesFiles(event)) return;
  event.preventDefault();
  document.documentElement.classList.add("dropping");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.documentElement.classList.remove("dropping");
});
document.addEventListener("drop", (event) => {
  document.documentElement.classList.remove("dropping");
  if (!carriesFiles(event)) return;
  event.preventDefault();
  if (event.dataTransfer.files.length) upload(event.dataTransfer.files[0]);
});

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  const typing = event.target.matches("input, textarea");
  if (event.key === "/" && !typing) {
    event.preventDefault();
    $("#q").focus();
    $("#q").select();
  } else if (event.key === "Escape" && event.target.closest("#more") && $("#more").open) {
    $("#more").open = false;
    $("#more summary").focus();
  } else if (event.key === "Escape" && event.target.closest("#results")) {
    $("#q").focus();
  } else if (event.key === "ArrowDown" && event.target.id === "q") {
    event.preventDefault();
    $("a.picture")?.focus();
  } else if (event.target.matches("a.picture") && /^(Arrow(Left|Right|Up|Down)|Home|End)$/.test(event.key)) {
    event.preventDefault();
    const next = neighbour(event.target, event.key) ?? (event.key === "ArrowUp" ? $("#q") : null);
    next?.focus();
  }
});

prepare();
