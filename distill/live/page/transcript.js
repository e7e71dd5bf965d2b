// What was said, by turn: what the user typed or spoke, and what the avatar answered, as far as the server knows its words.
export class Transcript {
  constructor(list) { Object.assign(this, {list, turns: new Map()}); }
  add(who, text) {
    const entry = document.createElement("p"), name = document.createElement("b"), words = document.createElement("span");
    entry.className = who;
    name.textContent = who === "user" ? "You: " : "Avatar: ";
    words.textContent = text;
    entry.append(name, words);
    this.list.append(entry);
    while (this.list.children.length > 200) this.list.firstChild.remove();
    this.list.scrollTop = this.list.scrollHeight;
    return words;
  }
  begin({number, asked}) { this.turns.set(number, {user: this.add("user", asked ?? "(spoken)")}); }
  // a piece of the turn's words: the user's, as they were transcribed, or the avatar's next sentence
  words({turn, who, text}) {
    const known = this.turns.get(turn);
    if (!known) return;
    if (who === "user") known.user.textContent = text;
    else if (known.avatar) known.avatar.textContent += ` ${text}`;
    else known.avatar = this.add("avatar", text);
    this.list.scrollTop = this.list.scrollHeight;
  }
  restart() { this.turns.clear(); }  // another stream counts its turns anew
}
