// Corrects elements that the theme makes in the browser: buttons of code are not landmarks; the keyboard scrolls wide tables.
const correct = () => {
  for (const nav of document.querySelectorAll("nav.md-code__nav")) nav.role = "none";
  for (const table of document.querySelectorAll(".md-typeset__scrollwrap")) table.tabIndex = 0;
};
new MutationObserver(correct).observe(document.body, { childList: true, subtree: true });
correct();
