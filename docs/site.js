// Elements that the theme makes in the browser: buttons at code are no landmarks, and the keyboard can scroll wide tables.
const mend = () => {
  for (const nav of document.querySelectorAll("nav.md-code__nav")) nav.role = "none";
  for (const table of document.querySelectorAll(".md-typeset__scrollwrap")) table.tabIndex = 0;
};
new MutationObserver(mend).observe(document.body, { childList: true, subtree: true });
mend();
