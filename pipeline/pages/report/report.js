"use strict";
// Enlarging pictures by pointer and keyboard, opening all that is folded, and telling where a table goes on.
(() => {
  const viewer = document.getElementById("viewer");
  const [large, words] = [viewer.querySelector("img"), viewer.querySelector("figcaption")];
  let current = null;

  const group = (photo) => [...photo.closest("[data-group]").querySelectorAll("button.photo")];

  function beside(photo, step) {
    const all = group(photo);
    return all[(all.indexOf(photo) + step + all.length) % all.length];
  }

  function show(photo) {
    current = photo;
    const small = photo.querySelector("img");
    large.src = small.src;
    large.alt = small.alt;
    words.replaceChildren(...[...photo.querySelector(".said").childNodes].map((node) => node.cloneNode(true)));
    if (!viewer.open) viewer.showModal();
  }

  document.addEventListener("click", (event) => {
    const photo = event.target.closest("button.photo");
    if (photo) show(photo);
    else if (event.target === viewer || event.target.id === "close") viewer.close();
    else if (event.target.id === "earlier") show(beside(current, -1));
    else if (event.target.id === "later") show(beside(current, 1));
  });

  document.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
    if (!step || event.altKey || event.ctrlKey || event.metaKey) return;
    const focused = document.activeElement?.closest("button.photo");
    if (viewer.open) show(beside(current, step));
    else if (focused) beside(focused, step).focus();
    else return;
    event.preventDefault();
  });

  viewer.addEventListener("close", () => current?.focus());

  const sections = [...document.querySelectorAll("details")];
  const all = document.getElementById("all");
  const label = () => { all.textContent = sections.every((each) => each.open) ? "Close all" : "Open all"; };
  all.hidden = false;
  all.addEventListener("click", () => {
    const open = !sections.every((each) => each.open);
    for (const each of sections) each.open = open;
  });
  for (const each of sections) each.addEventListener("toggle", label);
  addEventListener("beforeprint", () => { for (const each of sections) each.open = true; });
  const linked = () => {
    let name = location.hash.slice(1);
    try { name = decodeURIComponent(name); } catch { /* no name of this page */ }
    const target = document.getElementById(name);
    if (target?.tagName === "DETAILS") target.open = true;
  };
  addEventListener("hashchange", linked);
  linked();

  function tell(box) {
    const rest = box.scrollWidth - box.clientWidth;
    const scrolls = rest > 1;
    box.classList.toggle("scrolls", scrolls);
    box.nextElementSibling.hidden = !scrolls || box.scrollLeft >= rest - 1;
    if (scrolls) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
  const observer = new ResizeObserver((entries) => { for (const { target } of entries) tell(target); });
  for (const box of document.querySelectorAll(".wide")) {
    observer.observe(box);
    box.addEventListener("scroll", () => tell(box), { passive: true });
  }
})();
