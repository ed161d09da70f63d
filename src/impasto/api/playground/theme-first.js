// The chosen theme, set before the first paint. A classic script on purpose: modules run too late for that.
try {
  const theme = localStorage.getItem("impasto.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // Storage is blocked: the system's theme it is.
}
