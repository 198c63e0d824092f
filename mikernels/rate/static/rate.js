// SPDX-License-Identifier: Apache-2.0
// Sends all of a turn whenever something in it changes: what arrives last is whole.
"use strict";

const turn = Number(document.getElementById("turn").dataset.turn);
const questions = [...document.querySelectorAll(".question")];
const rating = document.getElementById("rating");
const description = document.getElementById("description");
const next = document.getElementById("next");
const state = document.getElementById("state");
const left = document.getElementById("left");
// the question that the keys are for; after the last one the rating
const stops = [...questions, rating];
let at = 0;

const chosen = (box) => box.querySelector("input:checked")?.value ?? null;

function entry(finish) {
  return {
    turn,
    answers: questions.map((q) => ({ true: true, false: false })[chosen(q)] ?? null),
    rating: chosen(rating) && Number(chosen(rating)),
    description: description.value,
    finish,
  };
}

function show() {
  stops.forEach((box, i) => box.classList.toggle("current", i === at));
  questions.forEach((q) => q.classList.toggle("answered", chosen(q) !== null));
  const open = questions.filter((q) => chosen(q) === null).length;
  const words = [];
  if (open) words.push(open === 1 ? "1 text" : `${open} texts`);
  if (!chosen(rating)) words.push("the rating");
  next.disabled = words.length > 0;
  left.textContent = words.length ? `Still open: ${words.join(" and ")}` : "";
}

function go(to) {
  at = Math.max(0, Math.min(stops.length - 1, to));
  show();
  stops[at].focus({ preventScroll: true });
  stops[at].scrollIntoView({ block: "nearest", behavior: "auto" });
}

// one at a time and in order: an older state never overtakes a newer one
let queue = Promise.resolve();

async function send(finish) {
  state.textContent = "Saving …";
  try {
    const answer = await fetch("save", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(entry(finish)),
    });
    // done with it; or another tab is further
    if ((finish && answer.ok) || answer.status === 409) return location.reload();
    if (!answer.ok) throw new Error((await answer.json()).error);
    state.textContent = "Saved";
    state.classList.remove("bad");
  } catch (error) {
    state.textContent = `Not saved: ${error.message}. Is the server running? Answer again to retry`;
    state.classList.add("bad");
  }
}

function save(finish = false) {
  queue = queue.then(() => send(finish));
}

function choose(box, value) {
  box.querySelector(`input[value="${value}"]`).checked = true;
  show();
  save();
}

document.addEventListener("change", (event) => {
  const box = stops.indexOf(event.target.closest("fieldset"));
  if (box >= 0) at = box;
  show();
  save();
});

let typing;
description.addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(save, 400);
});

next.addEventListener("click", () => save(true));

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target === description) {
    if (event.key === "Escape") go(stops.length - 1);
    return;
  }
  const key = event.key.toLowerCase();
  if (key === "arrowdown" || key === "arrowup") {
    go(at + (key === "arrowdown" ? 1 : -1));
  } else if ((key === "y" || key === "n") && stops[at] !== rating) {
    choose(stops[at], String(key === "y"));
    go(at + 1);
  } else if ("12345".includes(key)) {
    choose(rating, key);
    go(stops.length - 1);
  } else if (key === "enter" && event.target !== next && !next.disabled) {
    save(true);
  } else {
    return;
  }
  event.preventDefault();
});

const first = questions.findIndex((q) => chosen(q) === null);
at = first < 0 ? stops.length - 1 : first;
show();
