// openai for JavaScript: tools, the tool runner's stream, parsed formats, /v1/responses.

import assert from "node:assert";
import OpenAI from "openai";

const [url, key] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0 });
const messages = [{ role: "user", content: "What is the weather in Rome?" }];
const parameters = {
  type: "object",
  properties: { city: { enum: ["Paris", "Rome"] }, days: { type: "integer", minimum: 1, maximum: 9 } },
  required: ["city", "days"],
  additionalProperties: false,
};
const described = { name: "weather", description: "The weather.", parameters, strict: true };
const one = { model: "tiny", tool_choice: "required", parallel_tool_calls: false };

const tools = [{ type: "function", function: described }];
const stream = client.chat.completions.stream({ ...one, messages, tools });
const final = await stream.finalChatCompletion();
assert.equal(final.choices[0].finish_reason, "tool_calls");
const call = final.choices[0].message.tool_calls[0];
assert.ok(["Paris", "Rome"].includes(JSON.parse(call.function.arguments).city));
const result = { role: "tool", tool_call_id: call.id, content: "sunny" };
const after = await client.chat.completions.create({
  model: "tiny",
  messages: [...messages, final.choices[0].message, result],
  tools,
});
assert.ok(after.choices[0].message.content);
const flat = [{ type: "function", ...described }];
const response = await client.responses.create({ ...one, input: messages, tools: flat });
assert.equal(response.output[0].type, "function_call");
const kinds = [];
for await (const event of await client.responses.create({ ...one, input: messages, tools: flat, stream: true })) {
  kinds.push(event.type);
}
assert.equal(kinds.at(-1), "response.completed");
const schema = { type: "object", properties: { sunny: { type: "boolean" } }, required: ["sunny"], additionalProperties: false };
const format = { type: "json_schema", name: "sky", strict: true, schema };
const parsed = await client.responses.parse({ model: "tiny", input: messages, text: { format } });
assert.equal(typeof JSON.parse(parsed.output_text).sunny, "boolean");
