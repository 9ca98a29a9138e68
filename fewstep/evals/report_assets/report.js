"use strict";
(function () {
  document.documentElement.classList.add("js");
  const list = document.getElementById("cases");
  if (!list) return;
  const PAGE = 24;
  const cases = Array.from(list.children);
  const scope = document.getElementById("scope");
  const order = document.getElementById("order");
  const words = document.getElementById("words");
  const size = document.getElementById("size");
  const count = document.getElementById("count");
  const more = document.getElementById("more");
  let limit = PAGE;

  const difference = (item) => item.dataset.difference === "" ? null : Number(item.dataset.difference);
  const place = (item) => Number(item.dataset.place);
  const byDifference = (sign) => (a, b) => {
    const x = difference(a), y = difference(b);
    if (x === null || y === null) return (x === null) - (y === null) || place(a) - place(b);
    return sign * (x - y) || place(a) - place(b);
  };
  const orders = {
    mixed: (a, b) => place(a) - place(b),
    loss: byDifference(1),
    win: byDifference(-1),
  };

  function show() {
    const [task, category] = scope.value.split("/");
    const wanted = words.value.trim().toLowerCase();
    let matching = 0;
    cases.sort(orders[order.value]);
    for (const item of cases) {
      const fits = (!task || item.dataset.task === task)
        && (!category || item.dataset.category === category)
        && (!wanted || item.textContent.toLowerCase().includes(wanted));
      if (fits) matching += 1;
      item.hidden = !fits || matching > limit;
      list.appendChild(item);
    }
    const shown = Math.min(matching, limit);
    count.textContent = shown + " of " + matching + (matching === 1 ? " case" : " cases");
    more.hidden = shown === matching;
  }
  function restart() { limit = PAGE; show(); }
  scope.addEventListener("change", restart);
  order.addEventListener("change", restart);
  words.addEventListener("input", restart);
  more.addEventListener("click", function () { limit += 2 * PAGE; show(); });
  size.addEventListener("input", function () {
    document.documentElement.style.setProperty("--size", size.value + "px");
  });
  show();
})();
