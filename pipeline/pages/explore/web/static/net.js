// Requests to the server this page came from.

export class Refused extends Error {
  constructor(status, sentence) {
    super(sentence);
    this.status = status;
  }
}

async function checked(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The explorer does not answer: has it been ended in its terminal?");
  }
  if (response.ok) return response;
  let sentence = `${response.status} ${response.statusText}`;
  try {
    sentence = (await response.json()).error;
  } catch {
    // not JSON: the status is all there is to say
  }
  throw new Refused(response.status, sentence);
}

export async function getJson(path, signal) {
  const response = await checked(path, { signal });
  return { ...(await response.json()), status: response.status };
}

export async function postJson(path, content) {
  const headers = { "Content-Type": "application/json" };
  return (await checked(path, { method: "POST", headers, body: JSON.stringify(content) })).json();
}

export async function postImage(path, file) {
  const headers = { "Content-Type": file.type.startsWith("image/") ? file.type : "application/octet-stream" };
  return (await checked(path, { method: "POST", headers, body: file })).json();
}

export async function getNumbers(path, Kind) {
  return new Kind(await (await checked(path)).arrayBuffer());
}

export function query(values) {
  const given = Object.entries(values).filter(([, value]) => value !== "" && value !== null && value !== undefined);
  return new URLSearchParams(given).toString();
}
