// AI SDK: calls, their results and the answer, whole and streamed; objects; by both providers and both APIs.

import assert from "node:assert";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const [url, key] = process.argv.slice(2);
const openai = createOpenAI({ baseURL: `${url}/v1`, apiKey: key });
const compatible = createOpenAICompatible({
  name: "trimode",
  baseURL: `${url}/v1`,
  apiKey: key,
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const prompt = "What is the weather in Rome?";
const weather = tool({
  description: "The weather of a city.",
  inputSchema: z.object({ city: z.enum(["Paris", "Rome"]) }),
  execute: async ({ city }) => `${city}: sunny`,
});
const sky = z.object({ sunny: z.boolean(), wind: z.enum(["none", "some", "much"]) });

for (const model of [openai.chat("tiny"), openai.responses("tiny"), compatible("tiny")]) {
  const agent = {
    model,
    prompt,
    tools: { weather },
    maxRetries: 0,
    stopWhen: stepCountIs(2),
    prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "auto" }),
  };
  const whole = await generateText(agent);
  assert.match(whole.steps[0].toolResults[0].output, /sunny/);
  assert.equal(whole.steps[0].finishReason, "tool-calls");
  assert.ok(whole.text);
  const streamed = streamText(agent);
  let text = "";
  for await (const part of streamed.textStream) text += part;
  assert.equal(text, whole.text);
  const object = await generateText({ model, prompt, maxRetries: 0, output: Output.object({ schema: sky }) });
  assert.ok(sky.safeParse(object.output).success);
  const partial = streamText({ model, prompt, maxRetries: 0, output: Output.object({ schema: sky }) });
  let last;
  for await (const part of partial.partialOutputStream) last = part;
  assert.ok(sky.safeParse(last).success);
}
