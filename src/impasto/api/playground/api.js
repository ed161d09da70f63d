// Requests to the service. Knows the envelope and the error body. Knows nothing of the page.

let key = "";

/** Take the key that signs all requests from now on. */
export function useKey(value) {
  key = value;
}

/** A refusal, or no answer (`status` 0), of what `key` signed. `field` is the path of a wrong value, as an array, or null. */
export class ApiError extends Error {
  constructor(status, message, signedWith) {
    super(message);
    this.status = status;
    this.key = signedWith;
    const pointed = /Error at "\/([^"]*)": ([\s\S]*)/.exec(message);
    this.field = pointed ? pointed[1].split("/") : null;
    this.problem = pointed ? pointed[2] : message;
  }
}

/** Return the absolute URL of a path of this service, which may live below a prefix. */
export const urlOf = (path) => new URL(path, document.baseURI).href;

/** Send a signed request; return the response if it is a success. */
export async function send(path, { method = "GET", body, signal, headers = {} } = {}) {
  const signedWith = key; // there may be another one when the answer comes
  const signed = { ...headers, ...(key && { Authorization: `Bearer ${key}` }) };
  if (body !== undefined) signed["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(urlOf(path), { method, headers: signed, signal, body: body && JSON.stringify(body), cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The service cannot be reached.", signedWith);
  }
  if (!response.ok) throw new ApiError(response.status, await messageOf(response), signedWith);
  return response;
}

/** Send a signed request; return the `data` of the answer. */
export async function call(path, options) {
  return (await (await send(path, options)).json()).data;
}

async function messageOf(response) {
  try {
    return (await response.json()).message || `HTTP ${response.status}`;
  } catch {
    return `HTTP ${response.status}`;
  }
}

/** Return where this page finds an output: below its own address, whatever host the answer names. */
export function pictureSource(output) {
  if (!/^https?:/.test(output)) return `data:${kindOf(output)};base64,${output}`;
  const from = output.indexOf("/outputs/");
  return from < 0 ? output : urlOf(output.slice(from + 1));
}

function kindOf(base64) {
  if (base64.startsWith("/9j/")) return "image/jpeg";
  return base64.startsWith("UklGR") ? "image/webp" : "image/png";
}

/** Return 16 random bytes in hexadecimal; `crypto.randomUUID` is missing without TLS. */
export function randomName() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
