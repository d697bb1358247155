// openai for JavaScript: chat, stream, completions, models, errors.

import assert from "node:assert";
import OpenAI from "openai";

const [url, key] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key });
const messages = [{ role: "user", content: "What is 60% of 440?" }];

const models = await client.models.list();
assert.equal(models.data[0].id, "tiny");
const whole = await client.chat.completions.create({ model: "tiny", messages });
assert.match(whole.choices[0].message.content, /264/);
let text = "";
const stream = await client.chat.completions.create({ model: "tiny:ar", messages, stream: true });
for await (const chunk of stream) text += chunk.choices[0]?.delta?.content ?? "";
assert.equal(text, whole.choices[0].message.content);
const completion = await client.completions.create({ model: "tiny", prompt: "abc", max_tokens: 4 });
assert.ok(completion.choices[0].text);
const long = [{ role: "user", content: "word ".repeat(5000) }];
await assert.rejects(
  client.chat.completions.create({ model: "tiny", messages: long }),
  (error) => error instanceof OpenAI.BadRequestError && error.code === "context_length_exceeded",
);
