"use strict";
// Lays the pictures of each image over each other and adds a slider: a native range input over the whole picture, so
// that keyboards and screen readers find what they know, moved by the pointer wherever the picture is touched.
document.documentElement.classList.add("js");

for (const stage of document.querySelectorAll(".stage")) {
  const range = document.createElement("input");
  range.type = "range";
  range.min = "0";
  range.max = "100";
  range.step = "0.1";
  range.value = "50";
  range.setAttribute("aria-label", "Share of the original in " + stage.dataset.name);

  const handle = document.createElement("div");
  handle.className = "handle";
  handle.setAttribute("aria-hidden", "true");

  function show() {
    const share = Number(range.value);
    stage.style.setProperty("--cut", share + "%");
    stage.classList.toggle("left-edge", share < 22);
    stage.classList.toggle("right-edge", share > 70);
    range.setAttribute("aria-valuetext", Math.round(share) + " % original on the left");
  }

  function follow(event) {
    const box = stage.getBoundingClientRect();
    const share = (100 * (event.clientX - box.left)) / box.width;
    const height = (100 * (event.clientY - box.top)) / box.height;
    range.value = String(Math.min(100, Math.max(0, share)));
    stage.style.setProperty("--at", Math.min(100, Math.max(0, height)) + "%");
    show();
  }

  range.addEventListener("input", show);
  range.addEventListener("keydown", function (event) {
    // Arrow keys move a range by its step, which is fine for a pointer and slow for a key.
    const step = { ArrowLeft: -2, ArrowDown: -2, ArrowRight: 2, ArrowUp: 2, PageDown: -10, PageUp: 10 }[event.key];
    if (step === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    range.value = String(Number(range.value) + (event.shiftKey ? step / 20 : step));
    show();
  });
  range.addEventListener("pointerdown", function (event) {
    if (event.button !== 0) return;
    range.setPointerCapture(event.pointerId);
    follow(event);
  });
  range.addEventListener("pointermove", function (event) {
    if (range.hasPointerCapture(event.pointerId)) follow(event);
  });

  stage.append(range, handle);
  show();
}
