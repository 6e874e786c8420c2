"use strict";
// Filters of the examples: a search, and lists to choose from, each by an attribute data-NAME or by one of the words in data-is.
// They are in the address after "#", so that a view can be shared: #search=text&set=name&only=problem
(() => {
  const form = document.getElementById("filters");
  if (!form) return;  // a page without examples
  const examples = [...document.querySelectorAll("article.example")];
  const texts = examples.map((example) => example.textContent.toLowerCase());
  const selects = [...form.querySelectorAll("select")];
  const names = ["search", ...selects.map((select) => select.name)];
  const status = document.getElementById("status");

  function show() {
    const search = form.search.value.toLowerCase();
    let shown = 0;
    examples.forEach((example, index) => {
      const { dataset } = example;
      const kinds = dataset.is.split(" ");
      const chosen = ({ name, value }) => !value || (name in dataset ? dataset[name] === value : kinds.includes(value));
      const fits = selects.every(chosen) && texts[index].includes(search);
      example.hidden = !fits;
      shown += fits;
    });
    status.textContent = `${shown.toLocaleString("en")} of ${examples.length.toLocaleString("en")} shown`;
  }

  function read() {
    const asked = new URLSearchParams(location.hash.slice(1));
    for (const name of names) {
      form[name].value = asked.get(name) || "";
    }
    show();
  }

  function changed() {
    const asked = new URLSearchParams();
    for (const name of names) {
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
