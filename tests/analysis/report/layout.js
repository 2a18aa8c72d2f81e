// What is wrong with the layout of the page as it stands, one sentence each: cut, overlapping, too small, not seen to
// scroll. Of what is shown: folded parts count once they are unfolded.
() => {
  const page = document.documentElement, wide = page.clientWidth, problems = [];
  const named = (node) => `<${node.nodeName.toLowerCase()}> "${node.textContent.trim().replace(/\s+/g, " ").slice(0, 60)}"`;
  const shown = (element) => element.checkVisibility({ visibilityProperty: true, contentVisibilityAuto: true });
  const scrolls = (element) => ["auto", "scroll"].includes(getComputedStyle(element).overflowX);
  const holder = (element) => {  // what scrolls it into sight
    const found = element.closest(".scroll");
    return found && found !== element && scrolls(found) ? found : null;
  };

  if (page.scrollWidth > wide) problems.push(`the page is ${page.scrollWidth} px wide, of ${wide}`);
  for (const element of document.body.querySelectorAll("*")) {
    if (element.closest("svg") !== null && element.nodeName !== "svg") continue;
    const box = element.getBoundingClientRect();
    if (!shown(element) || !box.width || !box.height) continue;
    if (!holder(element) && (box.left < -1 || box.right > wide + 1)) problems.push(`outside the page: ${named(element)}`);
    const isCut = element.scrollWidth > element.clientWidth + 1 && element.clientWidth > 0;
    const overflow = getComputedStyle(element).overflowX;
    if (isCut && overflow !== "visible") {
      const isMarked = getComputedStyle(element).backgroundImage.includes("gradient");
      if (!scrolls(element)) problems.push(`cut: ${named(element)}`);
      else if (element.tabIndex < 0 || !isMarked) problems.push(`not seen to scroll: ${named(element)}`);
    }
  }

  // [box, node] of each line of text on the page, without what is scrolled out of sight.
  const lines = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, parent = node.parentElement;
    if (!node.textContent.trim() || parent.closest("svg, style") || !shown(parent)) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const view = holder(parent)?.getBoundingClientRect();
    for (const box of range.getClientRects()) {
      const left = view ? Math.max(box.left, view.left) : box.left, right = view ? Math.min(box.right, view.right) : box.right;
      if (right > left) lines.push([{ left, right, top: box.top, bottom: box.bottom }, node]);
    }
  }
  const overlaps = (a, b, least) =>
    Math.min(a.right, b.right) - Math.max(a.left, b.left) > least && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > least;
  lines.sort((a, b) => a[0].top - b[0].top);
  lines.forEach(([box, node], index) => {
    for (let next = index + 1; next < lines.length && lines[next][0].top < box.bottom; next++)
      if (lines[next][1] !== node && overlaps(box, lines[next][0], 2)) problems.push(`overlap: ${named(node)} and ${named(lines[next][1])}`);
  });

  for (const svg of document.querySelectorAll("figure svg")) {
    if (!shown(svg)) continue;
    const whole = svg.getBoundingClientRect(), scale = svg.getScreenCTM().a;
    const texts = [...svg.querySelectorAll("text")].filter((text) => text.textContent.trim());
    const boxes = texts.map((text) => text.getBoundingClientRect());
    texts.forEach((text, index) => {
      const box = boxes[index];
      if (box.left < whole.left - 1 || box.right > whole.right + 1 || box.top < whole.top - 1 || box.bottom > whole.bottom + 1)
        problems.push(`cut: ${named(text)} in the figure of ${named(svg)}`);
      if (parseFloat(getComputedStyle(text).fontSize) * scale < 7) problems.push(`too small: ${named(text)} of ${named(svg)}`);
      for (let next = index + 1; next < texts.length; next++)
        if (overlaps(box, boxes[next], 2)) problems.push(`overlap: ${named(text)} and ${named(texts[next])} of ${named(svg)}`);
    });
  }
  return [...new Set(problems)];
}
