"use strict";
(() => {
  // Printed, everything is told.
  const opened = new Set();
  addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details:not([open])")) {
      opened.add(details);
      details.open = true;
    }
  });
  addEventListener("afterprint", () => {
    for (const details of opened) details.open = false;
    opened.clear();
  });

  const form = document.getElementById("filters");
  if (!form) return;
  const set = document.getElementById("filter-set");
  const show = document.getElementById("filter-show");
  const text = document.getElementById("filter-text");
  const count = document.getElementById("filter-count");
  const samples = Array.from(document.querySelectorAll(".sample"), (element) => ({
    element,
    words: element.textContent.toLowerCase(),
  }));
  const shown = {
    "": () => true,
    leaks: (data) => data.leaks === "true",
    changed: (data) => data.changed === "true",
    same: (data) => data.changed === "false",
    degenerate: (data) => data.degenerate === "true",
  };
  const filter = () => {
    const words = text.value.trim().toLowerCase();
    let left = 0;
    for (const sample of samples) {
      const data = sample.element.dataset;
      const keep =
        (set.value === "" || data.set === set.value) &&
        shown[show.value](data) &&
        sample.words.includes(words);
      sample.element.hidden = !keep;
      left += keep ? 1 : 0;
    }
    count.textContent = left === 1 ? "1 sample" : `${left} samples`;
  };
  form.hidden = false;
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  filter();
})();
