// Runs before anything is drawn, so that no page flashes in the wrong colours.
try {
  const chosen = localStorage.getItem("anysize-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // A page without storage follows the system.
}
document.documentElement.classList.add("scripted");
