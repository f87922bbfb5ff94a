"use strict";
(() => {
  const samples = [...document.querySelectorAll(".sample")];
  const filter = document.getElementById("filter");
  const keep = [...document.querySelectorAll("details")];

  function find() {
    const wanted = filter.value.trim().toLowerCase();
    let found = 0;
    for (const sample of samples) {
      const has = sample.textContent.toLowerCase().includes(wanted);
      sample.hidden = !has;
      if (wanted) sample.open = has;
      found += has;
    }
    document.getElementById("found").value = wanted ? `${found} of ${samples.length} prompts` : "";
  }
  if (filter) {
    document.getElementById("find").hidden = false;
    filter.addEventListener("input", find);
  }

  // A page that renews itself looks as it was left. Storage may be forbidden to files.
  if (!document.querySelector('meta[http-equiv="refresh"]')) return;
  const place = "report:" + location.pathname;
  try {
    const was = JSON.parse(sessionStorage.getItem(place) || "null");
    if (was) {
      if (filter && was.wanted) { filter.value = was.wanted; find(); }
      if (was.open.length === keep.length) keep.forEach((each, at) => { each.open = was.open[at]; });
      scrollTo(0, was.y);
    }
  } catch { /* as a page that is opened for the first time */ }
  addEventListener("pagehide", () => {
    try {
      const now = { y: scrollY, wanted: filter ? filter.value : "", open: keep.map((each) => each.open) };
      sessionStorage.setItem(place, JSON.stringify(now));
    } catch { /* so */ }
  });
})();
