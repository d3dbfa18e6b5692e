// The search takes ":" and other signs for its own language. Error messages are full of them, and people paste those.
document.addEventListener("input", (event) => {
  const field = event.target
  if (!field.matches("[data-md-component=search-query]")) return
  const plain = field.value.replace(/[:^~*"'+(){}[\]]/g, " ")
  if (plain !== field.value) field.value = plain
}, true)
