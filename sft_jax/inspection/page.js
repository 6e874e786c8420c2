"use strict";
// Filters of the examples. They are in the address after "#", so that a view can be shared: #search=text&set=name&only=problem
(() => {
  const form = document.getElementById("filters");
  if (!form) return;  // a page without examples
  const examples = [...document.querySelectorAll("article.example")];
  const texts = examples.map((example) => example.textContent.toLowerCase());
  const status = document.getElementById("status");

  function show() {
    const search = form.search.value.toLowerCase();
    const { value: set } = form.set;
    const { value: only } = form.only;
    let shown = 0;
    examples.forEach((example, index) => {
      const kinds = example.dataset.is.split(" ");
      const fits = (!set || example.dataset.set === set) && (!only || kinds.includes(only)) && texts[index].includes(search);
      example.hidden = !fits;
      shown += fits;
    });
    status.textContent = `${shown.toLocaleString("en")} of ${examples.length.toLocaleString("en")} shown`;
  }

  function read() {
    const asked = new URLSearchParams(location.hash.slice(1));
    for (const name of ["search", "set", "only"]) {
      form[name].value = asked.get(name) || "";
    }
    show();
  }

  function changed() {
    const asked = new URLSearchParams();
    for (const name of ["search", "set", "only"]) {
      if (form[name].value) asked.set(name, form[name].value);
    }
    history.replaceState(null, "", asked.size ? `#${asked}` : location.pathname + location.search);
    show();
  }

  form.addEventListener("input", changed);
  form.addEventListener("submit", (event) => event.preventDefault());
  window.addEventListener("hashchange", () => { if (location.hash.includes("=")) read(); });
  form.hidden = false;
  if (location.hash.includes("=")) read(); else show();
})();
