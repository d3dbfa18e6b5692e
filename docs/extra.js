// The search takes ":" and other signs for its own language, and does not notice what is pasted with the mouse. Error
// messages are full of such signs, and people paste those.
document.addEventListener("input", (event) => {
  const field = event.target
  if (!field.matches("[data-md-component=search-query]")) return
  const plain = field.value.replace(/[:^~*"'+(){}[\]]/g, " ")
  if (plain !== field.value) field.value = plain
  if (event.inputType === "insertFromPaste") field.dispatchEvent(new KeyboardEvent("keyup"))
}, true)
