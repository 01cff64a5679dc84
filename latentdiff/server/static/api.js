// Requests to the server. A refusal becomes an Error with the server's own sentence.

export async function get(path) {
  return answered(await reached(fetch(path)));
}

export async function post(path, body) {
  return answered(await sent(path, body));
}

/** A picture's file. */
export async function file(address) {
  const answer = await reached(fetch(address));
  if (!answer.ok) throw new Error("This picture is no longer in the folder.");
  return answer.blob();
}

/** The objects of an answer of one JSON object a line, as they come. Aborting the signal cancels on the server. */
export async function* lines(path, body, signal) {
  const answer = await sent(path, body, signal);
  if (!answer.ok) await answered(answer);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reached(reader.read());
    if (done) return;
    const complete = (rest + value).split("\n");
    rest = complete.pop();
    for (const line of complete) yield JSON.parse(line);
  }
}

/** The bytes of a file or a picture's address, in base64. */
export async function base64(blob) {
  const reader = new FileReader();
  await new Promise((resolve, reject) => {
    reader.onload = resolve;
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
  return reader.result.slice(reader.result.indexOf(",") + 1);
}

function sent(path, body, signal) {
  const headers = { "content-type": "application/json" };
  return reached(fetch(path, { method: "POST", headers, body: JSON.stringify(body), signal }));
}

/** A browser says no more than "Failed to fetch". */
async function reached(fetching) {
  try {
    return await fetching;
  } catch (error) {
    throw error.name === "TypeError" ? new Error("The server does not answer. Is it still running?") : error;
  }
}

async function answered(answer) {
  const text = await answer.text();
  let content = null;
  try {
    content = JSON.parse(text);
  } catch {
    throw new Error(`The server answered ${answer.status}: ${text.slice(0, 200)}`);
  }
  if (!answer.ok) throw new Error(content?.error?.message ?? `The server answered ${answer.status}`);
  return content;
}
