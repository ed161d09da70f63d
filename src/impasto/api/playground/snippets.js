// The request as a program: what a click on "Paint" sends, for a terminal, Python and JavaScript.
//
// Each is a list of [text, shown] pieces: `text` is what is copied, `shown` is shorter where a picture is in it.

const ENV = "WAVESPEED_API_KEY";
const LONG = 200; // characters of a string that are shown whole

export const LANGUAGES = { curl: "curl", python: "Python", javascript: "JavaScript" };

/** Return `{text, shown}` of the request in a language. */
export function snippet(language, base, model, body) {
  const write = { curl, python, javascript }[language];
  return { text: write(base, model, body), shown: write(base, model, shortened(body)) };
}

/** Return the body with its pictures cut to their beginnings. */
function shortened(body) {
  const cut = (value) => (typeof value === "string" && value.startsWith("data:") && value.length > LONG ? `${value.slice(0, 44)}… (${Math.ceil(value.length / 1024)} kB)` : value);
  return Object.fromEntries(Object.entries(body).map(([name, value]) => [name, cut(value)]));
}

function curl(base, model, body) {
  return [
    `curl ${base}/api/v3/${model} \\`,
    `  --header "Authorization: Bearer $${ENV}" \\`,
    `  --header "Content-Type: application/json" \\`,
    `  --data-binary @- <<'JSON'`,
    JSON.stringify(body, null, 2),
    "JSON",
    "",
    "# Its data.urls.get has the result:",
    `# curl ${base}/api/v3/predictions/ID/result --header "Authorization: Bearer $${ENV}"`,
  ].join("\n");
}

function python(base, model, body) {
  return [
    "import os",
    "",
    "import wavespeed  # pip install wavespeed",
    "",
    `client = wavespeed.Client(api_key=os.environ["${ENV}"], base_url=${JSON.stringify(base)})`,
    "result = client.run(",
    `    ${JSON.stringify(model)},`,
    `${indented(inPython(body, 0), 4)},`,
    ")",
    'print(result["outputs"])',
  ].join("\n");
}

function javascript(base, model, body) {
  return [
    'import { Client } from "wavespeed"; // npm install wavespeed',
    "",
    `const client = new Client(process.env.${ENV}, { baseUrl: ${JSON.stringify(base)} });`,
    `const result = await client.run(${JSON.stringify(model)}, ${JSON.stringify(body, null, 2)});`,
    "console.log(result.outputs);",
  ].join("\n");
}

const indented = (text, by) => text.split("\n").map((line) => " ".repeat(by) + line).join("\n");

/** Return a JSON value as Python writes it; JSON's strings are Python's, but for halves of surrogate pairs. */
function inPython(value) {
  if (value === true) return "True";
  if (value === false) return "False";
  if (value === null) return "None";
  if (Array.isArray(value)) return value.length ? `[\n${value.map((each) => `${indented(inPython(each), 4)},\n`).join("")}]` : "[]";
  if (typeof value === "object") {
    const items = Object.entries(value).map(([name, each]) => `    ${JSON.stringify(name)}: ${indented(inPython(each), 4).trimStart()},\n`);
    return `{\n${items.join("")}}`;
  }
  return JSON.stringify(value);
}
